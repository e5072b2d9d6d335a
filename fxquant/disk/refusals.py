"""Errors of the system while something is written, as errors that name it and say what to do."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fxquant.errors import CheckpointError, WriteError
from fxquant.text import size

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the system while a path is written into a :class:`WriteError`."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        reason, number = getattr(error, "strerror", None) or error, _errno_of(error)
        advice = "check the disk and its permissions"
        if number in _FULL:
            advice = f"{_space(path, number)}, and what was there before is unchanged"
        raise WriteError(
            f"{path} cannot be written: {reason}; {advice}, or choose another place", errno=number
        ) from error


def _errno_of(error: OSError | SafetensorError) -> int | None:
    """The number of an error of the system; errors of safetensors have it in their text only."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) or (int(found[1]) if found else None)


def _space(path: Path, number: int | None) -> str:
    """What to do about a disk that takes no more."""
    if number == errno.EFBIG:
        return "raise the limit of the size of files (ulimit -f)"
    there = path.absolute()
    while not there.is_dir():
        there = there.parent
    return f"free space on the disk of {there}, which has {size(shutil.disk_usage(there).free)} left"
