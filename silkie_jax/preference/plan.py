"""Which records make up which step: fixed by (seed, step) and the records' sizes alone, whoever and however many ask.

An epoch is a permutation of the records. Within windows of it records are sorted by length and cut into steps, and the
steps are shuffled again: rows of a step are then of like length, so that little of a batch is padding, and a step is
still a near-random sample. (Padding shuffled data fills half of a batch only.)
"""

import bisect
import threading
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

WINDOW = 64  # steps that are sorted by length together


class Plan:
    """The steps of a run.

    Args:
      sizes: SIZES (layout.py) of each record that is trained on, [I, 6]; with VIEW_SIZES [I, 8].
      rows: most instructions of a step.
      pairs: most pairs of a step; None: not limited. A row's pairs stay together.
      seed: of the order; None: the records' own order, unsorted.
    """

    def __init__(self, sizes: Int[np.ndarray, "I S"], rows: int, pairs: int | None = None, seed: int | None = 0):
        self.sizes, self.rows, self.pairs, self.seed = sizes, rows, pairs, seed
        self._lock = threading.Lock()
        self._starts = [0]  # the first step of each epoch seen so far, and of the next one
        self._epochs: dict[int, list[np.ndarray]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch (with a limit on pairs, others may differ by a few)."""
        return len(self.epoch(0))

    def epoch(self, number: int) -> list[Int[np.ndarray, "R"]]:
        """The records of each step of an epoch, as rows of `sizes`; every record once."""
        if number not in self._epochs:
            if len(self._epochs) > 1:  # the one under way and the next are enough
                self._epochs.clear()
            self._epochs[number] = self._order(number)
        return self._epochs[number]

    def records(self, step: int) -> Int[np.ndarray, "R"]:
        """The records of step number `step` (from 0) of the run."""
        with self._lock:  # several threads prepare batches
            while step >= self._starts[-1]:
                self._starts.append(self._starts[-1] + len(self.epoch(len(self._starts) - 1)))
            number = bisect.bisect_right(self._starts, step) - 1
            return self.epoch(number)[step - self._starts[number]]

    def steps_of(self, epochs: float) -> int:
        """Steps of so many epochs."""
        whole = int(epochs)
        steps = sum(len(self.epoch(number)) for number in range(whole))
        return max(1, steps + round((epochs - whole) * len(self.epoch(whole))))

    def _order(self, number: int) -> list[np.ndarray]:
        count = len(self.sizes)
        if self.seed is None:
            return list(self._cut(np.arange(count)))
        random = np.random.default_rng((self.seed, number))
        order = random.permutation(count)
        steps: list[np.ndarray] = []
        for first in range(0, count, WINDOW * self.rows):
            some = order[first : first + WINDOW * self.rows]
            steps += self._cut(some[np.argsort(self.sizes[some, 0], kind="stable")])
        return [steps[i] for i in random.permutation(len(steps))]

    def _cut(self, order: Int[np.ndarray, "R"]) -> Iterator[Int[np.ndarray, "R"]]:
        start, pairs = 0, 0
        for i, record in enumerate(order):
            more = int(self.sizes[record, 2])
            if i - start == self.rows or (self.pairs is not None and i > start and pairs + more > self.pairs):
                yield order[start:i]
                start, pairs = i, 0
            pairs += more
        if start < len(order):
            yield order[start:]
