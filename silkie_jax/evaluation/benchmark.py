"""What a benchmark is to the rest: items, a prompt for each, requests to a judge where it has one, and a score.

A benchmark is a module with these names (see `Benchmark`), all pure but for reading the files they are given:

    ABOUT                                               an `About`
    items(data, settings) -> list[Item]                 from the files as they are distributed
    prompt(item, style) -> str                          what a model is asked, under one of ABOUT.prompts
    read_answers(path, items, settings) -> items, answers   from the benchmark's own form of results
    dialogues(items, answers, settings) -> {key: Dialogue}  judged benchmarks only: what a judge is asked
    score(items, answers, replies, parser, settings) -> Score

and, where it needs them, these:

    continuations(item, style) -> tuple[str, ...]       ABOUT.likelihood: what follows the prompt for each option; none
                                                        where the style has a letter generated
    answerable(item) -> bool                            False for items that a model of images cannot be asked
    official_replies(raw, items, answers) -> {key: replies}   from the benchmark's own form of a judge's replies
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from silkie_jax.evaluation.rules.sums import Sums

Settings = Mapping[str, str]
"""What a user set by name (`--set subset=FILE`); only names of `About.settings`."""


class Picture(Protocol):
    """An image of an item, read when it is needed; scoring never does."""

    @property
    def name(self) -> str:
        """What the data calls it; questions about one image share it."""

    def exists(self) -> bool:
        """Whether it is where it must lie."""

    def read(self) -> bytes:
        """The encoded file.

        Raises:
            UserError: it is not where it must lie.
        """


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
        id: unique in the benchmark; what answers are told apart by.
        question: as the data has it.
        pictures: in the order in which they are shown.
        truth: what an answer is compared with, in the benchmark's own form.
        part: the sub-task, split or category that it is counted under.
        options: contents of a multiple choice, in order.
        fields: whatever else the data says of it.
    """

    id: str
    question: str
    pictures: tuple[Picture, ...] = ()
    truth: Any = None
    part: str = ""
    options: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cluster(self) -> str:
        """What a bootstrap draws: the image's name, or the item itself where it has none."""
        return self.pictures[0].name if self.pictures else self.id


@dataclass(frozen=True)
class Answer:
    """A model's answer to one item; `fields` holds what else its file says (losses of options, a stored verdict)."""

    id: str
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ask:
    """One request to a judge: text only, as all official judges here."""

    user: str
    system: str | None = None
    temperature: float = 0.0
    max_tokens: int | None = None


Dialogue = Callable[[Sequence[str]], Ask | None]
"""The replies so far -> the next request, or None when there is nothing left to ask."""


@dataclass(frozen=True)
class Exchange:
    """One dialogue with a judge: `outcome` is "ok", or the endpoint's where no usable reply came (a refusal)."""

    key: str
    run: int
    replies: tuple[str, ...]
    models: tuple[str, ...] = ()
    outcome: str = "ok"


@dataclass(frozen=True)
class Replies:
    """What judges replied: `runs[r][key]` are the replies of run r to a dialogue, in order.

    Attributes:
        models: names that the servers reported -> replies.
        failed: dialogues that no usable reply came to, by the endpoint's outcome (refusals, timeouts); no run has
            their keys.
        exchanges: the same, dialogue by dialogue, as they are stored.
    """

    runs: Sequence[Mapping[str, Sequence[str]]]
    models: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)
    exchanges: Sequence[Exchange] = ()

    @classmethod
    def of(cls, exchanges: Sequence[Exchange]) -> "Replies":
        """From dialogues in any order."""
        runs: list[dict[str, Sequence[str]]] = [{} for _ in range(max((e.run for e in exchanges), default=0) + 1)]
        for exchange in exchanges:
            if exchange.outcome == "ok":
                runs[exchange.run][exchange.key] = exchange.replies
        models = Counter(model for exchange in exchanges for model in exchange.models)
        failed = Counter(exchange.outcome for exchange in exchanges if exchange.outcome != "ok")
        return cls(runs, dict(models), dict(failed), tuple(exchanges))


@dataclass(frozen=True)
class Decoding:
    """How answers are generated; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Figure:
    """A number that a benchmark is known by, between `worst` and `best`; of faults the best is the smaller one."""

    name: str
    best: float
    worst: float = 0.0

    @property
    def faults(self) -> bool:
        """Whether smaller is better."""
        return self.best < self.worst


@dataclass(frozen=True)
class About:
    """What a benchmark says of itself.

    Attributes:
        title: as papers call it.
        data: where the data comes from, and what must lie in the folder given as --data.
        figures: of `Sums.figures`, the most important first.
        decoding: of its authors, or what comes nearest.
        prompts: name -> what it is; the first is the default, officially so where there is one.
        parsers: names of rules; the first is the default.
        judge: the model that its authors ask; None: no judge.
        judge_optional: whether it can be scored without a judge's replies.
        settings: name -> what it is.
        answers_hold_data: whether the official form of results repeats questions and truths, so that no data is needed.
        likelihood: whether the likelihoods of the options are the official answers.
    """

    title: str
    data: str
    figures: tuple[Figure, ...]
    decoding: Decoding
    prompts: Mapping[str, str]
    parsers: tuple[str, ...] = ("official",)
    judge: str | None = None
    judge_optional: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    answers_hold_data: bool = False
    likelihood: bool = False


@dataclass(frozen=True)
class Score:
    """What came out.

    Attributes:
        official: the figures of the official tool under its own names, by its own arithmetic and rounding, whatever
            parser was asked for.
        sums: counts by image under the parser that was asked for, of which every figure is a function; not rounded.
        outcomes: item -> 1 or 0, or a rating: what two checkpoints are compared by. Items without one are left out.
        readings: item -> what the answer was taken for, for people.
        counts: rows and whatever was undecided, missing, repeated or failed.
        notes: lines for people.
    """

    official: dict[str, Any]
    sums: Sums
    outcomes: dict[str, float] = field(default_factory=dict)
    readings: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Benchmark(Protocol):
    """A module of this package that measures something; see above."""

    ABOUT: About

    def items(self, data: Path, settings: Settings) -> list[Item]: ...

    def prompt(self, item: Item, style: str) -> str: ...

    def read_answers(
        self, path: Path, items: list[Item] | None, settings: Settings
    ) -> tuple[list[Item], list[Answer]]: ...

    def dialogues(self, items: list[Item], answers: list[Answer], settings: Settings) -> dict[str, Dialogue]: ...

    def score(
        self, items: list[Item], answers: list[Answer], replies: Replies | None, parser: str, settings: Settings
    ) -> Score: ...
