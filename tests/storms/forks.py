"""Forks of this process that are killed at random moments, and the command line of storms."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path


def forked(run: Callable[[], int]) -> int:
    """Run a function in a fork, whose exit code it returns; returns its process id."""
    child = os.fork()
    if child:
        return child
    answer = 1
    try:
        answer = run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(answer)


def killed(child: int, seconds: float) -> bool:
    """Kill a fork (SIGKILL) within some seconds; False if it had ended before."""
    time.sleep(random.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def exit_code(child: int) -> int:
    """Wait for a fork that nobody kills."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(text: str | None, name: str, run: Callable[[int, Path], tuple[Sequence[str], bool]]) -> int:
    """Read ``--kills`` and ``--seed``, run trials in a new folder, and print what came of them.

    Args:
        text: Description of the command.
        name: Part of the folder's name.
        run: Gets the number of kills and the folder; returns lines, and whether all was as promised.

    Returns:
        0 if all was as promised. Otherwise 1, and the folder stays.
    """
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    random.seed(options.seed)
    folder = Path(tempfile.mkdtemp(prefix=f"fxquant-{name}-"))
    lines, good = run(options.kills, folder)
    print("\n".join(lines))
    if not good:
        print(f"what is left of it is in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0
