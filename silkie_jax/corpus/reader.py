"""Reading a corpus: its records at random, its index, and a clear word when it is unfinished or damaged."""

import functools
import hashlib
import json
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex, TypeVar

from silkie_jax.corpus import schema, shards
from silkie_jax.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class IndexRow:
    """One record without its images: its id and the SHA-256 of its prompt, its image files and its stored bytes."""

    id: str
    prompt_sha256: str
    image_sha256: tuple[str, ...]
    record_sha256: str


@dataclass(frozen=True)
class _FileInstruction:
    """Tells array_record how many records a file has, so that opening a corpus touches no shard."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class CorpusReader:
    """A finished corpus as a sequence of records. Safe to share between threads and to send to other processes.

    Args:
        path: the corpus folder.

    Attributes:
        path: the corpus folder.
        name: the data set's name.
        fingerprint: a hash of all records in order; equal for equal content, however it is cut into shards.
        aspects: the names of the aspects that responses are rated for.
        summary: what the import counted (a dict).

    Raises:
        UserError: the folder is missing, unfinished, of another version, or a shard is missing or cut short.
    """

    def __init__(self, path: str | os.PathLike[str]):
        schema.codec()  # tfds imports its parts as they are used; two threads that did so would wait for each other
        self.path = Path(path)
        manifest = read_manifest(self.path)
        self.name: str = manifest["name"]
        self.fingerprint: str = manifest["fingerprint"]
        self.aspects: tuple[str, ...] = tuple(manifest.get("aspects", ()))
        self._length: int = manifest["records"]
        self._shards = [shards.Shard(**shard) for shard in manifest["shards"]]
        for shard in self._shards:
            file = self.path / shard.file
            size = file.stat().st_size if file.is_file() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
                raise self._damaged(f"{shard.file} {found}")

    def __reduce__(self) -> Any:
        return CorpusReader, (self.path,)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsIndex) -> schema.Record:
        return self.batch([index])[0]

    def __iter__(self) -> Iterator[schema.Record]:
        for index in range(len(self)):
            yield self[index]

    def batch(self, indices: Sequence[SupportsIndex]) -> list[schema.Record]:
        """Several records at once, in the order asked for; shards are read in parallel."""
        found = zip(self.encoded(indices), indices, strict=True)
        return [self._decode(data, index, schema.from_example) for data, index in found]

    def images(self, indices: Sequence[SupportsIndex]) -> list[tuple[bytes, ...]]:
        """The images alone of several records, as encoded files."""
        found = zip(self.encoded(indices), indices, strict=True)
        return [self._decode(data, index, schema.images_of) for data, index in found]

    def encoded(self, indices: Sequence[SupportsIndex]) -> list[bytes]:
        """The stored bytes of several records (see `schema.from_example`)."""
        positions = [self._position(index) for index in indices]
        try:
            if len(positions) < 2:  # read directly: array_record would start a thread
                return [self._source[position] for position in positions]
            return list(self._source.__getitems__(positions))
        except Exception as error:  # array_record raises whatever its C++ status maps to
            where = f"record {positions[0]}" if len(positions) == 1 else f"one of the records {positions}"
            raise self._damaged(f"{where} cannot be read ({' '.join(str(error).split())})") from error

    @functools.cached_property
    def index(self) -> list[IndexRow]:
        """A row for each record, from `index.jsonl`, or made anew from the records where that file is absent."""
        path = self.path / shards.INDEX
        if not path.exists():
            lines = (
                shards.index_line(schema.from_example(data), data)
                for i in range(len(self))
                for data in self.encoded([i])
            )
            return [_index_row(line) for line in lines]
        with open(path, encoding="utf-8") as file:
            rows = [_index_row(json.loads(line)) for line in file]
        if shards.fingerprint(row.record_sha256 for row in rows) != self.fingerprint:
            raise UserError(f"{path} does not belong to this corpus: remove it and it will be made anew")
        return rows

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """What the import counted, as saved in `summary.json`; empty where there is none."""
        path = self.path / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def verify(self) -> None:
        """Reads every shard whole and compares its checksum.

        Raises:
            UserError: a shard differs from what was written.
        """
        for shard in self._shards:
            with open(self.path / shard.file, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    raise self._damaged(f"{shard.file} has changed")

    @functools.cached_property
    def _source(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(
            [_FileInstruction(str(self.path / s.file), 0, s.records, s.records) for s in self._shards if s.records]
        )

    def _position(self, index: SupportsIndex) -> int:
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"record {position} of a corpus of {len(self)}")
        return position % len(self)

    def _decode(self, data: bytes, index: SupportsIndex, read: Callable[[bytes], T]) -> T:
        try:
            return read(data)
        except ValueError as error:
            raise self._damaged(f"record {operator.index(index)} is {error}") from error

    def _damaged(self, what: str) -> UserError:
        return UserError(f"corpus {self.path} is damaged: {what}; copy it again or import it anew")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished corpus.

    Raises:
        UserError: there is none, or it is unfinished, of another version, or unreadable.
    """
    file = path / shards.MANIFEST
    if not path.is_dir():
        raise UserError(f"there is no corpus at {path}: make one with `silkie corpus import` or `build`")
    if not file.exists():
        if (path / shards.BUILDING).exists():
            raise UserError(f"the corpus at {path} is unfinished: rerun the same `silkie corpus import` to complete it")
        raise UserError(
            f"{path} is not a corpus: it has no {shards.MANIFEST}; make one with `silkie corpus import` or `build`"
        )
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): copy the corpus again or import it anew") from error
    known = (shards.FORMAT, shards.FORMAT_VIEWS)
    if found not in known:
        reads = " and ".join(map(str, known))
        raise UserError(f"{file} has format {found}; this version reads formats {reads}: import the corpus anew")
    return manifest


def _index_row(line: dict[str, Any]) -> IndexRow:
    return IndexRow(line["id"], line["prompt_sha256"], tuple(line["image_sha256"]), line["record_sha256"])
