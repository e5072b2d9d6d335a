"""A task on a device: its model in bfloat16, its calls, and what its output should be."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from benchmarks.models import Task, cast
from benchmarks.shapes import Call

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Exact:
    """What outputs are compared with.

    Attributes:
        output: Of the timed call, on the CPU.
        said: How it was computed.
    """

    output: Tensor
    said: str


@dataclass
class Job:
    """A task on a device."""

    task: Task
    device: torch.device

    def model(self) -> nn.Module:
        """The model, each time the same; it is made in bfloat16, so that one of the largest takes no more."""
        with self.device, _made_in(DTYPE):
            model = self.task.make()
        return model.to(self.device, DTYPE).eval().requires_grad_(False)

    @cached_property
    def calls(self) -> list[Call]:
        """Those to calibrate with."""
        return [self._moved(call) for call in self.task.calls]

    @cached_property
    def timed(self) -> Call:
        """The call that is checked and timed."""
        return self._moved(self.task.timed)

    def _moved(self, call: Call) -> Call:
        return {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in cast(call, DTYPE).items()
        }

    def calibrate(self, model: nn.Module) -> None:
        """Run a model on all calibration calls."""
        for call in self.calls:
            model(**call)

    @cached_property
    def exact(self) -> Exact:
        """What the output of the timed call should be, in float32 if that fits."""
        try:
            return self._in_float32()
        except torch.OutOfMemoryError:
            pass  # What the failed attempt holds is only let go behind this block.
        free()
        return Exact(self.model()(**self.timed)[0].cpu(), "eager bf16, as float32 does not fit")

    def _in_float32(self) -> Exact:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            model = self.model().float()
            return Exact(model(**cast(self.timed, torch.float32))[0].cpu(), "float32")
        finally:
            torch.set_float32_matmul_precision(precision)


@contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def free() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def held(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU."""
    gc.collect()
    return torch.cuda.memory_allocated(device)
