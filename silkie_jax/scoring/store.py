"""The reference's log-probabilities beside a corpus: computed once, then training needs no second forward pass.

    CORPUS/reference/KEY/identity.json      what they depend on; KEY is its hash
    CORPUS/reference/KEY/part-00000.npz     of 1,024 records: every response's log-probability

Every response of every record is there, whatever the pair rule, so that rules can be changed without computing anew.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from silkie_jax.errors import UserError

PART = 1024  # records of a file

Identity = Mapping[str, str]
"""What log-probabilities depend on, by name: weights, dtype, tokenizer, rows, corpus, and adapter where one counts."""


class ReferenceStore:
    """The files of one identity; a part is written at once or not at all."""

    def __init__(self, corpus: Path, identity: Identity, records: int):
        text = json.dumps(dict(identity), sort_keys=True, indent=1)
        self.folder = corpus / "reference" / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.records, self._text = records, text

    @property
    def parts(self) -> int:
        return -(-self.records // PART)

    def range(self, part: int) -> range:
        """The records of a part."""
        return range(part * PART, min((part + 1) * PART, self.records))

    def missing(self) -> list[int]:
        """Parts that are not there yet."""
        return [part for part in range(self.parts) if not self._path(part).exists()]

    def write(self, part: int, logps: Sequence[Float[np.ndarray, "R"]]) -> None:
        """Stores the log-probabilities of a part, one array a record."""
        self.folder.mkdir(parents=True, exist_ok=True)
        identity = self.folder / "identity.json"
        if not identity.exists():
            _replace(identity, self._text.encode())
        counts = np.array([len(values) for values in logps], np.int32)
        path = self._path(part)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, counts=counts, logps=np.concatenate([*logps, []]).astype(np.float32))
        os.replace(temporary, path)

    def read(self) -> "StoredReference":
        """All of them.

        Raises:
          UserError: a part is missing or damaged.
        """
        missing = self.missing()
        if missing:
            raise UserError(
                f"{self.folder}: {len(missing)} of {self.parts} parts are missing; "
                "run `silkie reference` with the same config to complete them"
            )
        counts, logps = [], []
        for part in range(self.parts):
            try:
                with np.load(self._path(part)) as arrays:
                    counts.append(arrays["counts"])
                    logps.append(arrays["logps"])
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
                raise UserError(f"{self._path(part)}: damaged ({e}); remove it and run `silkie reference`") from None
        every = np.concatenate([*counts, []]).astype(np.int64), np.concatenate([*logps, []])
        return StoredReference(self.folder, *every)

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.npz"


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
    store = ReferenceStore(corpus, identity, records)
    if store.folder.is_dir():
        return store.read()
    others = [_read_identity(path) for path in sorted(corpus.glob("reference/*/identity.json"))]
    run = "run `silkie reference` with this config"
    if not others:
        raise UserError(f"{corpus} has no reference log-probabilities; {run} first")
    keys = dict.fromkeys((*identity, "adapter"))  # an adapter may be in either alone
    differing = min(([k for k in keys if other.get(k) != identity.get(k)] for other in others), key=len)
    raise UserError(
        f"{corpus}: the reference log-probabilities there were made with other {' and '.join(differing)}; {run}"
    )


def _read_identity(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
