"""Exchange two folders in one step, and force files and folders to the disk."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

_ABSENT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # Errors of systems without the call.


def exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step.

    Returns:
        False if the system or the file system has no such step; then nothing has changed.

    Raises:
        OSError: If the exchange fails, for example because one of the folders does not exist.
    """
    call = _renameat2()
    if call is None:
        return False
    current, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE.
    if call(current, os.fsencode(one), current, os.fsencode(other), both) == 0:
        return True
    number = ctypes.get_errno()
    if number in _ABSENT:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    """The Linux call ``renameat2``, which Python does not offer; None if the C library does not have it."""
    if sys.platform != "linux":
        return None
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call


def force_to_disk(folder: Path) -> None:
    """Force a folder and everything in it to the disk."""
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            force(Path(path, name))
        force(Path(path))


def force(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    if os.name == "nt":  # Windows does not let programs open a folder.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Some file systems cannot, such as some of FUSE.
            raise
    finally:
        os.close(descriptor)
