"""Do chosen and rejected responses differ in length? Then preferences teach length too, whatever they are about.

The statistic is r = mean over pairs of log(|y_w| / |y_l|), lengths in labelled tokens. exp(r) is the geometric mean of
the pairs' ratios: a few very long responses do not decide it, and pairs turned round give its inverse.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from silkie_jax.preference.rows import Row

RATIO = "lengths/ratio"  # its name among metrics
FACTOR = 1.2  # a ratio beyond this, or below its inverse, is worth a warning
_ERRORS = 3  # standard errors that it must be away from equal lengths
_LEAST = 30  # instructions without which such errors mean nothing


class Drift(NamedTuple):
    """exp(r), the standard error of r, of how many pairs and instructions, and what lengths are counted in."""

    ratio: float
    error: float
    pairs: int
    instructions: int
    unit: str = "tokens"

    @property
    def matters(self) -> bool:
        """Whether it is large, and not by chance."""
        size = abs(math.log(self.ratio))
        return self.instructions >= _LEAST and size >= max(math.log(FACTOR), _ERRORS * self.error)

    def __str__(self) -> str:
        share = self.ratio if self.ratio > 1 else 1 / self.ratio
        which = ("chosen", "rejected") if self.ratio > 1 else ("rejected", "chosen")
        return (
            f"{which[0]} responses are {share - 1:.0%} longer than {which[1]} ones (by {self.unit}, the geometric mean "
            f"of {self.pairs:,} pairs)"
        )


def measure_drift(rows: Iterable["Row"]) -> Drift:
    """The drift in length between chosen and rejected responses of rows with pairs."""

    def differences() -> Iterable[np.ndarray]:
        for row in rows:
            lengths = np.bincount(row.label_branches, minlength=len(row.responses) + 1)[1:]
            chosen, rejected = np.log(lengths)[row.pairs].T
            yield chosen - rejected

    return drift_of(differences(), "tokens")


def drift_of(differences: Iterable[np.ndarray], unit: str) -> Drift:
    """The drift, from log(|y_w| / |y_l|) of each pair, one array an instruction.

    Pairs of one instruction are not independent: the standard error is that of a ratio of sums over instructions.
    """
    found = [(float(np.sum(some)), len(some)) for some in differences]
    totals, pairs = np.array([total for total, _ in found]), np.array([count for _, count in found])
    if not pairs.sum():
        return Drift(1.0, math.inf, 0, 0, unit)
    mean = totals.sum() / pairs.sum()
    error = math.sqrt(np.square(totals - mean * pairs).sum()) / pairs.sum()
    return Drift(math.exp(mean), error, int(pairs.sum()), int((pairs > 0).sum()), unit)
