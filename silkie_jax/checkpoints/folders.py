"""Folders that appear whole or not at all, and the files that travel with a model's weights."""

import errno
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from silkie_jax.errors import UserError
from silkie_jax.locks import lock

# In DST.partial, where DST is made. A kill may come between any two system calls: whatever it leaves there is put in
# order by whoever makes the same folder next.
_LOCK = ".lock"  # held by who works here; it is there whenever anything else is
_NEW = "new"  # becomes DST
_OLD = "old"  # was DST, for the moment between two renames
_TRASH = "trash-"  # begins the names of what is being removed

# What a checkpoint needs besides weights: configuration, vocabulary, the official code (never run here), licence.
TRAVELS = ("*.json", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
_STAYS = ("*.index.json", "silkie.json", "adapter_config.json")


@contextmanager
def new_folder(dst: str | Path, *, replace: Collection[str] = ()) -> Iterator[Path]:
    """Yields a folder within `DST.partial` to be filled, which becomes `dst` when the block ends well.

    However the block or the process ends, nothing half written or half removed ever has the name `dst`. What stood
    there steps aside before the new folder takes the name, and is removed only then; where a process dies in between,
    the next one puts it back. What a file system refuses to remove stays in `DST.partial`.

    Args:
      replace: an existing `dst` gives way to the new one if it holds a file of one of these names.

    Raises:
      UserError: `dst` exists, or another process is writing it.
    """
    dst = Path(dst)
    with _workshop(dst) as work:
        try:
            _tidy(work, dst)
            occupied = _occupied(dst)
            if occupied and not any((dst / name).exists() for name in replace):
                raise UserError(f"{dst}: already exists; remove it or choose another name")
            new = work / _NEW
            new.mkdir()
            yield new
            _sync(new)
            if occupied:
                dst.rename(work / _OLD)
            new.rename(dst)
            _sync_folder(dst.parent)
        except OSError as e:
            if e.errno == errno.ENOSPC:
                raise UserError(f"{dst}: the disk is full") from None
            raise
        finally:
            _tidy(work, dst)


@contextmanager
def _workshop(dst: Path) -> Iterator[Path]:
    """`DST.partial`, for this process alone; removed at the end unless something has to stay in it."""
    work = Path(os.path.abspath(dst) + ".partial")
    held = _enter(work, dst)
    try:
        yield work
    finally:
        with suppress(OSError):
            if os.listdir(work) == [_LOCK]:
                (work / _LOCK).unlink()  # while it is held: who waits for it notices that it has no name any more
        held.close()
        with suppress(OSError):  # something stays, or somebody else has come in
            work.rmdir()


def _enter(work: Path, dst: Path) -> IO[str]:
    """Makes `work` where it is not there, and returns its lock, which is held."""
    while True:
        try:
            names = os.listdir(work)
        except OSError:  # it is not there, or it is a file, and then it cannot be made
            names = []
        if names and _LOCK not in names:
            raise UserError(f"{work}: in the way, and not a leftover of ours; remove it")
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            if isinstance(e, FileExistsError) and (work.is_dir() or not os.path.lexists(work)):
                continue  # its last user removed it while it was looked at
            raise UserError(f"{work}: cannot be made ({e.strerror})") from None
        # Where its last user has just removed the folder, the file or its name is gone: once more.
        with suppress(FileNotFoundError):
            # A run of days must not fail at its end for a file system without locks.
            held = lock(work / _LOCK, f"{dst}: another process is writing it", optional=True)
            if (work / _LOCK).exists() and os.path.samestat(os.fstat(held.fileno()), os.stat(work / _LOCK)):
                return held
            held.close()


def _occupied(dst: Path) -> bool:
    """Whether something stands at `dst`; an empty folder does not count."""
    return os.path.lexists(dst) and (dst.is_symlink() or not dst.is_dir() or any(dst.iterdir()))


def _tidy(work: Path, dst: Path) -> None:
    """Puts back what stood at `dst` if nothing does, and removes everything else."""
    if os.path.lexists(work / _OLD) and not _occupied(dst):
        (work / _OLD).rename(dst)
    for path in list(work.iterdir()):
        if path.name != _LOCK:
            _remove(path)


def _remove(path: Path) -> None:
    """Removes what lies in `DST.partial`, or takes its name away at least: half of it is never taken for the whole."""
    with suppress(OSError):
        if not path.name.startswith(_TRASH):
            path = path.rename(path.with_name(f"{_TRASH}{uuid.uuid4().hex}"))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def check_room(folder: Path, needed: int) -> None:
    """Refuses to begin what the disk cannot hold.

    Args:
      folder: what `new_folder` gave.
      needed: bytes.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        where = folder.parents[1]  # the folder that the new one will lie in
        raise UserError(f"{where}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; make room first")


def copy_side_files(src: Path, dst: Path) -> None:
    """Copies everything but weights that belongs to a model: configuration, tokenizer, official code, licence."""
    for pattern in TRAVELS:
        for path in sorted(src.glob(pattern)):
            if path.is_file() and not any(path.match(p) for p in _STAYS):
                shutil.copyfile(path, dst / path.name)


def _sync(folder: Path) -> None:
    """Makes a folder's files durable before its name says that they are complete."""
    for parent, _, files in os.walk(folder):
        for name in files:
            with open(Path(parent) / name, "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
