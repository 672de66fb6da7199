"""One number for each response of an instruction, from its ratings: what pair rules and imitation choose by."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from silkie_jax.corpus.schema import Record, Response
from silkie_jax.errors import UserError


def scores(record: Record, weights: Mapping[str, float] | None = None) -> list[float]:
    """The score of each response; NaN for one that lacks a rating that counts.

    Args:
        record: an instruction.
        weights: of aspects; the score is their weighted SUM, so that with weights of 1 it is in points, and one not
            named, or of weight 0, does not count. None: the mean of all the record's aspects.
    """
    if weights is None:
        aspects = list(dict.fromkeys(aspect for response in record.responses for aspect in response.ratings))
        return [_mean(response, aspects) for response in record.responses]
    counted = {aspect: float(weight) for aspect, weight in weights.items() if weight}
    return [
        math.fsum(weight * response.ratings.get(aspect, math.nan) for aspect, weight in counted.items())
        for response in record.responses
    ]


def rated(scores: Sequence[float]) -> list[tuple[float, int]]:
    """Score and index of each response that has a score."""
    return [(score, index) for index, score in enumerate(scores) if not math.isnan(score)]


def check_weights(where: str, weights: Any) -> None:
    """Refuses what are no weights of aspects.

    Args:
        where: names what they belong to in the message.
        weights: as a configuration gives them.

    Raises:
        UserError: one line that says what is wrong with them.
    """
    mend = f"{where}: weights must map aspects to numbers of at least 0, one of them above 0"
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f"{mend}, not {weights!r}")
    for aspect, weight in weights.items():
        if not is_number(weight) or weight < 0:
            raise UserError(f"{mend}; {aspect} has {weight!r}")
    if not any(weights.values()):
        raise UserError(f"{mend}; all are 0")


def is_number(value: Any) -> bool:
    """Whether a value of a configuration is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mean(response: Response, aspects: Sequence[str]) -> float:
    if not aspects:
        return math.nan
    total = 0.0
    for aspect in aspects:  # one after another: sum() rounds differently from Python 3.12 on
        total += response.ratings.get(aspect, math.nan)
    return total / len(aspects)
