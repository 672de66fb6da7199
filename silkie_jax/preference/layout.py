"""The rows of a corpus, laid out once: their sizes, which a plan needs, and their tokens, which every epoch needs.

Both are kept beside the corpus, `rows/KEY.npy` and `rows/KEY.tokens`, under a hash of all that they depend on. Laying
out 80k instructions takes about a minute and 300 MB; reading them back costs next to nothing, so that the threads which
prepare batches have their time for decoding images.
"""

import filecmp
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from silkie_jax.corpus import CorpusReader, Record
from silkie_jax.preference.rows import Row, RowTooLong, pack_row, packed_length, unpack_row

UNUSABLE, TOO_LONG = -1, 0  # in the place of a row's tokens: nothing to train on; images that leave no room for a reply
SIZES = ("tokens", "labels", "pairs", "images", "branches", "cut")
VIEW_SIZES = ("spans", "segments")  # further columns, where a row has views: the row's <img>; prompts (0: no views)
_AT_ONCE = 256  # records that a thread lays out at once


def row_sizes(row: Row) -> tuple[int, ...]:
    """SIZES and VIEW_SIZES of a row; `cut` counts the tokens that its length limit left out."""
    cut = row.dropped_prompt + sum(row.dropped_responses)
    views = len(row.spans), row.segments if row.views else 0
    return len(row.tokens), len(row.labels), len(row.pairs), len(row.images), len(row.responses), cut, *views


class Layout:
    """The rows of all records of a corpus.

    Attributes:
        sizes: [R, 6], SIZES of each record's row; UNUSABLE or TOO_LONG in the place of the tokens where it has none.
            [R, 8], VIEW_SIZES beside them, where a row has views.
    """

    def __init__(self, sizes: Int[np.ndarray, "R S"], tokens: Int[np.ndarray, " Z"] | None):
        self.sizes, self._tokens = sizes, tokens
        self._starts = np.concatenate([[0], np.cumsum(_packed_lengths(sizes))])

    @property
    def has_rows(self) -> bool:
        """Whether the rows themselves are at hand, and not only their sizes."""
        return self._tokens is not None

    def row(self, index: int, name: str, images: Iterable[bytes]) -> Row:
        """Record number `index`'s row; `name` and `images` are the record's."""
        assert self._tokens is not None
        return unpack_row(self._tokens[self._starts[index] : self._starts[index + 1]], name, tuple(images))


def lay_out(
    corpus: CorpusReader, make: Callable[[Record], Row | None], key: dict[str, object], workers: int = 2
) -> Layout:
    """All rows of a corpus as `make` lays them out (None: it is unusable), from an earlier time under the same `key`.

    Where the corpus's folder cannot be written, nothing is kept and the sizes alone are found.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    file = corpus.path / "rows" / f"{name}.npy"
    found = _load(file, len(corpus))
    if found is not None:
        return found
    sizes = None
    try:
        file.parent.mkdir(exist_ok=True)
        with published(file.with_suffix(".tokens")) as tokens:
            sizes = _measure(corpus, make, workers, tokens.write)
        with published(file) as table:
            np.save(table, sizes)
    except OSError:  # a corpus on a read-only or full disk is as good as another
        return Layout(_measure(corpus, make, workers, lambda data: None) if sizes is None else sizes, None)
    return _load(file, len(corpus)) or Layout(sizes, None)


@contextmanager
def published(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which then appears at `path` as a whole.

    Several hosts may do this at once on a disk that they share, each with the same bytes. The first one's file stays:
    others may have opened it already, and a file server would take it away from under them. Only a file of other bytes
    gives way, since it is damaged.
    """
    descriptor, name = tempfile.mkstemp(".tmp", f"{path.name}.", path.parent)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)
            yield file
            file.flush()
            os.fsync(descriptor)
        try:
            os.link(name, path)
        except OSError:  # there is one already, or the file system has no links
            if not (path.exists() and filecmp.cmp(name, path, shallow=False)):
                os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _measure(
    corpus: CorpusReader, make: Callable[[Record], Row | None], workers: int, write: Callable[[bytes], object]
) -> Int[np.ndarray, "R S"]:
    """The sizes of every record's row; the rows themselves, packed, are written one after the other."""
    table = np.zeros((len(corpus), len(SIZES + VIEW_SIZES)), np.int32)

    def fill(first: int) -> tuple[int, bytes]:
        some = range(first, min(first + _AT_ONCE, len(corpus)))
        packed = []
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
                packed.append(pack_row(row))
        return len(some), b"".join(row.tobytes() for row in packed)

    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(corpus), desc="rows", unit="row", leave=False, disable=len(corpus) < 4096) as bar,
    ):
        for count, data in _in_order(pool, fill, range(0, len(corpus), _AT_ONCE), 2 * workers):
            write(data)
            bar.update(count)
    return table if table[:, -1].any() else table[:, : len(SIZES)].copy()


def _in_order(
    pool: ThreadPoolExecutor, call: Callable[[int], tuple[int, bytes]], items: Iterable[int], ahead: int
) -> Iterator[tuple[int, bytes]]:
    """Like `pool.map`, which would have all outcomes in memory at once."""
    pending = []
    for item in items:
        pending.append(pool.submit(call, item))
        if len(pending) > ahead:
            yield pending.pop(0).result()
    for future in pending:
        yield future.result()


def _packed_lengths(sizes: Int[np.ndarray, "R S"]) -> Int[np.ndarray, " R"]:
    tokens, _, pairs, images, branches, _, *views = sizes.astype(np.int64).T
    return np.where(tokens > 0, packed_length(tokens, branches, pairs, images, *views), 0)


def _load(file: Path, records: int) -> Layout | None:
    try:
        sizes = np.load(file)
        if sizes.shape not in ((records, len(SIZES)), (records, len(SIZES + VIEW_SIZES))):
            return None
        path, length = file.with_suffix(".tokens"), int(_packed_lengths(sizes).sum())
        if path.stat().st_size != 4 * length:
            return None
        return Layout(sizes, np.memmap(path, np.int32, "r") if length else np.zeros(0, np.int32))
    except (OSError, ValueError, EOFError):
        return None
