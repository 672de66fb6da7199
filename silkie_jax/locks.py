"""Locks on files, by which two processes keep out of each other's way; the kernel frees them however a process ends."""

import errno
import fcntl
from pathlib import Path
from typing import IO

from silkie_jax.errors import UserError

_HELD = (errno.EWOULDBLOCK, errno.EACCES)


def lock(path: Path, busy: str, *, optional: bool = False) -> IO[str]:
    """Takes the lock on a file, which is made where it is absent; closing what is returned frees it.

    Args:
        path: the file.
        busy: what to say where another process holds the lock.
        optional: whether to go on without a lock where the file system has none.

    Raises:
        UserError: another process holds it, or the file system has no locks and they are not optional.
        OSError: the file cannot be made.
    """
    file = open(path, "w")  # noqa: SIM115 (open as long as the lock is held)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if optional and error.errno not in _HELD:
            return file
        file.close()
        if error.errno in _HELD:
            raise UserError(busy) from None
        raise UserError(
            f"{path} cannot be locked ({error.strerror}): use a local disk, or one that is mounted with locks"
        ) from None
    return file
