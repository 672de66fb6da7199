"""A file of answers: a first line that says what they rest on, then one line an item, in the benchmark's order.

While they come they are kept in FILE.part, in the order in which they came; the same command continues there. What is
continued is known by its contents: fingerprints of items, weights, adapter and tokenizer, and every option.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from silkie_jax.durable import sync
from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import Answer, Benchmark, Item, Settings
from silkie_jax.evaluation.running.files import read_json_lines
from silkie_jax.locks import lock

FORM = "silkie answers 1"


@dataclass(frozen=True)
class Origin:
    """What a file of answers rests on.

    Attributes:
        benchmark: its name.
        items: fingerprint of ids, questions and options.
        rows: how many there are.
        data: where they were read, for finding them again; not part of what answers are known by.
        limit: of how many items a part was drawn; None: all.
        settings: of the benchmark.
        prompt, template: the wording of questions, and the form around them.
        decoding: as asked for.
        model, weights, adapter, tokenizer, dtype: paths are for people; fingerprints count.
        endpoint: instead of weights, where a server answered, and the names it reported.
    """

    benchmark: str
    items: str
    rows: int
    data: str = ""
    limit: int | None = None
    settings: dict[str, str] = field(default_factory=dict)
    prompt: str = ""
    template: str = ""
    decoding: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    weights: str | None = None
    adapter: str | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    endpoint: str | None = None

    def line(self) -> str:
        return json.dumps({"form": FORM, **asdict(self)}, ensure_ascii=False) + "\n"


_NAMES = {
    "benchmark": "another benchmark",
    "items": "other items",
    "rows": "another number of items",
    "limit": "another --limit",
    "settings": "other settings",
    "prompt": "another --prompt",
    "template": "another --template",
    "decoding": "another decoding",
    "weights": "other weights",
    "adapter": "another adapter",
    "tokenizer": "another tokenizer",
    "dtype": "another --dtype",
    "endpoint": "another endpoint or model",
}


def items_fingerprint(items: Iterable[Item]) -> str:
    """Of ids, questions and options, in order."""
    digest = hashlib.sha256()
    for item in items:
        line = [item.id, item.question, list(item.options), [picture.name for picture in item.pictures]]
        digest.update(json.dumps(line).encode() + b"\n")
    return digest.hexdigest()


def asked_items(benchmark: Benchmark, data: Path, settings: Settings, limit: int | None) -> list[Item]:
    """The items of a benchmark that a model is asked: all that it can be, or a part drawn of them.

    Raises:
        UserError: the data is not sound.
    """
    can = getattr(benchmark, "answerable", lambda item: True)
    return draw([item for item in benchmark.items(data, settings) if can(item)], limit)


def draw(items: Sequence[Item], limit: int | None) -> list[Item]:
    """About `limit` items, the same ones every time: whole images by lot, so that questions of one stay together.

    Items of the same parts in the same shares, as near as whole images allow.
    """
    if limit is None or limit >= len(items):
        return list(items)
    lots = {item.cluster: hashlib.sha256(item.cluster.encode()).digest() for item in items}
    parts: dict[str, dict[str, int]] = {}
    for item in items:
        images = parts.setdefault(item.part, {})
        images[item.cluster] = images.get(item.cluster, 0) + 1
    taken: set[tuple[str, str]] = set()
    for part, images in parts.items():
        room = max(round(limit * sum(images.values()) / len(items)), 1)
        for cluster in sorted(images, key=lots.__getitem__):
            if room <= 0:
                break
            taken.add((part, cluster))
            room -= images[cluster]
    return [item for item in items if (item.part, item.cluster) in taken]


def is_ours(path: Path) -> bool:
    """Whether a file is one of this form, and not a benchmark's own."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline(200).startswith(b'{"form": "' + FORM.encode() + b'"')


def read_answers(path: Path) -> tuple[Origin, list[Answer]]:
    """A finished file.

    Raises:
        UserError: a line is not as it should be.
    """
    lines = read_json_lines(path)
    origin = _origin(path, next(lines)[1])
    return origin, [_answer(path, number, line) for number, line in lines]


def _origin(path: Path, line: dict[str, Any]) -> Origin:
    try:
        return Origin(**{name: value for name, value in line.items() if name != "form"})
    except TypeError as error:
        raise UserError(f"{path}: line 1: not what this version writes ({error}); answer anew") from None


def _answer(path: Path, number: int, line: dict[str, Any]) -> Answer:
    try:
        return Answer(line["id"], line["response"], {k: v for k, v in line.items() if k not in ("id", "response")})
    except KeyError as error:
        raise UserError(f"{path}: line {number}: no field {error}") from None


def answer_line(answer: Answer) -> str:
    """One line of the file."""
    return json.dumps({"id": answer.id, "response": answer.text, **answer.fields}, ensure_ascii=False) + "\n"


class AnswersFile:
    """Answers as they come, for one process at a time.

    Attributes:
        done: id -> answer, of those that were there at the start and have come since.
    """

    def __init__(self, path: Path, origin: Origin):
        self.path, self.origin = path, origin
        self.part = path.with_name(path.name + ".part")
        self.done: dict[str, Answer] = {}

    @contextmanager
    def open(self) -> Iterator["AnswersFile"]:
        """Takes up FILE.part, or begins it.

        Raises:
            UserError: it was begun with something else, or another process writes to it.
        """
        if self.path.is_dir():
            raise UserError(f"{self.path} is a folder; name a file to write")
        if not self.path.parent.is_dir():
            raise UserError(f"{self.path.parent}: no such folder to write {self.path.name} in")
        busy = f"{self.path}: another process is writing it; wait for it, or stop it first"
        with lock(self.path.with_name(f".{self.path.name}.lock"), busy, optional=True):
            self._take_up()
            with self.part.open("a", encoding="utf-8") as self._file:
                if not self._file.tell():
                    self._file.write(self.origin.line())
                    self._file.flush()
                yield self
        self.path.with_name(f".{self.path.name}.lock").unlink(missing_ok=True)

    def _take_up(self) -> None:
        if not self.part.exists():
            return
        with self.part.open("r+b") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            file.truncate(whole)  # what follows was cut off
        if not whole:
            return
        if not is_ours(self.part):
            raise UserError(f"{self.part} was not begun by `silkie evaluate answer`; remove it, or name another file")
        before, answers = read_answers(self.part)
        check_same(self.part, before, self.origin)
        self.done = {answer.id: answer for answer in answers}

    def add(self, answer: Answer) -> None:
        """Keeps an answer, which outlasts this process from here on."""
        self._file.write(answer_line(answer))
        self._file.flush()
        self.done[answer.id] = answer

    def finish(self, items: Iterable[Item]) -> None:
        """Writes FILE in the order of the items, and removes FILE.part."""
        write_answers(self.path, self.origin, (self.done[item.id] for item in items))
        self.part.unlink()


def write_answers(path: Path, origin: Origin, answers: Iterable[Answer]) -> None:
    """Writes a finished file, which is there whole or not at all."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(origin.line())
        file.writelines(map(answer_line, answers))
    sync(new)
    os.replace(new, path)
    sync(path.parent)


def check_same(path: Path, before: Origin, now: Origin) -> None:
    """Refuses to continue what was begun with something else.

    Raises:
        UserError: says with what.
    """
    different = [said for name, said in _NAMES.items() if getattr(before, name) != getattr(now, name)]
    if different:
        raise UserError(f"{path} was begun with {' and '.join(different)}; remove it to answer anew")


def is_finished(path: Path, origin: Origin) -> bool:
    """Whether FILE is there and rests on the same.

    Raises:
        UserError: it is there and rests on something else: it is not overwritten.
    """
    if not path.exists():
        return False
    if not is_ours(path):
        raise UserError(f"{path} is there and no file of answers; name another file")
    with path.open("rb") as file:
        before = _origin(path, json.loads(file.readline()))
    check_same(path, before, origin)
    return True


def merged(settings: Settings, given: Settings) -> dict[str, str]:
    """Settings of a file of answers, and those given now on top."""
    return {**settings, **given}
