"""Which records make up which step: fixed by (seed, step) and the records' sizes alone, whoever and however many ask.

An epoch is a permutation of the records. Within windows of it records are sorted by length and cut into steps, and the
steps are shuffled again: rows of a step are then of like length, so that little of a batch is padding, and a step is
still a near-random sample. (Padding shuffled data fills half of a batch only.)
"""

import bisect
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from silkie_jax.corpus import CorpusReader, Record
from silkie_jax.preference.rows import Row, RowTooLong

WINDOW = 64  # steps that are sorted by length together
UNUSABLE, TOO_LONG = -1, 0  # in the place of a row's tokens: nothing to train on; images that leave no room for a reply
SIZES = ("tokens", "labels", "pairs", "images", "branches", "cut")


def row_sizes(row: Row) -> tuple[int, ...]:
    """SIZES of a row; `cut` counts the tokens that its length limit left out."""
    cut = row.dropped_prompt + sum(row.dropped_responses)
    return len(row.tokens), len(row.labels), len(row.pairs), len(row.images), len(row.responses), cut


def measure(
    corpus: CorpusReader, make: Callable[[Record], Row | None], key: dict[str, object], workers: int = 2
) -> Int[np.ndarray, "R 6"]:
    """SIZES of every record's row; UNUSABLE (`make` gave None) or TOO_LONG stands in the place of the tokens.

    Laying out all rows takes about a minute for 80k instructions, so the outcome is kept beside the corpus under what
    it depends on, `key`; where the folder cannot be written it is measured again.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    cache = corpus.path / "sizes" / f"{name}.npy"
    known = _load(cache, len(corpus))
    if known is not None:
        return known
    table = np.zeros((len(corpus), len(SIZES)), np.int32)

    def fill(first: int) -> int:
        some = range(first, min(first + 256, len(corpus)))
        for i, record in zip(some, corpus.batch(some), strict=True):
            try:
                row = make(record)
            except RowTooLong:
                table[i, 0] = TOO_LONG
                continue
            if row is None:
                table[i, 0] = UNUSABLE
            else:
                table[i] = row_sizes(row)
        return len(some)

    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(corpus), desc="row lengths", unit="row", leave=False, disable=len(corpus) < 4096) as bar,
    ):
        for count in pool.map(fill, range(0, len(corpus), 256)):
            bar.update(count)
    _store(cache, table)
    return table


def _load(path: Path, records: int) -> np.ndarray | None:
    try:
        table = np.load(path)
    except (OSError, ValueError):
        return None
    return table if table.shape == (records, len(SIZES)) else None


def _store(path: Path, table: np.ndarray) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.tmp")
        with part.open("wb") as file:
            np.save(file, table)
        os.replace(part, path)
    except OSError:  # a corpus on a read-only disk is as good as another
        return


class Plan:
    """The steps of a run.

    Args:
      sizes: SIZES of each record that is trained on, [I, 6].
      rows: most instructions of a step.
      pairs: most pairs of a step; None: not limited. A row's pairs stay together.
      seed: of the order; None: the records' own order, unsorted.
    """

    def __init__(self, sizes: Int[np.ndarray, "I 6"], rows: int, pairs: int | None = None, seed: int | None = 0):
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
