"""The kinds of judges: whom each asks about an instruction's responses, and what the replies come to.

A kind is two classes and a line in `KINDS`. `Asking` is made of a judge's YAML file; it plans requests and says what a
reply is worth. `Reading` is made of what a run keeps of the judge; it makes ratings of replies, as often as one likes.
Orders, averages, journal, budget and build are the same for all.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from omegaconf import OmegaConf

from data_prep.judging.aggregate import Judgement
from data_prep.judging.by_rubric import RubricJudge, RubricReading
from data_prep.judging.implicit import ImplicitJudge, ImplicitReading
from data_prep.judging.rubric import Scale
from data_prep.judging.similarity import SimilarityJudge, SimilarityReading
from data_prep.run import Gathered, Instruction, Run
from silkie_jax.endpoints.agents import Agent
from silkie_jax.endpoints.attempts import Request, Verdict
from silkie_jax.endpoints.client import Route
from silkie_jax.endpoints.journal import Statement
from silkie_jax.endpoints.outcomes import EndpointReply
from silkie_jax.errors import UserError
from silkie_jax.yaml_files import make, read_yaml


class Asking(Protocol):
    """A judge as it asks.

    Attributes:
        name: of the judge.
        agents: who is asked, by the names under which their replies are filed.
        routes: what is asked of those that are not asked in a chat.
        free: keys of the settings that may change within a run.
    """

    name: str
    agents: dict[str, Agent]

    @property
    def routes(self) -> Mapping[str, Route]: ...

    @property
    def free(self) -> tuple[str, ...]: ...

    def settings(self) -> dict[str, Any]:
        """What a run keeps of it, as JSON holds it."""
        ...

    def requests(self, run: Run, gathered: Gathered, skipped: Counter[str]) -> Iterable[Statement]:
        """Requests about an instruction; those that are there already may come again. What it leaves out is counted."""
        ...

    def review(self, request: Request, reply: EndpointReply, number: int) -> Verdict:
        """What a reply is worth, by `attempts.Review`'s rules."""
        ...


class Reading(Protocol):
    """A judge as a build reads its replies.

    Attributes:
        names: of its aspects.
        weights: of aspects in an overall rating.
        scale: of its ratings; None: they have no ends.
        verdict: whether a response's rating is of all orders or none.
        asked: the names under which its replies are filed.
    """

    @property
    def names(self) -> list[str]: ...

    @property
    def weights(self) -> dict[str, float]: ...

    @property
    def scale(self) -> Scale | None: ...

    @property
    def verdict(self) -> bool: ...

    @property
    def asked(self) -> tuple[str, ...]: ...

    def judgements(self, gathered: Gathered) -> list[Judgement]:
        """What its replies about an instruction say."""
        ...


KINDS: dict[str, tuple[Callable[[Mapping[str, Any], str | os.PathLike[str]], Asking], Any]] = {
    "rubric": (RubricJudge, RubricReading),
    "verdict": (RubricJudge, RubricReading),
    "implicit": (ImplicitJudge, ImplicitReading),
    "similarity": (SimilarityJudge, SimilarityReading),
}
"""Kind -> how it asks, made of the keys of a judge's file and its path; and how its replies are read: a class with
`kept` (what a corpus depends on, `name` included, of what a run keeps) and `of`, which makes a `Reading` of that."""


SOURCES = "sources"
"""The key that limits a judge of any kind to the instructions of some sources."""


@dataclass
class _Limits:
    sources: list[str] | None = None


def load_judge(path: str | os.PathLike[str]) -> Asking:
    """Reads and checks a judge.

    Raises:
        UserError: one line that names the file, the key and the mend.
    """
    given = read_yaml(path)
    kind = _kind(given)
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{path}: kind: {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    given.pop(SOURCES, None)  # whatever its kind: see `load_sources`
    return KINDS[kind][0](given, path)


def load_sources(path: str | os.PathLike[str]) -> list[str] | None:
    """The sources to whose instructions a judge's file limits it; None for all.

    Raises:
        UserError: they are no list of names.
    """
    sources = make(OmegaConf.masked_copy(read_yaml(path), [SOURCES]), _Limits, str(path)).sources
    if sources == []:
        raise UserError(f"{path}: sources is empty: name at least one, or leave it out for all")
    return sources


def in_scope(judge: Mapping[str, Any], instruction: Instruction) -> bool:
    """Whether a judge is asked about an instruction, from its settings or from what `kept_of` gave."""
    return judge.get(SOURCES) is None or instruction.source in judge[SOURCES]


def kept_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a corpus depends on, of the settings that a run keeps of a judge; of a rubric's, the rubric alone."""
    kind = _kind(settings)
    limits = {SOURCES: settings[SOURCES]} if settings.get(SOURCES) is not None else {}
    return KINDS[kind][1].kept(settings) | ({} if "rubric" in settings else {"kind": kind}) | limits


def as_written_now(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that an earlier version may have begun, with the defaults of keys that are newer."""
    return {**settings, **({"rubric": KINDS[_kind(settings)][1].kept(settings)} if "rubric" in settings else {})}


def reading(judge: str, kept: Mapping[str, Any]) -> Reading:
    """The reading of a judge from what `kept_of` gave."""
    kind = _kind(kept)
    return KINDS[kind][1].of(judge, {key: value for key, value in kept.items() if key not in ("kind", SOURCES)})


def _kind(given: Mapping[str, Any]) -> Any:
    """A rubric's judge may leave its kind out: it is what its rubric is."""
    return given.get("kind") or "rubric"
