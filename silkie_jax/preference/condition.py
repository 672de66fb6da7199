"""What supervised fine-tuning tells the model of an answer before it: the answer's own ratings, below the question.

SteerLM (arXiv 2310.05344), which arXiv 2402.10884 applies to images: every answer is imitated, a poor one as an answer
to a question that asks for a poor one. Whoever wants good answers then asks for the best ratings, by the same words:

    What is unusual here?
    Give the answer that would be rated so, 4 being the best:
    Helpfulness:4,Correctness:4,Coherence:4,Complexity:4,Verbosity:4
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from silkie_jax.corpus.scores import is_number
from silkie_jax.errors import UserError

CONDITIONS = ("attributes",)
_SENTENCE = "Give the answer that would be rated so, {best} being the best:"


@dataclass(frozen=True)
class Attributes:
    """The condition by ratings.

    Attributes:
        best: the best rating of every aspect.
        aspects: in the order in which they are written.
    """

    best: float
    aspects: tuple[str, ...]

    def of(self, ratings: Mapping[str, float]) -> str | None:
        """What stands below the question of a response with these ratings; None where one is missing.

        Means over orders or judges are written with one decimal.
        """
        numbers = [ratings.get(aspect, math.nan) for aspect in self.aspects]
        if any(map(math.isnan, numbers)):
            return None
        written = (f"{aspect}:{round(number, 1):g}" for aspect, number in zip(self.aspects, numbers, strict=True))
        return f"{_SENTENCE.format(best=f'{self.best:g}')}\n{','.join(written)}"

    @property
    def asked(self) -> str:
        """What stands below the question where good answers are wanted."""
        return str(self.of(dict.fromkeys(self.aspects, self.best)))


def check_condition(condition: Any) -> None:
    """Refuses what is no condition.

    Raises:
      UserError: one line that names the key and the mend.
    """
    mend = "condition: write {name: attributes, best: 4}, best being the best rating"
    if not isinstance(condition, Mapping):
        raise UserError(f"{mend}, not {condition!r}")
    if condition.get("name") not in CONDITIONS:
        raise UserError(f"condition: {condition.get('name')!r} is unknown; choose one of {', '.join(CONDITIONS)}")
    unknown = [key for key in condition if key not in ("name", "best", "aspects")]
    if unknown:
        raise UserError(f"condition attributes: unknown option {unknown[0]!r}; its options: best, aspects")
    if not is_number(condition.get("best")):
        raise UserError(f"{mend}; best is {condition.get('best')!r}")
    aspects = condition.get("aspects", ["any"])
    if not isinstance(aspects, list) or not aspects or not all(isinstance(aspect, str) for aspect in aspects):
        raise UserError(f"condition attributes: aspects must be a list of names, not {aspects!r}")


def read_condition(condition: Mapping[str, Any], aspects: Sequence[str]) -> Attributes:
    """The condition that a configuration names, of a corpus with these aspects; all of them, unless it names some.

    Raises:
      UserError: it is none, or the corpus cannot serve it.
    """
    check_condition(condition)
    if not aspects:
        raise UserError("condition attributes: this corpus has no ratings; remove it")
    wanted = tuple(condition.get("aspects", aspects))
    for aspect in wanted:
        if aspect not in aspects:
            raise UserError(f"condition attributes: this corpus has no aspect {aspect!r}; it has {', '.join(aspects)}")
    return Attributes(float(condition["best"]), wanted)
