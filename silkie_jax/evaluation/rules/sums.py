"""Counts by image, of which every figure is a function: what a figure is computed from, and what a bootstrap draws."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Totals = Mapping[str, Float[np.ndarray, "..."]]
"""Name -> its sum over images, of any common shape: one run, or many resampled ones."""


@dataclass(frozen=True)
class Sums:
    """Counts [images, names] and the figures that follow from their sums.

    Attributes:
        images: names, N.
        names: of the counts, K.
        counts: float64 [N, K].
        formula: sums -> figures, elementwise. Names with "/" are of parts: "tasks/existence".
    """

    images: tuple[str, ...]
    names: tuple[str, ...]
    counts: Float[np.ndarray, "N K"]
    formula: Callable[[Totals], Mapping[str, Float[np.ndarray, "..."]]]

    @classmethod
    def of(
        cls,
        rows: Iterable[tuple[str, Mapping[str, float]]],
        names: Iterable[str],
        formula: Callable[[Totals], Mapping[str, Float[np.ndarray, "..."]]],
    ) -> "Sums":
        """Adds up rows of (image, counts); names that a row leaves out count 0."""
        names = tuple(names)
        column = {name: k for k, name in enumerate(names)}
        table: dict[str, list[float]] = {}
        for image, counts in rows:
            line = table.setdefault(image, [0.0] * len(names))
            for name, value in counts.items():
                line[column[name]] += value
        counts_ = np.array(list(table.values()), np.float64).reshape(len(table), len(names))
        return cls(tuple(table), names, counts_, formula)

    def figures(self, weights: Float[np.ndarray, "*draws N"] | None = None) -> dict[str, Float[np.ndarray, "*draws"]]:
        """All figures; with weights those of resampled images, one for each leading index."""
        sums = self.counts.sum(0) if weights is None else weights @ self.counts
        return dict(self.formula({name: sums[..., k] for k, name in enumerate(self.names)}))


def ratio(part: Float[np.ndarray, "..."], whole: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """part / whole; nan where there is nothing to divide by: such a figure is undefined, not 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole != 0)
