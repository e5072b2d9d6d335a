"""Our systems: recipes on each backend, saved and loaded, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import fxquant
from benchmarks.cpu.systems import Run, Stored, System
from benchmarks.models import Task, cast
from fxquant.backends.native import Native
from fxquant.pipeline.backend import BACKENDS, Backend
from fxquant.pipeline.recipes import Recipe, make_recipe

_MAIN = ("W8A8", "W8A8 dynamic", "W4A8")


def our_systems() -> Iterator[System]:
    """Our systems on each backend; backends that are not available are left out."""
    plain = make_recipe("ptq4dit-w8a8")
    attention = plain.with_options("assign-precision", attention="quantized")
    stored = {
        "W8A8": _checkpoint("w8a8", plain),
        "W8A8 symmetric": _checkpoint("w8a8-symmetric", _symmetric(plain)),
        "W8A8, attention too": _checkpoint("w8a8-attention", attention),
        "W8A8, all layers": _checkpoint("w8a8-all", make_recipe("ptq4dit-w8a8", "all")),
        "W8A8, bf16 rest": _checkpoint("w8a8-bf16", plain, torch.bfloat16),
        "W8A8 HTG bins": _checkpoint("w8a8-htg", make_recipe("htg-w8a8")),
        "W8A8 dynamic": _checkpoint("w8a8-dynamic", make_recipe("dynamic-w8a8")),
        "W4A8": _checkpoint("w4a8", make_recipe("ptq4dit-w4a8")),
    }
    for name in ("W8A8", "W8A8, all layers"):
        yield System(f"native {name}, eager", _loaded("native", compiled=False), stored[name], main=True)
    for name, made in stored.items():
        dtype = torch.bfloat16 if "bf16" in name else torch.float32
        start = _loaded("native", compiled=True, dtype=dtype)
        yield System(f"native {name}, compiled", start, made, main=name in _MAIN)
    for name, recipe in (("W8A8", plain), ("W8A8, all layers", make_recipe("ptq4dit-w8a8", "all"))):
        yield System(f"native {name}, ahead of time", _packaged, _package(f"aot-{name}", recipe))
    start = _loaded(partial(Native, kernels="onednn"), compiled=True)
    yield System("native (oneDNN kernels) W8A8 symmetric, compiled", start, stored["W8A8 symmetric"])
    if "torchao" in BACKENDS:
        for name in ("W8A8", "W8A8 symmetric"):
            start = _loaded("torchao", compiled=True, freezing=True)
            yield System(f"backend torchao {name}, compiled", start, stored[name], ("torchao",))


def _symmetric(recipe: Recipe) -> Recipe:
    return recipe.with_options("quantize-linears", symmetric=True)


def _checkpoint(name: str, recipe: Recipe, dtype: torch.dtype = torch.float32) -> Stored:
    def make(task: Task, folder: Path) -> None:
        model = task.model(dtype)
        quantized = fxquant.compile(model, recipe=recipe, calibrate=lambda: task.calibrate(model, dtype), measure=0)
        fxquant.save(quantized, folder)

    return Stored(name, make)


def _package(name: str, recipe: Recipe) -> Stored:
    def make(task: Task, folder: Path) -> None:
        model = task.model(torch.float32)
        calibrate = partial(task.calibrate, model, torch.float32)
        fxquant.export_aot(
            fxquant.compile(model, recipe=recipe, backend="native", calibrate=calibrate, measure=0), folder
        )

    return Stored(name, make)


def _packaged(task: Task, folder: Path) -> Run:
    model = fxquant.load_package(folder)
    return lambda call: model(**call)[0]


def _loaded(
    backend: str | Callable[[], Backend], *, compiled: bool, freezing: bool = False, dtype: torch.dtype = torch.float32
) -> Callable[[Task, Path], Run]:
    def start(task: Task, folder: Path) -> Run:
        model = fxquant.load(folder, backend=backend if isinstance(backend, str) else backend())
        module = torch.compile(model) if compiled else model
        if freezing:
            with torch._inductor.config.patch(freezing=True):
                module(**cast(task.timed, dtype))
        return lambda call: module(**cast(call, dtype))[0]

    return start
