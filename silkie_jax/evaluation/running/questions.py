"""What is asked of a benchmark, and how: settled before anything is loaded."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import Benchmark, Decoding, Item
from silkie_jax.evaluation.running.answers import Origin, asked_items, items_fingerprint
from silkie_jax.evaluation.running.scoring import check_settings
from silkie_jax.evaluation.table import find_benchmark
from silkie_jax.models.qwen_vl.chat import TEMPLATES


@dataclass(frozen=True)
class AnswerOptions:
    """How a benchmark is answered; what is None is the benchmark's default.

    Attributes:
        prompt: one of the benchmark's prompts.
        after: a text that follows every question on lines of its own: what a model was trained to be asked.
        template: one of `models.qwen_vl.chat.TEMPLATES`.
        temperature, top_p, max_new_tokens: of decoding.
        seed: of draws; an item draws as its id says, whatever else is asked.
        limit: of how many items a part is drawn.
    """

    prompt: str | None = None
    template: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    limit: int | None = None
    settings: dict[str, str] = field(default_factory=dict)
    after: str | None = None


@dataclass(frozen=True)
class Questions:
    """Items with all that decides what is asked, and how."""

    benchmark: Benchmark
    items: list[Item]
    style: str
    template: str
    decoding: Decoding
    seed: int
    origin: Origin
    after: str | None = None

    @property
    def by_likelihood(self) -> bool:
        """Whether options are compared by their likelihoods, and nothing is generated."""
        return _by_likelihood(self.benchmark, self.items[0], self.style)

    def text(self, item: Item) -> str:
        question = self.benchmark.prompt(item, self.style)
        return f"{question}\n{self.after}" if self.after else question

    def seed_of(self, item: Item) -> int:
        """What an item's draws begin with, in [0, 2^32): its own, since under one seed for all of them the same lot
        falls at the same place of every answer, and a hundred answers are worth hardly more than one."""
        return int.from_bytes(hashlib.sha256(f"{self.seed} {item.id}".encode()).digest()[:4], "little")

    def continuations(self, item: Item) -> tuple[str, ...]:
        """What may follow the text, where likelihoods are compared."""
        return self.benchmark.continuations(item, self.style)  # type: ignore[attr-defined]


def open_questions(name: str, data: Path, options: AnswerOptions) -> Questions:
    """Reads a benchmark's items and settles how they are asked.

    Raises:
        UserError: data or an option is not sound.
    """
    benchmark = find_benchmark(name)
    about = benchmark.ABOUT
    check_settings(name, benchmark, options.settings)
    style = options.prompt or next(iter(about.prompts))
    if style not in about.prompts:
        raise UserError(f"--prompt {style}: {name} has {', '.join(about.prompts)}")
    if options.template is not None and options.template not in TEMPLATES:
        raise UserError(f"--template {options.template}: there are {', '.join(TEMPLATES)}")
    if not data.exists():
        raise UserError(f"{data}: no such data; {name} needs {about.data}")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be at least 1, not {options.limit}")
    items = asked_items(benchmark, data, options.settings, options.limit)
    if not items:
        raise UserError(f"{data}: holds no item of {name}; it needs {about.data}")
    likelihoods = _by_likelihood(benchmark, items[0], style)
    if options.after and likelihoods:
        raise UserError(f"--after: {name} compares likelihoods of what follows the question; choose a --prompt")
    template = options.template or ("raw" if likelihoods else "chat")
    given = {key: getattr(options, key) for key in ("temperature", "top_p", "max_new_tokens")}
    decoding = replace(about.decoding, **{key: value for key, value in given.items() if value is not None})
    said: dict[str, Any] = {"likelihoods": "of the options"} if likelihoods else asdict(decoding)
    if decoding.temperature and not likelihoods:
        said |= {"seed": options.seed, "draws": "by item"}
    origin = Origin(
        benchmark=name,
        items=items_fingerprint(items),
        rows=len(items),
        data=str(data.resolve()),
        limit=options.limit,
        settings=dict(options.settings),
        prompt=f"{style}, then {options.after!r}" if options.after else style,
        template=template,
        decoding=said,
    )
    check_pictures(items)
    return Questions(benchmark, items, style, template, decoding, options.seed, origin, options.after)


def _by_likelihood(benchmark: Benchmark, item: Item, style: str) -> bool:
    return bool(benchmark.ABOUT.likelihood and benchmark.continuations(item, style))  # type: ignore[attr-defined]


def check_pictures(items: Iterable[Item]) -> None:
    """Whether every image is where it must lie, before anything is loaded.

    Raises:
        UserError: names the first that is not.
    """
    seen: set[str] = set()
    for item in items:
        for picture in item.pictures:
            if picture.name not in seen and not picture.exists():
                picture.read()  # says where it must lie
            seen.add(picture.name)
