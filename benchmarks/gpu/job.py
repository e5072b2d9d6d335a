"""A task on a device: its model in bfloat16, its calls, and its expected output."""

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
    """The expected output, which other outputs are compared with.

    Attributes:
        output: Output of the timed call, on the CPU.
        said: Description of how it was computed.
    """

    output: Tensor
    said: str


@dataclass
class Job:
    """A task on a device."""

    task: Task
    device: torch.device

    def model(self) -> nn.Module:
        """The model, with the same weights each time; made in bfloat16, so large ones never need float32 memory."""
        with self.device, _made_in(DTYPE):
            model = self.task.make()
        return model.to(self.device, DTYPE).eval().requires_grad_(False)

    @cached_property
    def calls(self) -> list[Call]:
        """The calibration calls."""
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
        """The expected output of the timed call, in float32 if that fits in memory."""
        try:
            return self._in_float32()
        except torch.OutOfMemoryError:
            pass  # The memory of the failed attempt is released only after this block.
        free()
        return Exact(self.model()(**self.timed)[0].cpu(), "eager bf16, because float32 does not fit in memory")

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
    """Free memory that nothing references any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def held(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU."""
    gc.collect()
    return torch.cuda.memory_allocated(device)
