"""Writing a corpus: ArrayRecord shards that are whole or absent, and the metadata by which TFDS opens them.

A finished corpus folder:

    NAME-train.array_record-00000-of-00016 ...   the records (`schema.py`), one group each for random access
    dataset_info.json, features.json             what `tfds.builder_from_directory` reads
    index.jsonl                                  a line a record: its id and hashes (derived)
    corpus.json                                  the manifest; written last, so its presence means "complete"
    ...                                          whatever files the caller of `finish` adds (summary, rejections)

While it is being built there is a folder `.building` instead of the manifest: temporary files, and a JSON entry for
each finished shard. A build killed at any moment is run again: shards whose entry and checksum hold are kept,
everything else is removed and redone.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from silkie_jax.corpus import schema
from silkie_jax.durable import sync
from silkie_jax.errors import UserError
from silkie_jax.locks import lock

FORMAT = 1  # raised when a corpus written before can no longer be read
FORMAT_VIEWS = 2  # of one with responses that name their images: versions before that would show them all
MANIFEST = "corpus.json"
INDEX = "index.jsonl"
BUILDING = ".building"
_SHARD_NAME = re.compile(r"[a-z][a-z0-9_]*-train\.array_record-\d{5}-of-\d{5}")
_WRITER_OPTIONS = "group_size:1,zstd:-1"  # random access; this level shrinks texts and wastes no time on images
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@dataclass(frozen=True)
class Shard:
    """A finished shard: its file name, number of records, size in bytes and SHA-256."""

    file: str
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """What is kept of a shard until the corpus is finished.

    `key` hashes the input that the shard was made from; `index` has a line for each record; `notes` are the caller's;
    `views` counts records with responses that name their images.
    """

    key: str
    shard: Shard
    index: list[dict[str, Any]]
    notes: dict[str, Any]
    views: int = 0


def index_line(record: schema.Record, data: bytes) -> dict[str, Any]:
    """What the index says of a record: enough to split without reading images, and to fingerprint the corpus."""
    return {
        "id": record.id,
        "prompt_sha256": hashlib.sha256(record.prompt.encode()).hexdigest(),
        "image_sha256": list(record.image_sha256),
        "record_sha256": hashlib.sha256(data).hexdigest(),
    }


class CorpusBuilder:
    """Builds one corpus in a folder. Use it as a context manager: it holds a lock, so two builds cannot mix.

    Args:
        folder: the corpus; absent, empty, or left unfinished by an earlier build.
        name: the data set's name in file names: lower-case letters, digits, underscores.
        shards: number of shards.

    Raises:
        UserError: the folder holds something else or a finished corpus, or another process is building it.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str, shards: int):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UserError(f"corpus name {name!r}: use lower-case letters, digits and underscores, a letter first")
        if not 1 <= shards <= 99_999:
            raise UserError(f"shards: {shards} is not between 1 and 99999")
        self.folder = Path(folder)
        self.name = name
        self.shards = shards
        self._state = self.folder / BUILDING

    def __enter__(self) -> "CorpusBuilder":
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file; a corpus is a folder: choose another name")
        if (self.folder / MANIFEST).exists():
            raise UserError(f"{self.folder} already holds a finished corpus: choose another folder or remove it")
        if self.folder.exists() and not self._state.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} is not empty and holds no unfinished corpus: choose a new folder")
        self._state.mkdir(parents=True, exist_ok=True)
        busy = f"{self.folder} is being written by another process: wait for it or choose another folder"
        self._lock = lock(self._state / "lock", busy)
        self._remove_leftovers()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _shard_file(self, number: int) -> str:
        return f"{self.name}-train.array_record-{number:05d}-of-{self.shards:05d}"

    def _entry_path(self, number: int) -> Path:
        return self._state / f"{self._shard_file(number)}.json"

    def _remove_leftovers(self) -> None:
        """Removes temporary files and shards of an earlier build that this one will not have."""
        wanted = {self._shard_file(number) for number in range(self.shards)}
        for path in self.folder.iterdir():
            if _SHARD_NAME.fullmatch(path.name) and path.name not in wanted:
                path.unlink()
        for path in self._state.iterdir():
            if path.name != "lock" and path.name.removesuffix(".json") not in wanted:
                path.unlink()

    def finished(self, number: int, key: str) -> Entry | None:
        """The entry of a shard that an earlier run made of the same input and whose file is whole, or None."""
        try:
            fields = json.loads(self._entry_path(number).read_text())
            entry = Entry(
                fields["key"], Shard(**fields["shard"]), fields["index"], fields["notes"], fields.get("views", 0)
            )
        except (OSError, ValueError, KeyError, TypeError):  # absent, or not written by this version
            return None
        path = self.folder / entry.shard.file
        if entry.key != key or not path.is_file() or _sha256(path) != entry.shard.sha256:
            return None
        return entry

    def has_entry(self, number: int) -> bool:
        """Whether an earlier run left something for `finished` to look at."""
        return self._entry_path(number).exists()

    def write(
        self, number: int, key: str | Callable[[], str], records: Iterable[schema.Record], notes: dict[str, Any]
    ) -> Entry:
        """Writes a shard from a stream of records; the same records give the same bytes.

        Args:
            number: which shard.
            key: a hash of the input, which a later run hands to `finished`; or what gives it after `records`.
            records: consumed one at a time.
            notes: JSON values to keep with the entry; read after `records` is exhausted, so the stream may fill them.
        """
        path = self.folder / self._shard_file(number)
        index: list[dict[str, Any]] = []
        views = 0

        def encoded() -> Iterator[bytes]:
            nonlocal views
            for record in records:
                data = schema.to_example(record)
                views += record.has_views
                index.append(index_line(record, data))
                yield data

        shard = _write_array_record(path, self._state, encoded())
        entry = Entry(key if isinstance(key, str) else key(), shard, index, notes, views)
        write_file(self._entry_path(number), [json.dumps(asdict(entry), ensure_ascii=False)], temporary_in=self._state)
        return entry

    def finish(self, entries: list[Entry], files: Mapping[str, Iterable[str]], facts: Mapping[str, Any]) -> None:
        """Completes the corpus: index, the caller's files, TFDS metadata and, last, the manifest.

        Args:
            entries: of every shard, in order.
            files: name -> text in pieces, written beside the shards.
            facts: JSON values that the manifest keeps.
        """
        write_file(self.folder / INDEX, _index_text(entries), temporary_in=self._state)
        for name, text in files.items():
            write_file(self.folder / name, text, temporary_in=self._state)
        shards = [entry.shard for entry in entries]
        records, views = sum(shard.records for shard in shards), sum(entry.views for entry in entries)
        self._write_tfds_metadata(shards, views=views == records > 0)  # TFDS needs a field in all records
        manifest = {
            "format": FORMAT_VIEWS if views else FORMAT,
            "name": self.name,
            "records": records,
            "fingerprint": fingerprint(line["record_sha256"] for entry in entries for line in entry.index),
            **facts,
            "shards": [asdict(shard) for shard in shards],
        }
        write_file(
            self.folder / MANIFEST,
            [json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"],
            temporary_in=self._state,
        )
        shutil.rmtree(self._state)

    def _write_tfds_metadata(self, shards: list[Shard], *, views: bool) -> None:
        import tensorflow_datasets as tfds

        template = tfds.core.ShardedFileTemplate(
            data_dir=self.folder,
            template=_TEMPLATE,
            dataset_name=self.name,
            split="train",
            filetype_suffix="array_record",
        )
        split = tfds.core.SplitInfo(
            name="train",
            shard_lengths=[shard.records for shard in shards],
            num_bytes=sum(shard.bytes for shard in shards),
            filename_template=template,
        )
        tfds.folder_dataset.write_metadata(
            data_dir=self.folder,
            features=schema.features(views),
            split_infos=[split],
            filename_template=_TEMPLATE,
            description="One record an instruction: images, prompt, responses with ratings and rationales.",
            check_data=False,  # its check would need TensorFlow
        )


def fingerprint(record_sha256: Iterable[str]) -> str:
    """One hash for a corpus: of its records in order, however they are cut into shards."""
    digest = hashlib.sha256()
    for record in record_sha256:
        digest.update(bytes.fromhex(record))
    return digest.hexdigest()


def write_file(path: Path, pieces: Iterable[str], temporary_in: Path) -> None:
    """Writes a text file so that `path` is either absent or whole, also after a power cut."""
    with _published(path, temporary_in) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for piece in pieces:
            file.write(piece)


def _index_text(entries: list[Entry]) -> Iterator[str]:
    for entry in entries:
        for line in entry.index:
            yield json.dumps(line, ensure_ascii=False) + "\n"


def _write_array_record(path: Path, temporary_in: Path, records: Iterable[bytes]) -> Shard:
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    with _published(path, temporary_in) as temporary:
        count = 0
        writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
        try:
            for data in records:
                with _named_errors(path):
                    writer.write(data)
                count += 1
        finally:
            with _named_errors(path):
                writer.close()
        reader = ArrayRecordReader(str(temporary))
        written = reader.num_records()
        reader.close()
        if written != count:
            raise UserError(f"{path}: {count} records were written but only {written} can be read: is the disk full?")
        return Shard(path.name, count, temporary.stat().st_size, _sha256(temporary))


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Makes array_record's RuntimeError, a full disk for one, a line for the user."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"{path} cannot be written ({' '.join(str(error).split())})") from error


@contextmanager
def _published(path: Path, temporary_in: Path) -> Iterator[Path]:
    """A file to write, which is renamed to `path` when the block ends well, so that it lasts, and removed otherwise.

    Its name is its own: a cluster may give one shard to two workers.
    """
    temporary = temporary_in / f"{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
