"""What the comparisons share: numbers within tolerances, and choices that must be the same."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def close(what: str, ours: ArrayLike, theirs: ArrayLike, *, rtol: float = 0.0, atol: float = 0.0) -> Iterator[str]:
    """One line if any number is further from theirs than atol + rtol x |theirs|, or the shapes differ."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape:
        yield f"{what}: shape {list(a.shape)} is not {list(b.shape)}"
        return
    wrong = ~(np.abs(a - b) <= atol + rtol * np.abs(b))
    if wrong.any():
        worst = np.unravel_index(np.argmax(np.where(wrong, np.nan_to_num(np.abs(a - b), nan=np.inf), -1)), a.shape)
        at = f" at {list(map(int, worst))}" if a.shape else ""
        yield f"{what}: {a[worst]:.9g} is not {b[worst]:.9g}{at} ({int(wrong.sum())} of {a.size} differ)"


def same(what: str, ours: Any, theirs: Any) -> Iterator[str]:
    """One line if the two are not equal."""
    if ours != theirs:
        yield f"{what}: {_short(ours)} is not {_short(theirs)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
