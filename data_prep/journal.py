"""Writing to the run's database without holding up the event loop: one thread, many writes to a commit.

A commit that survives a loss of power waits for the disk, a few milliseconds. So writes are queued, and the thread
commits whatever has gathered while it waited for the last one. Who submits a write awaits the commit that holds it.
"""

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.store import connect
from silkie_jax.errors import UserError

Statement = tuple[str, Sequence[Any]]
_MOST = 500  # submissions to a commit


class Journal:
    """The writer of one database, within one event loop. An async context manager; leaving it writes what is queued."""

    def __init__(self, path: Path):
        self._path = path
        self._queue: queue.SimpleQueue[tuple[Sequence[Statement], asyncio.Future[None]] | None] = queue.SimpleQueue()

    async def __aenter__(self) -> "Journal":
        self._loop = asyncio.get_running_loop()
        self._db = connect(self._path)
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        self._db.close()

    def write(self, *statements: Statement) -> "asyncio.Future[None]":
        """Queues statements that belong together; the future is done when they are on the disk.

        Raises (in the future):
            UserError: the disk is full or the file cannot be written.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        self._queue.put((statements, future))
        return future

    def _work(self) -> None:
        more = True
        while more:
            entries = [self._queue.get()]
            while len(entries) < _MOST and not self._queue.empty():
                entries.append(self._queue.get_nowait())
            more = None not in entries
            writes = [entry for entry in entries if entry is not None]
            error = self._commit([statement for statements, _ in writes for statement in statements])
            self._loop.call_soon_threadsafe(_settle, [future for _, future in writes], error)

    def _commit(self, statements: list[Statement]) -> Exception | None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for sql, values in statements:
                    self._db.execute(sql, values)
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            return UserError(f"{self._path} cannot be written ({error}): make room, then run the same command again")
        except Exception as error:
            return error
        return None


def _settle(futures: "list[asyncio.Future[None]]", error: Exception | None) -> None:
    for future in futures:
        if future.cancelled():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
