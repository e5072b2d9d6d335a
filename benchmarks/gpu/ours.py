"""Our systems: recipes on the native backend, with products of integers and of 8-bit floats."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import fxquant
from benchmarks.gpu.job import Job
from benchmarks.gpu.systems import Made
from fxquant.backends.native import Native
from fxquant.backends.native.gpu import machine
from fxquant.errors import BackendError

_RECIPES = (
    ("W8A8 int8", "rtn-w8a8", 15.0),
    ("W8A8 dynamic", "dynamic-w8a8", 15.0),
    ("W8A8 fp8", "rtn-wfp8afp8", 15.0),
    ("W4A8", "rtn-w4a8", 5.0),
    ("W4A8-g64", "rtn-w4a8-g64", 5.0),
    ("W4A16-g64", "rtn-w4a16-g64", 5.0),
)


def our_makings() -> Iterator[Made]:
    """One per recipe."""
    for name, recipe, least in _RECIPES:
        yield _made(name, recipe, least)


def _made(name: str, recipe: str, least: float) -> Made:
    def make(job: Job) -> nn.Module:
        model = job.model()
        backend = Native(kernels="triton", device=job.device)
        return fxquant.compile(model, recipe=recipe, backend=backend, calibrate=lambda: job.calibrate(model), measure=0)

    def lacks(device: torch.device) -> str | None:
        try:
            _ = Native(kernels="triton", device=device).kernels
        except BackendError as error:
            return str(error)
        return machine.missing(device, fp8=True) if "fp8" in recipe else None

    return Made(f"native {name}", make, least, lacks=lacks)
