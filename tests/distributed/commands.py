"""Commands in several processes, as torchrun starts them, with accidents in one of them."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler


def command(
    rank: int, size: int, folder: Path, arguments: Sequence[Sequence[str]], accident: str = "", on: int = 1
) -> None:
    """Run a command; what it prints is in files of the folder. The process ends with its exit code.

    Args:
        rank: Number of this process.
        size: Number of processes.
        folder: Each process runs in a folder of its own in it, if there is one: ``0``, ``1`` and so on.
        arguments: Arguments of each process.
        accident: Name of a function of this module that one process calls first.
        on: The rank of this process.
    """
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    own = folder / str(rank)
    os.chdir(own if own.is_dir() else folder)
    if accident and rank == on:
        globals()[accident]()
    sys.argv = ["fxquant", *arguments[rank]]
    from fxquant.cli.__main__ import main

    main()


def killed_in_calibration() -> None:
    """The process is killed in its second step."""
    _at_second_step(lambda: os.kill(os.getpid(), signal.SIGKILL))


def fails_in_calibration() -> None:
    """The scheduler fails in its second step."""

    def fail() -> None:
        raise ValueError("no more ink")

    _at_second_step(fail)


def _at_second_step(happens: Any) -> None:
    original, count = DDIMScheduler.step, []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        count.append(0)
        if len(count) == 2:
            happens()
        return original(self, *args, **kwargs)

    DDIMScheduler.step = step  # type: ignore[method-assign]


def killed_in_learning() -> None:
    """The process is killed in its second step of learning, while others wait for its gradients."""
    learn = importlib.import_module("fxquant.reconstruction.learn")
    original, count = learn._add_up_gradients, []

    def add_up(*args: Any) -> None:
        count.append(0)
        if len(count) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args)

    learn._add_up_gradients = add_up  # type: ignore[attr-defined]


def killed_in_writing() -> None:
    """The process is killed when the folder is half written."""
    from fxquant.disk.folders import whole_folder

    def save(pipe: Any, folder: Path, overwrite: bool) -> None:
        with whole_folder(folder.resolve(), lambda path: None) as unfinished:
            (unfinished / "model_index.json").write_text("{")
            os.kill(os.getpid(), signal.SIGKILL)

    importlib.import_module("fxquant.cli.quantize")._save = save  # type: ignore[attr-defined]
