"""Corpus records -> rows -> batches of one step, in an order that depends on (seed, step) alone.

A step's batch is `accumulate` times `rows` instructions. Every host lays out the text of all of them (cheap, and all
must agree on the padded lengths) and decodes the images of its own rows only.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Bool, Int, UInt8
from tqdm import tqdm

from silkie_jax.corpus import CorpusReader, Record
from silkie_jax.corpus.pairs import Rule, pairs
from silkie_jax.errors import UserError
from silkie_jax.preference.rows import Row, RowTooLong, make_row
from silkie_jax.qwen_vl.attention import PADDING
from silkie_jax.qwen_vl.image import read_image
from silkie_jax.qwen_vl.tokenizer import Tokenizer

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's input: `arrays` go to the devices, the rest is for people.

    arrays: [A, B, ...], A accumulated batches of B rows:
      tokens, positions, branches int32 [A, B, T]   (branch -1: padding)
      predecessors, labels, label_branches int32 [A, B, N]   (label branch 0: padding)
      pairs int32 [A, B, P, 2], pair_mask bool [A, B, P]   (branch numbers from 0)
      images uint8 [A, B, M, S, S, 3]   (absent where no row has an image)
    """

    arrays: Arrays
    ids: list[str]
    dropped: dict[str, str]  # id -> why the row is not in the batch
    truncated: dict[str, str]  # id -> what was cut


@dataclasses.dataclass(frozen=True)
class RowOptions:
    """What a record's row holds: both responses of each pair (dpo), or the chosen ones alone (sft)."""

    rule: Rule
    objective: str = "dpo"
    max_length: int = 2048
    max_prompt_length: int | None = None

    def choose(self, record: Record) -> tuple[list[tuple[int, int]], list[int] | None]:
        """(pairs, responses to lay out): for sft the responses that some pair prefers and none rejects."""
        found = pairs(record, self.rule)
        if self.objective == "dpo":
            return found, None
        rejected = {loser for _, loser in found}
        return [], sorted({winner for winner, _ in found} - rejected)

    def usable(self, record: Record) -> bool:
        found, responses = self.choose(record)
        return bool(found or responses)


def usable_records(corpus: CorpusReader, indices: Sequence[int], options: RowOptions) -> np.ndarray:
    """Those of `indices` whose record has something to train on under the pair rule."""
    step = 256
    kept: list[int] = []
    for start in tqdm(
        range(0, len(indices), step), desc="pairs", unit="batch", leave=False, disable=len(indices) < 4096
    ):
        some = [int(i) for i in indices[start : start + step]]
        kept += [i for i, record in zip(some, corpus.batch(some), strict=True) if options.usable(record)]
    return np.asarray(kept, np.int64)


class BatchSource:
    """The batches of a run by step number.

    Args:
      indices: the corpus records to go through, each once an epoch, in an order drawn from (seed, epoch); or in their
        own order, where `seed` is None. An epoch's last batch is filled up with empty rows.
      rows, accumulate: rows of a batch, and batches of a step.
      padded_rows: what a batch is filled up to with empty rows, for a mesh that splits it evenly.
      local: [padded_rows], which of a batch's rows this host's devices hold (None: all). Other rows get no pixels.
    """

    def __init__(
        self,
        corpus: CorpusReader,
        indices: Sequence[int] | Int[np.ndarray, "I"],
        tokenizer: Tokenizer,
        options: RowOptions,
        *,
        image_size: int,
        rows: int,
        padded_rows: int | None = None,
        accumulate: int = 1,
        seed: int | None = 0,
        local: Bool[np.ndarray, "B"] | None = None,
    ):
        self.corpus, self.tokenizer, self.options = corpus, tokenizer, options
        self.indices = np.asarray(indices, np.int64)
        self.image_size, self.rows, self.accumulate, self.seed = image_size, rows, accumulate, seed
        self.padded_rows = padded_rows or rows
        self.local = np.ones(self.padded_rows, bool) if local is None else local
        self.steps_per_epoch = -(-len(self.indices) // (rows * accumulate))

    def record_indices(self, step: int) -> Int[np.ndarray, "R"]:
        """The records of step number `step` (from 0); fewer than a full batch at an epoch's end."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = self.indices
        if self.seed is not None:
            order = order[np.random.default_rng((self.seed, epoch)).permutation(len(order))]
        size = self.rows * self.accumulate
        return order[place * size : (place + 1) * size]

    def batch(self, step: int) -> Batch:
        """Reads, lays out and decodes one step."""
        records = self.corpus.batch(self.record_indices(step).tolist())
        rows: list[Row | None] = []
        dropped, truncated = {}, {}
        for record in records:
            try:
                row = self._row(record)
            except RowTooLong as e:
                row = None
                dropped[record.id] = str(e)
            if row is not None and row.truncated:
                truncated[record.id] = _cut(row)
            rows.append(row)
        grid: list[Row | None] = []
        for first in range(0, self.rows * self.accumulate, self.rows):
            some = rows[first : first + self.rows]
            grid += some + [None] * (self.padded_rows - len(some))
        flat = collate(grid, self.tokenizer.end_of_text)
        flat |= decode_images(grid, self.image_size, np.tile(self.local, self.accumulate))
        arrays = {k: v.reshape(self.accumulate, self.padded_rows, *v.shape[1:]) for k, v in flat.items()}
        return Batch(arrays, [record.id for record in records], dropped, truncated)

    def iterate(self, start: int, stop: int, workers: int = 2) -> Iterator[Batch]:
        """The batches of steps start..stop-1, prepared ahead by threads."""
        steps = grain.MapDataset.source(range(start, stop)).map(self.batch)
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
        return iter(steps.to_iter_dataset(options))

    def _row(self, record: Record) -> Row:
        chosen, responses = self.options.choose(record)
        limits = {"max_length": self.options.max_length, "max_prompt_length": self.options.max_prompt_length}
        return make_row(self.tokenizer, record, chosen, responses=responses, **limits)


def decode_images(
    rows: Sequence[Row | None], size: int, wanted: Bool[np.ndarray, "R"] | None = None
) -> dict[str, UInt8[np.ndarray, "R M S S 3"]]:
    """`images` for the model: each row's own, filled up with black; nothing where no row has an image.

    `wanted` says which rows' pixels this host needs (None: all).
    """
    most = max((len(row.images) for row in rows if row), default=0)
    if not most:
        return {}
    pixels = np.zeros((len(rows), most, size, size, 3), np.uint8)
    for i, row in enumerate(rows):
        if row is None or not (wanted is None or wanted[i]):
            continue
        for j, data in enumerate(row.images):
            try:
                pixels[i, j] = read_image(data, size)
            except UserError as e:
                raise UserError(f"corpus record {row.id!r}, image {j + 1}: {e}; import the corpus anew") from None
    return {"images": pixels}


def _cut(row: Row) -> str:
    of_responses = sum(row.dropped_responses)
    return f"left out {row.dropped_prompt} tokens of the prompt and {of_responses} of the responses"


def collate(rows: Sequence[Row | None], pad: int) -> Arrays:
    """Rows padded to common lengths, [R, ...]; None is an empty row, which no loss sees.

    Lengths are rounded up to few sizes, so that few shapes are compiled.
    """
    present = [row for row in rows if row is not None]
    length = bucket(max((len(row.tokens) for row in present), default=1))
    labels = bucket(max((len(row.labels) for row in present), default=1))
    pair_count = -(-max([1, *(len(row.pairs) for row in present)]) // 6) * 6
    count = len(rows)
    out: Arrays = {
        "tokens": np.full((count, length), pad, np.int32),
        "positions": np.zeros((count, length), np.int32),
        "branches": np.full((count, length), PADDING, np.int32),
        "predecessors": np.zeros((count, labels), np.int32),
        "labels": np.zeros((count, labels), np.int32),
        "label_branches": np.zeros((count, labels), np.int32),
        "pairs": np.zeros((count, pair_count, 2), np.int32),
        "pair_mask": np.zeros((count, pair_count), bool),
    }
    for i, row in enumerate(rows):
        if row is None:
            continue
        for name in ("tokens", "positions", "branches", "predecessors", "labels", "label_branches", "pairs"):
            values = getattr(row, name)
            out[name][i, : len(values)] = values
        out["pair_mask"][i, : len(row.pairs)] = True
    return out


def bucket(n: int) -> int:
    """The next of 64, 128, 192, 256, 384, 512, 640, ..."""
    step = 64 if n <= 256 else 128
    return -(-n // step) * step
