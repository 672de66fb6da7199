"""Writing a run's database while requests are in flight: many writes to a commit, and no waiting for the disk.

What is submitted within one turn of the event loop is committed together at its end. Such a commit has reached the
operating system: it survives a kill of the process at any later moment. The disk follows within a quarter of a second,
in a thread; that is what a loss of power can take.
"""

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from silkie_jax.errors import UserError

Statement = tuple[str, Sequence[Any]]
_SYNC_SECONDS = 0.25


class Journal:
    """The writer of one database, within one event loop. An async context manager; leaving it writes what is queued.

    Args:
        db: a connection in autocommit mode that nothing else writes through meanwhile.
        path: of the database.
    """

    def __init__(self, db: sqlite3.Connection, path: Path):
        self._db = db
        self._path = path
        self._queue: list[tuple[Sequence[Statement], asyncio.Future[None]]] = []
        self._unsynced = False

    async def __aenter__(self) -> "Journal":
        self._loop = asyncio.get_running_loop()
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._syncing = asyncio.create_task(self._sync_forever())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._flush()
        self._syncing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._syncing
        self._sync()
        self._db.execute("PRAGMA synchronous = FULL")

    def write(self, *statements: Statement) -> "asyncio.Future[None]":
        """Queues statements that belong together; the future is done when they are committed.

        Raises (in the future):
            UserError: the disk is full or the file cannot be written.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        if not self._queue:
            self._loop.call_soon(self._flush)
        self._queue.append((statements, future))
        return future

    def _flush(self) -> None:
        entries, self._queue = self._queue, []
        if not entries:
            return
        error = self._commit([statement for statements, _ in entries for statement in statements])
        self._unsynced = True
        for _, future in entries:
            if future.cancelled():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def _commit(self, statements: list[Statement]) -> Exception | None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for sql, values in statements:
                    self._db.execute(sql, values)
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            return UserError(f"{self._path} cannot be written ({error}): make room, then run the same command again")
        except Exception as error:
            return error
        return None

    async def _sync_forever(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_SECONDS)
            if self._unsynced:
                self._unsynced = False
                await asyncio.to_thread(self._sync)

    def _sync(self) -> None:
        """Waits until all commits are on the disk: they are in the log beside the database."""
        with contextlib.suppress(FileNotFoundError), open(f"{self._path}-wal", "rb") as log:
            os.fsync(log.fileno())
