"""The run's folder: images once, requests of any stage, and a journal whose commits survive a kill."""

import asyncio
import errno
import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from data_prep.run import Run
from silkie_jax.endpoints.agents import Agent
from silkie_jax.endpoints.attempts import Verdict, new_request
from silkie_jax.endpoints.journal import Journal
from silkie_jax.endpoints.messages import compose
from silkie_jax.endpoints.stage import Options, run_stage
from silkie_jax.endpoints.store import DATABASE, RunStore
from silkie_jax.errors import UserError
from tests.data_prep.runs import make_run, picture
from tests.endpoints.server import Server


def test_images_are_stored_once(tmp_path):
    with Run.create(tmp_path / "run") as run:
        first, again, other = (run.add_image(picture(n)) for n in (0, 0, 1))
        assert first == again != other
        assert run.image(first) == picture(0)
        assert run.image_size(first) == (16, 12)
        assert len(list((tmp_path / "run" / "images").rglob("*.png"))) == 2
        run.image_path(first).unlink()
        with pytest.raises(UserError, match="cannot be read"):
            run.image(first)
        with pytest.raises(UserError, match="holds no image"):
            run.image("../../etc/passwd")


@pytest.mark.parametrize(
    "left",
    [b"", picture(0)[:30], bytes(len(picture(0))), None],
    ids=["empty", "cut off", "zeros", "gone"],
)
def test_an_image_that_a_power_cut_spoiled_is_written_again(tmp_path, left):
    with Run.create(tmp_path / "run") as run:
        path = run.image_path(run.add_image(picture(0)))
    path.unlink() if left is None else path.write_bytes(left)
    with Run.create(tmp_path / "run") as run:
        assert run.image(run.add_image(picture(0))) == picture(0)


def test_images_are_on_the_disk_before_the_database_refers_to_them(tmp_path, monkeypatch):
    events = []
    fsync = os.fsync

    def noted(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def inodes(*paths):
        return {place.stat().st_ino for path in paths for place in (path, path.parent)}

    monkeypatch.setattr(os, "fsync", noted)
    with Run.create(tmp_path / "run") as run:
        run.db.set_trace_callback(lambda statement: events.append(statement.split()[0]))
        with run.transaction():
            paths = [run.image_path(run.add_image(picture(n))) for n in range(3)]
        assert inodes(*paths) <= set(events[: events.index("COMMIT")])
        events.clear()
        alone = run.image_path(run.add_image(picture(3)))
        assert inodes(alone) <= set(events[: events.index("INSERT")])


def test_an_image_of_a_transaction_that_failed_is_stored_by_the_next(tmp_path):
    with Run.create(tmp_path / "run") as run:
        run.db.execute("BEGIN")
        run.add_image(picture(0))
        run.db.execute("ROLLBACK")
        with run.transaction():
            assert run.image(run.add_image(picture(0))) == picture(0)


def test_a_cut_off_image_is_one_line(tmp_path):
    with Run.create(tmp_path / "run") as run:
        sha256 = run.add_image(picture(1))
        run.image_path(sha256).write_bytes(picture(1)[:-1])
        with pytest.raises(UserError, match=r"has \d+ bytes, not the \d+ that were stored: copy the run again"):
            run.image(sha256)


class Answers(RunStore):
    """A store of another caller, with a table of its own."""

    tables = "CREATE TABLE questions (number INTEGER PRIMARY KEY, words TEXT NOT NULL)"
    made_by = "silkie evaluate"


def test_any_caller_can_ask_by_a_stage_of_its_own(tmp_path):
    """What a request is about, the stage's name, and what a reply is worth: all are the caller's."""
    with pytest.raises(UserError, match=r"there is no run at .*: make one with `silkie evaluate`"):
        Answers.open(tmp_path / "run")
    judged = []

    def review(name, request, reply, number):
        judged.append((name, request.item, request.slot, json.loads(request.arrangement)))
        return Verdict(reply.outcome, "ok" if "m0" in reply.text else "failed")

    with Server() as server, Answers.create(tmp_path / "run") as run:
        who = Agent(model="m0", base_url=server.url)

        def plan():
            for number, words in enumerate(("how many?", "which colour?"), 7):
                run.db.execute("INSERT INTO questions VALUES (?, ?)", (number, words))
                body = compose(who, words, [])
                run.db.execute(*new_request("score", number, "judge", 0, {"of": words}, body, 0))

        result = run_stage(run, "score", {"judge": who}, plan, review, Options(progress=False))
    assert result.states == {"ok": 2}
    assert sorted(judged) == [("judge", 7, 0, {"of": "how many?"}), ("judge", 8, 0, {"of": "which colour?"})]
    with Answers.open(tmp_path / "run") as run:
        assert run.db.execute("SELECT count(*) FROM questions").fetchone() == (2,)
        assert [(row.stage, row.agent, dict(row.requests)) for row in run.spending()] == [("score", "judge", {"ok": 2})]


def test_a_disk_without_locks_is_called_that(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with Run.create(tmp_path / "run"), pytest.raises(UserError, match="another process is working on the run"):
        Run.create(tmp_path / "run")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"run.lock cannot be locked \(Function not implemented\): use a local disk"):
        Run.create(tmp_path / "run")


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(UserError, match="there is no run at"):
        Run.open(tmp_path / "absent")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="holds other files"):
        Run.create(tmp_path / "other")
    (tmp_path / "other" / DATABASE).write_text("not a database, but long enough to be looked at" * 100)
    with pytest.raises(UserError, match="is not a run's database"):
        Run.open(tmp_path / "other")
    with Run.create(tmp_path / "run") as run:
        run.save_settings("format", 99)
    with pytest.raises(UserError, match="format 99"):
        Run.open(tmp_path / "run")


def note(n: int):
    return "INSERT INTO meta VALUES (?, ?)", (f"note {n}", "1")


def test_writes_of_one_turn_are_one_commit_and_a_wrong_one_harms_nothing_before(tmp_path):
    make_run(tmp_path / "run", 1)

    async def work(run: Run) -> None:
        async with Journal(run.db, tmp_path / "run" / DATABASE) as journal:
            await asyncio.gather(*(journal.write(note(n)) for n in range(100)))
            with pytest.raises(sqlite3.IntegrityError):
                await journal.write(note(100), note(3))
            assert not run.settings("note 100")
            journal.write(note(101))  # written on leaving

    with Run.create(tmp_path / "run") as run:
        asyncio.run(work(run))
        assert sum(run.settings(f"note {n}") or 0 for n in range(102)) == 101


def test_a_full_disk_is_one_line(tmp_path):
    make_run(tmp_path / "run", 1)

    async def work(run: Run) -> None:
        async with Journal(run.db, tmp_path / "run" / DATABASE) as journal:
            with pytest.raises(UserError, match=r"cannot be written .*full.*: make room"):
                await journal.write(("INSERT INTO meta VALUES ('big', ?)", ("x" * 10**6,)))

    with Run.create(tmp_path / "run") as run:
        pages = run.db.execute("PRAGMA page_count").fetchone()[0]
        run.db.execute(f"PRAGMA max_page_count = {pages + 2}")
        asyncio.run(work(run))
        assert run.settings("big") is None


KILL = """
import asyncio, os, signal, sys
from silkie_jax.endpoints.journal import Journal
from data_prep.run import Run
from silkie_jax.endpoints.messages import compose
from silkie_jax.endpoints.stage import Options, run_stage
from silkie_jax.endpoints.store import DATABASE, RunStore
async def work(run):
    async with Journal(run.db, run.path / DATABASE) as journal:
        for n in range(50):
            await journal.write(("INSERT INTO meta VALUES (?, '1')", (f"note {n}",)))
        os.kill(os.getpid(), signal.SIGKILL)
with Run.create(sys.argv[1]) as run:
    asyncio.run(work(run))
"""


def test_what_was_awaited_survives_a_kill(tmp_path):
    make_run(tmp_path / "run", 1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILL, str(tmp_path / "run")], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    with Run.open(tmp_path / "run") as run:
        assert all(run.settings(f"note {n}") for n in range(50))
