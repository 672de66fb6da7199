"""A run: instructions all or none, and readable where nothing can be written."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from data_prep.run import Instruction, Run
from silkie_jax.endpoints.store import DATABASE
from silkie_jax.errors import UserError
from tests.data_prep.rated import fill


def test_instructions_come_back_as_they_went_in(tmp_path):
    given = [
        Instruction("a", "what?", ("0" * 64,), (("q", "a"), ("é", "漢")), "svit", "CC-BY-4.0", {"n": [1, None]}),
        Instruction("b", "<|im_start|> ' \" \0 \n", ()),
    ]
    with Run.create(tmp_path / "run") as run:
        assert run.write_instructions(given, {"seed": 0}) == 2
        assert run.write_instructions(iter([]), {"seed": 0}) == 2  # the same settings: nothing to do
        with pytest.raises(UserError, match="two instructions share an id"):
            run.write_instructions([given[0], given[0]], {"seed": 1})
    with Run.open(tmp_path / "run") as run:
        found = list(run.instructions())
        assert [(i.id, i.prompt, i.history, i.extra) for i in found] == [
            (i.id, i.prompt, i.history, i.extra) for i in given
        ]
        assert [i.number for i in found] == [1, 2]
        assert [i.id for i in run.instructions(2, 9)] == ["b"]
        with pytest.raises(sqlite3.OperationalError):
            run.db.execute("DELETE FROM instructions")


# Reads the run in argv[1] as somebody who may not write there, and prints what it finds.
READ = """
import os, sys
from data_prep.run import Run
from silkie_jax.errors import UserError
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    with Run.open(sys.argv[1]) as run:
        images = [run.image(sha256) for instruction in run.instructions() for sha256 in instruction.images]
        print(run.count(), len(list(run.gathered())), len(images), run.settings("after"))
except UserError as error:
    print(error)
"""
KILLED = """
import os, sys
from data_prep.run import Run
run = Run.open(sys.argv[1], write=True)
run.save_settings("after", "the kill")
os._exit(9)
"""


def python(code: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()


@pytest.fixture
def locked_run():
    """A run whose folder cannot be written, in a place that everybody can reach."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield fill(Path(folder) / "run", 4)
        os.chmod(Path(folder) / "run", 0o755)


def test_a_read_only_run_can_be_read_and_is_left_as_it_is(locked_run):
    os.chmod(locked_run, 0o555)
    before = {path: path.stat().st_mtime_ns for path in [locked_run, *locked_run.rglob("*")]}
    assert python(READ, locked_run) == "4 4 4 None"
    assert {path: path.stat().st_mtime_ns for path in [locked_run, *locked_run.rglob("*")]} == before


def test_a_read_only_run_that_was_killed_can_be_read(locked_run):
    python(KILLED, locked_run)
    os.chmod(locked_run, 0o555)
    assert python(READ, locked_run) == "4 4 4 the kill"


def test_last_writes_that_cannot_be_read_in_place_are_one_line(locked_run):
    """As a copy of the folder leaves it that took the log along and not its index."""
    python(KILLED, locked_run)
    (locked_run / f"{DATABASE}-shm").unlink()
    os.chmod(locked_run, 0o555)
    said = python(READ, locked_run)
    assert "copy the run, run.sqlite-wal included, to a folder that can be written" in said
    copied = shutil.copytree(locked_run, locked_run.parent / "copy")
    os.chmod(copied, 0o755)
    with Run.open(copied) as run:
        assert run.settings("after") == "the kill"
