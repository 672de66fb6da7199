"""Compiled programs kept on disk: a run that goes on compiles nothing again."""

import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from silkie_jax.errors import UserError

LIMIT = 4 * 2**30  # bytes that a folder keeps (JAX has a limit, too, whose books are out of order after a kill)


def users_folder() -> Path | None:
    """Where programs of commands that have no folder of their own are kept; None for a user without a home."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "silkie_jax" / "compiled" if os.path.isabs(cache) else None


@contextmanager
def kept_programs(folder: Path | None) -> Iterator[None]:
    """Within the block what is compiled is taken from `folder`, or else put there.

    An own choice of JAX's cache (`JAX_COMPILATION_CACHE_DIR`) stands instead. Of several processes the first writes.
    Without a folder, or where it cannot be written to, nothing is kept. What lies there is machine code that JAX
    trusts: the folder must be the user's own, never one that comes with data.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    now = jax.config.values
    chosen = now["jax_compilation_cache_dir"] or not now["jax_enable_compilation_cache"]
    if chosen or folder is None or not _writable(folder):
        yield
        return
    first, made = jax.process_index() == 0, not folder.parent.exists()
    if first:
        _put_in_order(folder)
    # By default JAX leaves out what compiles within a second, and a run has many of those.
    options = {"jax_compilation_cache_dir": str(folder.absolute()), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: now[name] for name in options}

    def choose(values: dict[str, Any]) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX looks at them at the first compilation only

    choose(options)
    try:
        yield
    except UserError:
        # A mistake that is found before a run begins leaves no folder of one.
        if first and made and not any(folder not in path.parents for path in _files(folder.parent)):
            shutil.rmtree(folder.parent, ignore_errors=True)
        raise
    finally:
        choose(before)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir())


def _writable(folder: Path) -> bool:
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), None)
    return there is not None and there.is_dir() and os.access(there, os.W_OK)


def _put_in_order(folder: Path) -> None:
    """Removes the oldest entries beyond LIMIT, and the newest if it was cut off.

    JAX writes an entry in place and then never again: it would complain of that one at every start.
    """
    with suppress(OSError):
        entries = sorted(folder.glob("*-cache"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        if entries and not _is_whole(entries[0]):
            entries.pop(0).unlink()
        size = 0
        for path in entries:
            size += path.stat().st_size
            if size > LIMIT:
                path.unlink()


def _is_whole(entry: Path) -> bool:
    data = entry.read_bytes()
    if data.startswith(b"\x28\xb5\x2f\xfd"):  # zstd, where its library is installed; otherwise zlib
        return True
    try:
        zlib.decompress(data)
    except zlib.error:
        return False
    return True
