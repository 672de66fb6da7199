"""Corpus records -> rows -> batches of one step, the same whoever asks (see plan.py and grid.py).

Every host lays out the text of all sequences of a step (cheap, and all must agree on the padded lengths) and decodes
the images of its own rows only.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from silkie_jax.corpus import CorpusReader, Record
from silkie_jax.corpus.imitation import Imitate, imitated
from silkie_jax.corpus.pairs import Rule, pairs
from silkie_jax.models.qwen_vl.image import read_image
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.nn.attention import PADDING, ROW
from silkie_jax.preference.condition import Attributes
from silkie_jax.preference.counts import Work, response_lengths, row_work
from silkie_jax.preference.grid import Grid, Shape
from silkie_jax.preference.layout import Layout
from silkie_jax.preference.rows import ROW_FORM, Row, make_row

Arrays = dict[str, np.ndarray]
ReferenceLogps = Callable[[int, Sequence[int]], Float[np.ndarray, "K"]]
"""From a record's index and its responses to their stored log-probabilities."""


class Features(Protocol):
    """From an image file's bytes to its stored features, of one shape and type."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __call__(self, image: bytes) -> Float[np.ndarray, "256 W"]: ...


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's input: `arrays` go to the devices, the rest is for people.

    arrays: [A, B, ...], A accumulated batches of B sequences, each a row or several packed ones:
      tokens, positions, branches int32 [A, B, T]   (branch -1: padding; see attention.branch_mask)
      predecessors, labels, label_branches int32 [A, B, N]   (label branches count from 1; 0: padding)
      pairs int32 [A, B, P, 2], pair_mask bool [A, B, P]   (branches of the sequence, from 0)
      images uint8 [A, B, M, S, S, 3]   (absent where no row has an image)
      features [A, B, M, 256, W]   (in their place where features are stored)
      spans int32 [A, B, I]   (which image stands at each <img>; only where rows have views, else each in order)
      reference_logps float32 [A, B, K]   (only with a stored reference)
      reference_null_logps float32 [A, B, K]   (the same under the null image, where a loss needs it)
      pair_order int32 [A, B, P]   (where it matters: numbers the step's pairs as the plan has them, whatever the grid)
    """

    arrays: Arrays
    ids: list[str]
    work: Work
    shape: Shape


@dataclasses.dataclass(frozen=True)
class RowOptions:
    """What a record's row holds: both responses of each pair (dpo), or those that are imitated (sft).

    Attributes:
        rule: which responses are compared; None where `imitate` needs no pairs.
        imitate: of sft: `all` responses, the `chosen` ones or the `best` (corpus/imitation.py).
        condition: of sft: what each response's question says of it; a response of which it cannot is left out.
    """

    rule: Rule | None
    objective: str = "dpo"
    max_length: int = 2048
    max_prompt_length: int | None = None
    imitate: Imitate = "chosen"
    condition: Attributes | None = None

    def row(self, tokenizer: Tokenizer, record: Record) -> Row | None:
        """The record's row; None where it has nothing to train on.

        Raises:
          RowTooLong: its images leave no room for a response.
        """
        found = pairs(record, self.rule) if self.rule is not None else []
        responses = imitated(record, self.imitate, found) if self.objective == "sft" else None
        conditions = None
        if self.condition is not None and responses is not None:
            said = {index: self.condition.of(record.responses[index].ratings) for index in responses}
            conditions = {index: text for index, text in said.items() if text is not None}
            responses = list(conditions)
        if not (found if responses is None else responses):
            return None
        return make_row(
            tokenizer,
            record,
            found if responses is None else (),
            responses=responses,
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            conditions=conditions,
        )

    def key(self, corpus: CorpusReader, tokenizer: Tokenizer) -> dict[str, object]:
        """All that rows depend on."""
        about = {"corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint, "form": ROW_FORM}
        own = dataclasses.asdict(self)
        if self.imitate == "chosen":  # so that rows which versions without this choice kept are found
            del own["imitate"]
        del own["condition"]
        if self.condition is not None:
            own["condition"] = self.condition.asked
        return {**about, **own}


class BatchSource:
    """The batches of a run by step number.

    Args:
      indices: the corpus records of the grid's plan.
      grid: which of them make up each step, and in which forward passes.
      local: says which of so many sequences this host's devices hold (None: all). Others get no pixels.
      reference: stored log-probabilities, where they are used.
      features: stored features of the images, where they are used; then no image is decoded.
      layout: the rows, where they are kept; otherwise they are laid out again.
    """

    def __init__(
        self,
        corpus: CorpusReader,
        indices: Int[np.ndarray, "I"],
        grid: Grid,
        tokenizer: Tokenizer,
        options: RowOptions,
        *,
        image_size: int,
        local: Callable[[int], Bool[np.ndarray, "B"]] | None = None,
        reference: ReferenceLogps | None = None,
        features: Features | None = None,
        layout: Layout | None = None,
    ):
        self.corpus, self.indices, self.grid = corpus, indices, grid
        self.tokenizer, self.options, self.reference, self.features = tokenizer, options, reference, features
        self.null_reference: ReferenceLogps | None = None  # its log-probabilities under the null image
        self.numbers_pairs = False
        self.image_size, self.layout = image_size, layout
        self.local = local or (lambda count: np.ones(count, bool))

    @property
    def steps_per_epoch(self) -> int:
        return self.grid.plan.steps_per_epoch

    def batch(self, step: int) -> Batch:
        """Reads, lays out and decodes one step."""
        shape = self.grid.shape(step)
        groups = [group for batch in self.grid.batches(step) for group in batch]
        wanted = [int(self.indices[i]) for group in groups for i in group]
        made = iter(self._rows(wanted))
        rows = [[next(made) for _ in group] for group in groups]
        flat = collate(rows, shape, self.tokenizer.end_of_text)
        local = np.tile(self.local(shape.sequences), shape.batches)
        if self.features is None:
            flat |= decode_images(rows, shape.images, self.image_size, local)
        else:
            flat |= read_features(rows, shape.images, self.features, local)
        for name, known in (("reference_logps", self.reference), ("reference_null_logps", self.null_reference)):
            if known is not None:
                flat[name] = self._stored(known, groups, rows, shape)
        if self.numbers_pairs:
            flat["pair_order"] = _pair_order(self.grid.plan.records(step).tolist(), groups, rows, shape)
        arrays = {k: v.reshape(shape.batches, shape.sequences, *v.shape[1:]) for k, v in flat.items()}
        work = sum((_work(row) for group in rows for row in group), Work())
        return Batch(arrays, [row.id for group in rows for row in group], work, shape)

    def _stored(
        self, known: ReferenceLogps, groups: list[list[int]], rows: list[list[Row]], shape: Shape
    ) -> Float[np.ndarray, "G K"]:
        """Stored log-probabilities of every branch."""
        out = np.zeros((len(groups), shape.branches), np.float32)
        for values, group, laid_out in zip(out, groups, rows, strict=True):
            found = [known(int(self.indices[i]), row.responses) for i, row in zip(group, laid_out, strict=True)]
            values[: sum(map(len, found))] = np.concatenate([*found, []])
        return out

    def iterate(self, start: int, stop: int, workers: int = 2) -> Iterator[Batch]:
        """The batches of steps start..stop-1, prepared ahead by threads."""
        import grain

        steps = grain.MapDataset.source(range(start, stop)).map(self.batch)
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
        return iter(steps.to_iter_dataset(options))

    def texts(self, most: int) -> Iterator[Row]:
        """Rows of at most so many records, evenly spread over the source's, without images where rows are kept."""
        some = self.indices[np.linspace(0, len(self.indices) - 1, min(most, len(self.indices)), dtype=int)].tolist()
        if self.layout is None or not self.layout.has_rows:
            yield from self._rows(some)
            return
        for index in some:
            yield self.layout.row(index, self.corpus.index[index].id, ())

    def _rows(self, indices: list[int]) -> list[Row]:
        """Rows of these records of the corpus."""
        if self.layout is not None and self.layout.has_rows:
            found = zip(indices, self.corpus.images(indices), strict=True)
            return [self.layout.row(i, self.corpus.index[i].id, images) for i, images in found]
        rows = []
        for record in self.corpus.batch(indices):
            row = self.options.row(self.tokenizer, record)
            assert row is not None, f"record {record.id} was usable when it was measured"
            rows.append(row)
        return rows


def _work(row: Row) -> Work:
    segments = [row_work(*lengths, labels=0, images=0) for lengths in response_lengths(row.branches)]
    own = {"rows": 1, "labels": len(row.labels), "images": len(row.images), "pairs": len(row.pairs)}
    return dataclasses.replace(sum(segments, Work()), **own)


def _pair_order(
    records: list[int], groups: list[list[int]], rows: list[list[Row]], shape: Shape
) -> Int[np.ndarray, "G P"]:
    """Numbers pairs in the order of `records`, which is that of the plan; -1 where there is no pair."""
    laid_out = (pair for group, made in zip(groups, rows, strict=True) for pair in zip(group, made, strict=True))
    counts = {i: len(row.pairs) for i, row in laid_out}
    first = dict(zip(records, np.cumsum([0, *(counts[i] for i in records)]).tolist(), strict=False))
    out = np.full((len(groups), shape.pairs), -1, np.int32)
    for numbers, group in zip(out, groups, strict=True):
        found = [first[i] + n for i in group for n in range(counts[i])]
        numbers[: len(found)] = found
    return out


def collate(groups: Sequence[Sequence[Row]], shape: Shape, pad: int) -> Arrays:
    """Rows padded to common lengths, [G, ...]: a group of rows is packed into one sequence, an empty one is padding."""
    count = len(groups)
    out: Arrays = {
        "tokens": np.full((count, shape.tokens), pad, np.int32),
        "positions": np.zeros((count, shape.tokens), np.int32),
        "branches": np.full((count, shape.tokens), PADDING, np.int32),
        "predecessors": np.zeros((count, shape.labels), np.int32),
        "labels": np.zeros((count, shape.labels), np.int32),
        "label_branches": np.zeros((count, shape.labels), np.int32),
        "pairs": np.zeros((count, shape.pairs, 2), np.int32),
        "pair_mask": np.zeros((count, shape.pairs), bool),
    }
    if shape.spans:
        out["spans"] = np.zeros((count, shape.spans), np.int32)
    for i, group in enumerate(groups):
        token = label = pair = branch = segment = image = span = 0
        for row in group:
            assert len(row.responses) < ROW, row.id  # `make_row` sees to it
            at = slice(token, token + len(row.tokens))
            out["tokens"][i, at] = row.tokens
            out["positions"][i, at] = row.positions
            out["branches"][i, at] = row.branches + segment * ROW
            at = slice(label, label + len(row.labels))
            out["predecessors"][i, at] = row.predecessors + token
            out["labels"][i, at] = row.labels
            out["label_branches"][i, at] = row.label_branches + branch
            at = slice(pair, pair + len(row.pairs))
            out["pairs"][i, at] = row.pairs + branch
            out["pair_mask"][i, at] = True
            if shape.spans:
                out["spans"][i, span : span + len(row.spans)] = np.array(row.spans, np.int32) + image
            token, label = token + len(row.tokens), label + len(row.labels)
            pair, branch, segment = pair + len(row.pairs), branch + len(row.responses), segment + row.segments
            image, span = image + len(row.images), span + len(row.spans)
    return out


def decode_images(
    groups: Sequence[Sequence[Row]], most: int, size: int, wanted: Bool[np.ndarray, "G"] | None = None
) -> dict[str, UInt8[np.ndarray, "G M S S 3"]]:
    """`images` for the model: each sequence's own, filled up to `most` with black; nothing where there are none.

    `wanted` says which sequences' pixels this host needs (None: all).
    """
    if not most:
        return {}
    pixels = np.zeros((len(groups), most, size, size, 3), np.uint8)
    for place, row, number, data in _images_of(groups, wanted):
        pixels[place] = read_image(data, size, name=f"corpus record {row.id!r}, image {number}")
    return {"images": pixels}


def read_features(
    groups: Sequence[Sequence[Row]], most: int, features: Features, wanted: Bool[np.ndarray, "G"] | None = None
) -> dict[str, Float[np.ndarray, "G M 256 W"]]:
    """`features` for the model, like `decode_images` but stored, and filled up with zeros."""
    if not most:
        return {}
    values = np.zeros((len(groups), most, *features.shape), features.dtype)
    for place, _, _, data in _images_of(groups, wanted):
        values[place] = features(data)
    return {"features": values}


def _images_of(
    groups: Sequence[Sequence[Row]], wanted: Bool[np.ndarray, "G"] | None
) -> Iterator[tuple[tuple[int, int], Row, int, bytes]]:
    """(place in a batch, its row, its number there from 1, its file) of each image of the sequences that are wanted."""
    for i, group in enumerate(groups):
        if wanted is None or wanted[i]:
            for j, (row, number, data) in enumerate((r, n, d) for r in group for n, d in enumerate(r.images, 1)):
                yield (i, j), row, number, data
