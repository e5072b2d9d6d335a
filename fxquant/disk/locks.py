"""Locks on folders."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

if sys.platform != "win32":
    import fcntl


class Lock:
    """A lock on a folder. It ends when the process that holds it ends, however the process ends."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    @classmethod
    def of(cls, path: Path, *, certain: bool = False) -> Lock | None:
        """Lock a folder.

        Args:
            path: The folder.
            certain: Whether to return None also if the system or the file system has no locks. If False, the lock that
                is returned in this case does not keep other processes away.

        Returns:
            None if another process has locked the folder, or if the folder is gone.
        """
        if sys.platform == "win32":
            return None if certain else cls(None)
        try:
            lock = cls(os.open(path, os.O_RDONLY))
            try:
                fcntl.flock(lock._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[arg-type]
            except OSError as error:
                if certain or error.errno in (errno.EAGAIN, errno.EACCES):
                    return None
            return lock if os.path.samestat(os.fstat(lock._descriptor), path.stat()) else None  # type: ignore[arg-type]
        except OSError:
            return None
