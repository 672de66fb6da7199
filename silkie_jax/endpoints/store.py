"""A run: a folder with one SQLite file that holds every request and every raw reply, and the images beside it.

    run.sqlite                requests, attempts with raw replies and their price, batches, settings; more of a caller
    images/ab/abcd....jpg     each image once, named by the SHA-256 of its content
    run.lock                  held by the one process that writes

Nothing that cost money is ever changed or removed: an attempt is written when it is sent and completed when its
reply is in, and everything else (ratings, records, reports) is derived from these rows, as often as one likes.
"""

import hashlib
import io
import json
import os
import secrets
import sqlite3
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from PIL import Image

from silkie_jax.durable import sync
from silkie_jax.errors import UserError
from silkie_jax.image_limits import STORED
from silkie_jax.locks import lock

FORMAT = 1
DATABASE = "run.sqlite"
_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png"}
_SYNCS = 16  # image files that are synced side by side
_LOG_BYTES = 64 * 2**20  # that SQLite's log may keep when it has been written to the database

# A request is `open` until it has its reply, then `ok`, or `failed` for good, or `postponed` where a later command may
# have more luck (the server was down); `attempt` is the one that decided. The stage's own are `instruction`, the number
# of what a request is about, `slot`, which tells apart those of one agent about the same, and `arrangement`, whatever
# else the stage will want to know when the reply is in.
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE images (
    sha256 TEXT PRIMARY KEY, suffix TEXT NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL,
    bytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE requests (
    id INTEGER PRIMARY KEY, stage TEXT NOT NULL, instruction INTEGER NOT NULL,
    agent TEXT NOT NULL, slot INTEGER NOT NULL, arrangement TEXT, body TEXT NOT NULL, text_bytes INTEGER NOT NULL,
    image_tokens INTEGER NOT NULL, state TEXT NOT NULL DEFAULT 'open', attempt INTEGER,
    UNIQUE (stage, instruction, agent, slot)
);
CREATE INDEX requests_by_state ON requests (stage, agent, state, id);
CREATE TABLE attempts (
    id INTEGER PRIMARY KEY, request INTEGER NOT NULL REFERENCES requests (id), batch INTEGER REFERENCES batches (id),
    started REAL NOT NULL, finished REAL, outcome TEXT, http_status INTEGER, reply TEXT, error TEXT, text TEXT,
    finish_reason TEXT, model TEXT, input_tokens INTEGER, output_tokens INTEGER, cost REAL NOT NULL DEFAULT 0,
    at_risk REAL NOT NULL DEFAULT 0
);
CREATE INDEX attempts_by_request ON attempts (request);
CREATE INDEX attempts_in_flight ON attempts (batch) WHERE outcome IS NULL;
CREATE TABLE batches (
    id INTEGER PRIMARY KEY, stage TEXT NOT NULL, agent TEXT NOT NULL, state TEXT NOT NULL, created REAL NOT NULL,
    lines INTEGER NOT NULL, name TEXT NOT NULL UNIQUE, file_id TEXT, batch_id TEXT, error TEXT
);
"""

_LIST_TABLES = "SELECT name FROM sqlite_master WHERE type = 'table'"
# Of these tables a snapshot has less: no open requests, bodies or raw replies, and only attempts that decided.
_SETTLED = {
    "requests": "SELECT id, stage, instruction, agent, slot, arrangement, '', 0, 0, state, attempt FROM requests "
    "WHERE state IN ('ok', 'failed')",
    "attempts": "SELECT a.id, a.request, a.batch, started, finished, outcome, http_status, NULL, NULL, text, "
    "finish_reason, model, input_tokens, output_tokens, cost, at_risk "
    "FROM attempts a JOIN requests r ON r.attempt = a.id",
    "batches": "SELECT * FROM batches WHERE 0",
}


@dataclass(frozen=True)
class Spending:
    """What one agent did in one stage.

    Attributes:
        requests: state -> count.
        attempts: outcome -> count; "in flight" for those that wait in a batch or were cut off.
        input_tokens, output_tokens, cost: as reported by the server; cost in USD by the configured price.
        at_risk: USD that attempts without a bill (cut off, timed out) may have cost at most.
        seconds: mean time of an attempt that was answered live.
        models: names that the server reported.
    """

    stage: str
    agent: str
    requests: Mapping[str, int]
    attempts: Mapping[str, int]
    input_tokens: int
    output_tokens: int
    cost: float
    at_risk: float
    seconds: float
    models: tuple[str, ...]


class RunStore:
    """A run's folder: `create` writes, in one process at a time; `open` reads. A context manager.

    Attributes:
        tables: SQL for further tables that a kind of run has; set by subclasses.
        made_by: the command that makes one, for errors.
    """

    tables: ClassVar[str] = ""
    made_by: ClassVar[str] = ""

    def __init__(self, path: Path, db: sqlite3.Connection, lock: Any = None):
        self.path = path
        self.db = db
        self._lock = lock
        self._sound: set[str] = set()  # images whose files this process has seen to be right
        self._unsynced: set[Path] = set()  # image files that may still be in the system's memory alone

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Self:
        """Opens a run for writing, making it where there is none.

        Raises:
            UserError: another process writes to it, or the folder holds something else.
        """
        path = Path(path)
        if path.is_dir() and not (path / DATABASE).exists() and any(p.name != "run.lock" for p in path.iterdir()):
            raise UserError(f"{path} holds other files and no {DATABASE}: name a new folder for the run")
        try:
            path.mkdir(parents=True, exist_ok=True)
            busy = f"another process is working on the run {path}: wait for it, or stop it first"
            held = lock(path / "run.lock", busy)
        except OSError as error:
            raise UserError(f"{path}: a run cannot be made here ({error})") from None
        run = cls(path, connect(path / DATABASE), held)
        with run.transaction():
            if not run.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                run._make_tables(run.db)
                run.save_settings("format", FORMAT)
                run.save_settings("run id", secrets.token_hex(8))
        run._check_format()
        return run

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], write: bool = False, *, snapshot: str | os.PathLike[str] | None = None
    ) -> Self:
        """Opens a run that exists, to read (its folder may be read-only); with `write`, as `create` does.

        Args:
            snapshot: a file made by `snapshot`, to read in place of the run's own database.

        Raises:
            UserError: there is no run, or it is of another version.
        """
        path = Path(path)
        if snapshot is not None:
            return cls(path, connect_to_read(Path(snapshot), immutable=True))
        if not (path / DATABASE).exists():
            raise UserError(f"there is no run at {path}" + (f": make one with `{cls.made_by}`" if cls.made_by else ""))
        if write:
            return cls.create(path)
        run = cls(path, connect_to_read(path / DATABASE))
        run._check_format()
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.db.close()
        if self._lock:
            self._lock.close()
            self._lock = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written within is committed at once, or not at all; images are on the disk before."""
        with self.db:
            self.db.execute("BEGIN IMMEDIATE")
            yield
            self._sync_images()

    def _check_format(self) -> None:
        try:
            found = self.settings("format")
        except sqlite3.Error as error:
            raise UserError(f"{self.path / DATABASE} is not a run's database ({error})") from None
        if found != FORMAT:
            raise UserError(f"{self.path} is a run of format {found}; this version reads format {FORMAT}")

    @classmethod
    def _make_tables(cls, db: sqlite3.Connection) -> None:
        for statement in (_TABLES + cls.tables).split(";"):
            db.execute(statement)

    def snapshot(self, file: Path) -> None:
        """Copies what came of a run: settings, images' names, the caller's tables, and the settled requests with texts
        of the attempts that decided.

        Hosts that share a disk can read the copy at once. The run's own database is for one host: part of SQLite's log
        is memory that its users share.

        Args:
            file: is made anew.
        """
        file.unlink(missing_ok=True)
        copy = sqlite3.connect(file, isolation_level=None)
        try:
            self._make_tables(copy)
            tables = {name: f"SELECT * FROM {name}" for (name,) in copy.execute(_LIST_TABLES).fetchall()}
            with self.db:
                self.db.execute("BEGIN")  # one state of the run, whoever writes meanwhile
                copy.execute("BEGIN")
                for table, select in (tables | _SETTLED).items():
                    rows = self.db.execute(select)
                    marks = ", ".join("?" * len(rows.description))
                    copy.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
                copy.execute("COMMIT")
        finally:
            copy.close()

    # Configuration

    def settings(self, key: str) -> Any:
        """A value stored before, or None."""
        row = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def save_settings(self, key: str, value: Any) -> None:
        """Stores a JSON value; committed at once unless a transaction is open."""
        self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, to_json(value)))

    # Images

    def add_image(self, data: bytes) -> str:
        """Stores a JPEG or PNG file that was checked before; returns its SHA-256.

        Of one that is there already the file is compared, and written again where it differs: a power cut empties
        files that were just written. A row of the database never refers to a file that is not on the disk; many are
        synced together within `transaction()`.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        known = self.db.execute("SELECT 1 FROM images WHERE sha256 = ?", (sha256,)).fetchone()
        if known and sha256 in self._sound:
            return sha256
        with Image.open(io.BytesIO(data), formats=STORED) as image:
            (width, height), suffix = image.size, _SUFFIXES[image.format or ""]
        file = self.path / "images" / sha256[:2] / (sha256 + suffix)
        if not _holds(file, data):
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".tmp.{os.getpid()}")
            temporary.write_bytes(data)
            os.replace(temporary, file)
        self._sound.add(sha256)
        self._unsynced.add(file)
        if not self.db.in_transaction:
            self._sync_images()
        if not known:
            self.db.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?)", (sha256, suffix, width, height, len(data)))
        return sha256

    def _sync_images(self) -> None:
        """Waits until the image files are on the disk, and under their names."""
        folders = {folder for file in self._unsynced for folder in (file.parent, file.parent.parent, self.path)}
        with ThreadPoolExecutor(_SYNCS) as pool:  # waits that come together cost a file system little more than one
            for paths in (self._unsynced, folders):
                list(pool.map(sync, paths))
        self._unsynced.clear()

    def image_path(self, sha256: str) -> Path:
        """Where an image of the run lies."""
        return self._image_file(sha256)[0]

    def image(self, sha256: str) -> bytes:
        """The bytes of an image of the run.

        Raises:
            UserError: it is missing or cut off.
        """
        path, size = self._image_file(sha256)
        try:
            with open(path, "rb", buffering=0) as file:
                data = file.readall()
        except OSError as error:
            raise UserError(f"an image of the run {self.path} cannot be read ({error}): copy the run again") from None
        if len(data) != size:
            raise UserError(f"{path} has {len(data)} bytes, not the {size} that were stored: copy the run again")
        return data

    def _image_file(self, sha256: str) -> tuple[Path, int]:
        row = self.db.execute("SELECT suffix, bytes FROM images WHERE sha256 = ?", (sha256,)).fetchone()
        if row is None:
            raise UserError(f"the run {self.path} holds no image {sha256}")
        return Path(f"{self.path}/images/{sha256[:2]}/{sha256}{row[0]}"), row[1]

    def image_size(self, sha256: str) -> tuple[int, int]:
        """Width and height in pixels.

        Raises:
            UserError: the run has no such image.
        """
        row = self.db.execute("SELECT width, height FROM images WHERE sha256 = ?", (sha256,)).fetchone()
        if row is None:
            raise UserError(f"the run {self.path} holds no image {sha256}")
        return row

    # What was spent

    def spending(self) -> list[Spending]:
        """Requests, replies, tokens and money by stage (in the order of their first requests) and agent."""
        states: dict[tuple[str, str], Counter[str]] = {}
        for stage, agent, state, count in self.db.execute(
            "SELECT stage, agent, state, count(*) FROM requests JOIN "
            "(SELECT stage, min(id) first FROM requests GROUP BY 1) USING (stage) GROUP BY 1, 2, 3 ORDER BY first, 2, 3"
        ):
            states.setdefault((stage, agent), Counter())[state] = count
        table = []
        for (stage, agent), requests in states.items():
            outcomes: Counter[str] = Counter()
            tokens_in = tokens_out = timed = 0
            cost = at_risk = seconds = 0.0
            models: set[str] = set()
            for outcome, model, *sums in self.db.execute(
                "SELECT coalesce(outcome, 'in flight'), a.model, count(*), coalesce(sum(input_tokens), 0), "
                "coalesce(sum(output_tokens), 0), sum(cost), sum(at_risk), "
                "coalesce(sum(CASE WHEN a.batch IS NULL AND reply IS NOT NULL THEN finished - started END), 0), "
                "coalesce(sum(a.batch IS NULL AND reply IS NOT NULL), 0) "
                "FROM requests r JOIN attempts a ON a.request = r.id WHERE stage = ? AND agent = ? GROUP BY 1, 2",
                (stage, agent),
            ):
                outcomes[outcome] += sums[0]
                tokens_in, tokens_out = tokens_in + sums[1], tokens_out + sums[2]
                cost, at_risk = cost + sums[3], at_risk + sums[4]
                seconds, timed = seconds + sums[5], timed + sums[6]
                models |= {model} - {None}
            table.append(
                Spending(
                    stage, agent, requests, outcomes, tokens_in, tokens_out, cost, at_risk,
                    seconds / timed if timed else 0.0, tuple(sorted(models)),
                )
            )  # fmt: skip
        return table

    def spent(self) -> float:
        """USD that the run has cost so far at most: what was billed, and what may have been."""
        return self.db.execute("SELECT coalesce(sum(cost + at_risk), 0) FROM attempts").fetchone()[0]


def connect(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode, every commit of which survives a loss of power.

    Raises:
        UserError: it is not a database.
    """
    db = sqlite3.connect(path, isolation_level=None, timeout=60, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")  # planning writes all requests in one transaction
    except sqlite3.Error as error:
        db.close()
        raise UserError(f"{path} is not a run's database, or cannot be opened ({error})") from None
    return db


def connect_to_read(path: Path, immutable: bool = False) -> sqlite3.Connection:
    """A connection that changes nothing.

    Where the folder can be written it takes part in SQLite's log, so that one may read while another process writes.
    In a read-only folder the log is there already, or nobody writes.

    Args:
        immutable: nobody writes, wherever it lies: no log, no locks.

    Raises:
        UserError: it is not a database, or its last writes cannot be read where it lies.
    """
    log = Path(f"{path}-wal")
    address = f"file:{urllib.parse.quote(str(path.absolute()))}"
    if immutable:
        address += "?immutable=1"
    elif os.access(path.parent, os.W_OK) and os.access(path, os.W_OK):
        address += "?mode=rw"
    elif log.exists() and log.stat().st_size:
        address += "?mode=ro"
    else:
        address += "?immutable=1"
    db = sqlite3.connect(address, uri=True, isolation_level=None, timeout=60, check_same_thread=False)
    try:
        db.execute("PRAGMA query_only = ON")
        db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        db.close()
        raise UserError(
            f"{path} cannot be read ({error}): copy the run, {log.name} included, to a folder that can be written"
        ) from None
    except sqlite3.Error as error:
        db.close()
        raise UserError(f"{path} is not a run's database ({error})") from None
    return db


def _holds(file: Path, data: bytes) -> bool:
    """Whether a file is there and holds just this."""
    try:
        return file.stat().st_size == len(data) and file.read_bytes() == data
    except OSError:
        return False


def to_json(value: Any) -> str:
    """JSON as it is stored: compact, and as UTF-8 can hold it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
