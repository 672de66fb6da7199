"""What rows hold, counted without padding: the unit of throughput and of FLOP formulas."""

import dataclasses
import operator
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from silkie_jax.nn.attention import ROW


@dataclasses.dataclass(frozen=True)
class Work:
    """Rows, their tokens, (query, key) pairs that may see each other, labelled tokens, images, pairs, responses."""

    rows: int = 0
    tokens: int = 0
    visible: int = 0
    labels: int = 0
    images: int = 0
    pairs: int = 0
    responses: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(operator.add, vars(self).values(), vars(other).values()))

    def __mul__(self, times: int) -> "Work":
        return Work(*(times * a for a in vars(self).values()))


def row_work(prompt: int, responses: Sequence[int], labels: int, images: int = 1, pairs: int = 0) -> Work:
    """A row with a prompt and responses of these lengths."""
    visible = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in responses)
    return Work(1, prompt + sum(responses), visible, labels, images, pairs, len(responses))


def response_lengths(branches: Int[np.ndarray, "T"]) -> list[tuple[int, list[int]]]:
    """(prompt, responses) lengths of each segment of one row, from its branches."""
    segments = branches // ROW
    counts = [np.bincount(branches[segments == n] - n * ROW).tolist() for n in range(int(segments.max()) + 1)]
    return [(prompt, responses) for prompt, *responses in counts]
