"""Folders that appear whole or not at all, and the files that travel with a model's weights."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from silkie_jax.errors import UserError

_LOCK = ".lock"
# What a checkpoint needs besides weights: configuration, vocabulary, the official code (never run here), licence.
TRAVELS = ("*.json", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
_STAYS = ("*.index.json", "silkie.json", "adapter_config.json")


@contextmanager
def new_folder(dst: str | Path, *, replace: str | None = None) -> Iterator[Path]:
    """Yields `DST.partial` to be filled, and renames it to `dst` when the block ends well.

    However the block ends, `dst` is never half written. What a killed run left behind is removed by the next one.

    Args:
      replace: an existing `dst` gives way to the new one if it holds a file of this name.

    Raises:
      UserError: `dst` exists, or another process is writing it.
    """
    dst = Path(dst)
    partial = Path(os.path.abspath(dst) + ".partial")
    occupied = dst.is_file() or (dst.is_dir() and any(dst.iterdir()))
    if occupied and not (replace and (dst / replace).is_file()):
        raise UserError(f"{dst}: already exists; remove it or choose another name")
    if partial.is_dir() and any(partial.iterdir()) and not (partial / _LOCK).exists():
        raise UserError(f"{partial}: in the way, and not a leftover of ours; remove it")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{partial}: cannot be made ({e.strerror})") from None
    with open(partial / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except OSError:
            raise UserError(f"{dst}: another process is writing it") from None
        try:
            _clear(partial)
            yield partial
            _sync(partial)
            (partial / _LOCK).unlink()
            if occupied:
                _remove(dst)
            partial.rename(dst)
            _sync_folder(dst.parent)
        except BaseException as e:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(e, OSError) and e.errno == errno.ENOSPC:
                raise UserError(f"{dst}: the disk is full") from None
            raise


def check_room(folder: Path, needed: int) -> None:
    """Refuses to begin what the disk cannot hold; `needed` in bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder.parent}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; make room first"
        )


def copy_side_files(src: Path, dst: Path) -> None:
    """Copies everything but weights that belongs to a model: configuration, tokenizer, official code, licence."""
    for pattern in TRAVELS:
        for path in sorted(src.glob(pattern)):
            if path.is_file() and not any(path.match(p) for p in _STAYS):
                shutil.copyfile(path, dst / path.name)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != _LOCK:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


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
