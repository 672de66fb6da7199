"""What is computed once and lies beside a corpus, under the hash of all that it depends on, in parts.

    CORPUS/KIND/KEY/identity.json      what it depends on; KEY is its hash
    CORPUS/KIND/KEY/part-00000.npz     some of it: a part is written at once or not at all

Of the kind `reference` are the reference's log-probabilities, 1,024 records a part: with them training needs no second
forward pass. Every response of every record is there, whatever the pair rule, so that rules can be changed without
computing anew. The kind `features` has a module of its own (features.py).
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from silkie_jax.errors import UserError

PART = 1024  # records of a file

Identity = Mapping[str, str]
"""What stored numbers depend on, by name. Log-probabilities: weights, dtype, tokenizer, rows, corpus; adapter,
quantize or compute where there is one; image where it is not the response's own."""


class Store:
    """The parts of one identity. Each kind says what it is called, in paths and in words, and how large a part is."""

    kind: ClassVar[str]
    what: ClassVar[str]
    suffix: ClassVar[str]
    part: ClassVar[int]  # items of a part

    def __init__(self, corpus: Path, identity: Identity, count: int):
        self.identity, self.count = dict(identity), count
        self._text = json.dumps(self.identity, sort_keys=True, indent=1)
        self.corpus = corpus
        self.folder = corpus / self.kind / hashlib.sha256(self._text.encode()).hexdigest()[:16]

    @property
    def parts(self) -> int:
        return -(-self.count // self.part)

    def range(self, part: int) -> range:
        """The items of a part."""
        return range(part * self.part, min((part + 1) * self.part, self.count))

    def missing(self) -> list[int]:
        """Parts that are not there yet."""
        return [part for part in range(self.parts) if not self.path(part).exists()]

    def path(self, part: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{part:05d}.{self.suffix}"

    def begin(self) -> None:
        """Makes the folder, and says in it what it is of."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / "identity.json", self._text.encode())

    def check(self) -> None:
        """That all of exactly this identity is there.

        Raises:
          UserError: there is nothing, not all, or what lies there was made under another identity; then the line says
            what differs.
        """
        run = "run `silkie reference` with this config"
        if self.folder.is_dir():
            missing = self.missing()
            if missing:
                raise UserError(
                    f"{self.folder}: {len(missing)} of {self.parts} parts are missing; "
                    "run `silkie reference` with the same config to complete them"
                )
            return
        others = [_read_identity(path) for path in sorted(self.corpus.glob(f"{self.kind}/*/identity.json"))]
        if not others:
            raise UserError(f"{self.corpus} has no {self.what}; {run} first")
        keys = dict.fromkeys((*self.identity, *(key for other in others for key in other)))  # some are in either alone
        differing = min(([k for k in keys if o.get(k) != self.identity.get(k)] for o in others), key=len)
        raise UserError(f"{self.corpus}: the {self.what} there were made with other {' and '.join(differing)}; {run}")


class ReferenceStore(Store):
    """Log-probabilities of every response, by record."""

    kind, what, suffix, part = "reference", "reference log-probabilities", "npz", PART

    def write(self, part: int, logps: Sequence[Float[np.ndarray, "R"]]) -> None:
        """Stores the log-probabilities of a part, one array a record."""
        self.begin()
        path = self.path(part)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            counts = np.array([len(values) for values in logps], np.int32)
            np.savez(file, counts=counts, logps=np.concatenate([*logps, []]).astype(np.float32))
        os.replace(temporary, path)

    def read(self) -> "StoredReference":
        """All of them.

        Raises:
          UserError: a part is missing or damaged.
        """
        self.check()
        counts, logps = [], []
        for part in range(self.parts):
            try:
                with np.load(self.path(part)) as arrays:
                    counts.append(arrays["counts"])
                    logps.append(arrays["logps"])
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
                raise UserError(f"{self.path(part)}: damaged ({e}); remove it and run `silkie reference`") from None
        every = np.concatenate([*counts, []]).astype(np.int64), np.concatenate([*logps, []])
        return StoredReference(self.folder, *every)


class StoredReference:
    """Log-probabilities by record and response, read from `folder`."""

    def __init__(self, folder: Path, counts: Int[np.ndarray, "R"], logps: Float[np.ndarray, "S"]):
        self.folder = folder
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._logps = logps.astype(np.float32)

    def __call__(self, record: int, responses: Sequence[int]) -> Float[np.ndarray, "K"]:
        """Of one record's responses."""
        return self._logps[self._starts[record] + np.asarray(responses, np.int64)]


def find_reference(corpus: Path, identity: Identity, records: int) -> StoredReference:
    """The stored log-probabilities of exactly this identity.

    Raises:
      UserError: there are none, or what lies there was made under another one; then the line says what differs.
    """
    return ReferenceStore(corpus, identity, records).read()


def _read_identity(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, unless it holds just that already."""
    if path.exists() and path.read_bytes() == data:
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
