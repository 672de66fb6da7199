"""Rows of a data set as published: JSON lines or parquet, one file or a folder of them; all in order, or by place."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.tables.rejections import Rejected
from silkie_jax.errors import UserError

MAX_LINE = 64 * 2**20  # bytes; a longer line is listed, not read
_PARQUET_BATCH = 64  # rows held at a time; they may carry their images


class Place(NamedTuple):
    """Where a row lies: its file, and there byte offset and length (JSON lines) or row group and index (parquet)."""

    file: int
    start: int
    extent: int


@dataclass(frozen=True)
class TableRow:
    """A row as it was found.

    Attributes:
        place: with which `Table.fetch` finds it again.
        line: in its file, from 1.
        digest: a hash of its content: the same however its JSON is spaced and its keys are ordered.
        value: its fields, or why they cannot be read.
        size: in bytes, for progress.
    """

    place: Place
    line: int
    digest: bytes
    value: dict[str, Any] | Rejected
    size: int


class Table:
    """The rows of a file or of all files in a folder (in the order of their names).

    Args:
        path: a .jsonl or .parquet file, or a folder of such files of one kind.

    Raises:
        UserError: it does not exist, or is of another kind.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"there is no file or folder {self.path}")
        if self.path.is_dir():
            self.files = sorted(file for file in self.path.iterdir() if file.suffix in (".jsonl", ".parquet"))
            if not self.files:
                raise UserError(f"the folder {self.path} holds no .jsonl or .parquet file")
        else:
            self.files = [self.path]
        suffixes = {file.suffix for file in self.files}
        if len(suffixes) > 1:
            raise UserError(f"the folder {self.path} mixes .jsonl and .parquet files: name one of them")
        self.titles = [file.name for file in self.files]  # by which people know them
        (self._suffix,) = suffixes
        if self._suffix not in (".jsonl", ".parquet"):
            raise UserError(f"{self.path}: rows are read from .jsonl or .parquet files (unpack or convert it first)")

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)

    def scan(self) -> Iterator[TableRow]:
        """Every row, in order; one at a time is in memory (parquet: a few)."""
        for number, file in enumerate(self.files):
            yield from _scan_parquet(file, number) if self._suffix == ".parquet" else _scan_jsonl(file, number)

    def fetch(self, places: Iterable[Place]) -> Iterator[dict[str, Any]]:
        """The rows at these places, which must be in the order of the input and readable in the scan."""
        by_file: dict[int, list[Place]] = {}
        for place in places:
            by_file.setdefault(place.file, []).append(place)
        for number, wanted in by_file.items():
            file = self.files[number]
            yield from _fetch_parquet(file, wanted) if self._suffix == ".parquet" else _fetch_jsonl(file, wanted)

    def fetch_all(self, places: Sequence[Place]) -> list[dict[str, Any] | Rejected]:
        """As `fetch`, of rows that need not have been readable: what cannot be read says why."""
        found: list[dict[str, Any] | Rejected] = []
        for place in places:
            if self._suffix == ".parquet":
                return list(self.fetch(places))  # every row of it could be read
            try:
                found += self.fetch([place])
            except Rejected as why:
                found.append(why)
        return found


def _scan_jsonl(path: Path, number: int) -> Iterator[TableRow]:
    offset = 0
    line = 0
    with open(path, "rb") as file:
        while data := file.readline(MAX_LINE + 1):
            line += 1
            start = offset
            offset += len(data)
            value: dict[str, Any] | Rejected
            if len(data) > MAX_LINE:
                while data and not data.endswith(b"\n"):
                    data = file.readline(MAX_LINE)
                    offset += len(data)
                value = Rejected("malformed JSON", f"a line of more than {MAX_LINE} bytes")
            elif not data.strip():
                continue
            else:
                try:
                    value = _parse_line(data)
                except Rejected as rejected:
                    value = rejected
            digest = _digest(data.strip()) if isinstance(value, Rejected) else _content_digest(value)
            yield TableRow(Place(number, start, offset - start), line, digest, value, offset - start)


def _fetch_jsonl(path: Path, places: list[Place]) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for place in places:
            file.seek(place.start)
            yield _parse_line(file.read(place.extent))


def _parse_line(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, or a number of absurd length
        raise Rejected("malformed JSON", error) from error
    if not isinstance(value, dict):
        raise Rejected("malformed JSON", f"an object is expected, not {type(value).__name__}")
    return value


def _scan_parquet(path: Path, number: int) -> Iterator[TableRow]:
    parquet = _open_parquet(path)
    size = path.stat().st_size // max(parquet.metadata.num_rows, 1)
    line = 0
    for group in range(parquet.num_row_groups):
        for index, value in enumerate(_rows_of_group(parquet, path, group)):
            line += 1
            yield TableRow(Place(number, group, index), line, _content_digest(value), value, size)


def _fetch_parquet(path: Path, places: list[Place]) -> Iterator[dict[str, Any]]:
    parquet = _open_parquet(path)
    for group in sorted({place.start for place in places}):
        wanted = {place.extent for place in places if place.start == group}
        for index, value in enumerate(_rows_of_group(parquet, path, group)):
            if index in wanted:
                yield value
            if index >= max(wanted):
                break


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install 'silkie-jax[data]'") from None
    try:
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is not a readable parquet file ({' '.join(str(error).split())})") from error


def _rows_of_group(parquet: Any, path: Path, group: int) -> Iterator[dict[str, Any]]:
    import pyarrow

    try:
        for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH, row_groups=[group]):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: row group {group} cannot be read ({' '.join(str(error).split())})") from error


def _content_digest(value: dict[str, Any]) -> bytes:
    return _digest(json.dumps(value, default=_parquet_value, sort_keys=True).encode())


def _parquet_value(value: object) -> str:
    """Stands for values that JSON does not have: image bytes by their hash, dates and decimals by their text."""
    return _digest(value).hex() if isinstance(value, bytes) else str(value)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
