"""Kills or fails the making of a folder at every single step; a program of its own, because it forks.

    python -m tests.checkpoints.steps FOLDER HOW BEFORE

Prints how many steps there were. Between two system calls that change something nothing happens on disk, and Python
says before each what it will do (an audit event): dying there, for every one of them, is dying everywhere.
"""

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path

from silkie_jax.checkpoints.folders import new_folder
from silkie_jax.errors import UserError

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "fcntl.flock"}
FILES = ("marker", "weights/a")


def fill(folder: Path, said: str) -> None:
    """Makes a folder whose every file says the same."""
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).write_text(said)


def found(folder: Path) -> str | None:
    """What a whole folder says; None where there is none (an empty one is none)."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    texts = {(folder / name).read_text() for name in FILES}
    assert len(texts) == 1, f"{folder} is a mixture of {texts}"
    return texts.pop()


def replace(dst: Path) -> None:
    with new_folder(dst, replace=("marker",)) as folder:
        fill(folder, "new")


def dies_at(step: int, dst: Path, act: Callable[[], None]) -> bool:
    """Replaces `dst` in a process of its own, which does `act` before its change number `step` (from 0).

    Returns whether there was such a step.
    """
    child = os.fork()
    if not child:
        reached = False
        changes = count()

        def hook(event: str, args: tuple) -> None:
            nonlocal reached
            changing = event in CHANGES or (event == "open" and args[2] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
            if changing and next(changes) == step:
                reached = True
                act()

        sys.addaudithook(hook)
        try:
            replace(dst)
        except (OSError, UserError):  # the one that was injected, or what was made of it
            pass
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(REACHED if reached else 0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL, REACHED << 8), f"ended with status {status}"
    return status != 0


REACHED = 100


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(5, "Input/output error")


def finish(dst: Path, before: str | None) -> None:
    """Old or new is whole, under its name or, between two renames, aside; and the next command goes on."""
    aside = found(dst.with_name("dst.partial") / "old")
    assert found(dst) in {before, "new"} or (found(dst) is None and aside in {before, "new"})
    replace(dst)
    assert found(dst) == "new"
    assert os.listdir(dst.parent) == ["dst"]


def main(folder: Path, how: str, before: str) -> int:
    old = "old" if before == "old" else None
    start, left, dst = folder / "start", folder / "left", folder / "now" / "dst"
    start.mkdir()
    if before == "old":
        fill(start / "dst", "old")
    elif before == "empty":
        (start / "dst").mkdir()

    def begin(world: Path) -> None:
        shutil.rmtree(dst.parent, ignore_errors=True)
        shutil.copytree(world, dst.parent)

    for step in count():
        begin(start)
        if not dies_at(step, dst, fail if how == "failed" else kill):
            return step
        if how == "killed twice":
            shutil.rmtree(left, ignore_errors=True)
            shutil.copytree(dst.parent, left)
            second = 0
            while dies_at(second, dst, kill):
                finish(dst, old)
                begin(left)
                second += 1
        else:
            finish(dst, old)
    raise AssertionError


if __name__ == "__main__":
    os.fsync = lambda _: (
        None
    )  # a kill loses nothing that was written, and waiting for the disk a thousand times is slow
    print(main(Path(sys.argv[1]), *sys.argv[2:]))
