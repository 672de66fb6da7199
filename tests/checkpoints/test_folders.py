"""Folders that appear whole or not at all: killed, failed and refused at every single step."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from silkie_jax import locks
from silkie_jax.checkpoints import folders
from silkie_jax.checkpoints.folders import new_folder
from silkie_jax.errors import UserError
from tests.checkpoints.steps import fill, found

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dst(tmp_path):
    """A whole old folder."""
    fill(tmp_path / "dst", "old")
    return tmp_path / "dst"


def replace(dst, said="new"):
    with new_folder(dst, replace=("marker",)) as folder:
        fill(folder, said)


@pytest.mark.parametrize("how", ["killed", "failed", pytest.param("killed twice", marks=pytest.mark.slow)])
@pytest.mark.parametrize("before", ["old", "empty", "nothing"])
def test_at_every_step_old_or_new_is_whole_and_the_next_command_goes_on(tmp_path, how, before):
    """In a process of its own, which forks: see steps.py."""
    command = [sys.executable, "-m", "tests.checkpoints.steps", tmp_path, how, before]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > (14 if before == "old" else 8)  # steps there were


@pytest.mark.parametrize("what", ["rmtree", "unlink"])
def test_a_removal_that_fails_loses_neither(dst, monkeypatch, what):
    """A file server keeps the name of what another host has open."""

    def refuse(*_, **options):
        if not options.get("ignore_errors"):
            raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(*{"rmtree": (folders.shutil, "rmtree"), "unlink": (folders.os, "unlink")}[what], refuse)
        replace(dst, "newer")
        assert found(dst) == "newer"
        replace(dst, "newest")
        assert found(dst) == "newest"
    replace(dst)
    assert found(dst) == "new"
    assert [path.name for path in dst.parent.iterdir()] == ["dst"]


def test_a_second_process_is_refused(dst):
    with new_folder(dst, replace=("marker",)) as folder:
        fill(folder, "new")
        with pytest.raises(UserError, match="another process is writing it"):
            replace(dst)
    assert found(dst) == "new"


def test_many_at_once_leave_one_of_theirs(dst):
    refused = []

    def run(number):
        for _ in range(50):
            try:
                replace(dst, f"{number}")
            except UserError as e:
                refused.append(str(e))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {line.split(": ")[1] for line in refused} <= {"another process is writing it"}
    assert found(dst) in "0123"
    assert [path.name for path in dst.parent.iterdir()] == ["dst"]


def test_a_workshop_that_goes_while_it_is_looked_at_is_made_anew(dst, monkeypatch):
    """`Path.mkdir` finds the name taken, looks again, and finds nothing: its last user was just done."""
    mkdir, taken = Path.mkdir, [True, True]

    def meets_another(self, *args, **kwargs):
        if taken:
            taken.pop()
            raise FileExistsError(17, "File exists", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", meets_another)
    replace(dst)
    assert found(dst) == "new"
    assert not taken


def test_where_files_cannot_be_locked_folders_are_made_all_the_same(dst, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    replace(dst)
    assert found(dst) == "new"


def test_what_an_earlier_version_left_is_cleared(dst):
    """It filled DST.partial itself, with its lock inside."""
    partial = dst.with_name("dst.partial")
    fill(partial, "half")
    (partial / ".lock").touch()
    replace(dst)
    assert [path.name for path in dst.parent.iterdir()] == ["dst"]


def test_half_of_a_folder_that_an_earlier_version_left_gives_way(dst):
    (dst / "weights" / "a").unlink()
    replace(dst)
    assert found(dst) == "new"


def test_a_link_gives_way_and_what_it_names_stays(dst):
    dst.rename(dst.with_name("elsewhere"))
    dst.symlink_to("elsewhere")
    replace(dst)
    assert found(dst) == "new"
    assert not dst.is_symlink()
    assert found(dst.with_name("elsewhere")) == "old"


def test_what_does_not_hold_the_marker_stays(dst):
    (dst / "marker").unlink()
    with pytest.raises(UserError, match="dst: already exists; remove it or choose another name"):
        replace(dst)
    with pytest.raises(UserError, match="already exists"), new_folder(dst):
        pass
    assert (dst / "weights" / "a").read_text() == "old"
    assert [path.name for path in dst.parent.iterdir()] == ["dst"]
