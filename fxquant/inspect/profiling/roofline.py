"""The peaks of the machine: integer and float matrix products and memory traffic, measured for each profile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SHAPES = ((512, 1152, 4608), (2048, 1024, 1024))
"""Rows, inputs and outputs of products that processors run efficiently; the first is DiT-XL's feed-forward."""

_SECONDS = 0.25  # Duration of each measurement.
_BYTES = 256 << 20  # More than caches can hold.


@dataclass(frozen=True)
class Roofline:
    """Peaks of one machine, at the number of threads that they were measured with.

    Attributes:
        int8: Billions of operations (two per multiply-add) per second for products of uint8 and int8; None if this
            build of torch has no such product.
        floating: Billions of operations per second for products in the model's dtype.
        dtype: The model's dtype.
        memory: Billions of bytes per second, read and written, of a copy.
        threads: Number of torch threads, on a CPU.
    """

    int8: float | None
    floating: float
    dtype: str
    memory: float
    threads: int

    def peak(self, integer: bool) -> float:
        """Peak of integer or of float products, in billions of operations per second."""
        return self.int8 if integer and self.int8 is not None else self.floating

    def bound(self, operations: int, traffic: int, integer: bool) -> str:
        """What limits the speed of work with these operations and bytes: ``compute`` or ``memory``."""
        return "compute" if operations / self.peak(integer) >= traffic / self.memory else "memory"


def measure_roofline(
    dtype: torch.dtype, device: torch.device | str = "cpu", shapes: Sequence[tuple[int, int, int]] = SHAPES
) -> Roofline:
    """Measure the peaks, in about two seconds.

    Args:
        dtype: Dtype of the float products.
        device: The device to measure.
        shapes: Rows, inputs and outputs of the products; the best of them is the peak.
    """
    device = torch.device(device)
    floating = _best(partial(_float_product, dtype=dtype), shapes, device)
    assert floating is not None
    return Roofline(
        int8=_best(int8_product, shapes, device),
        floating=floating,
        dtype=str(dtype).removeprefix("torch."),
        memory=_copy_rate(device),
        threads=torch.get_num_threads(),
    )


Work = Callable[[], Any]


def int8_product(rows: int, inputs: int, outputs: int, device: torch.device) -> Work | None:
    """A product of uint8 codes ``[rows, inputs]`` and an int8 weight with the fastest available kernel, or None."""
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
    if device.type == "cpu":
        if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")):
            return None
        codes = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8)
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        scale, offsets = torch.full((outputs,), 1e-3, dtype=torch.float32), torch.zeros(outputs, dtype=torch.int64)
        # Results in bfloat16 write half as much. Without AVX-512, oneDNN's loop for them is hundreds of times slower.
        wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and "ONEDNN_MAX_CPU_ISA" not in os.environ
        rest: tuple[Any, ...] = (None, 1.0, 0, torch.bfloat16 if wide else torch.float32, "none", [], "")
        return lambda: torch.ops.onednn.qlinear_pointwise(codes, 1e-2, 128, packed, scale, offsets, *rest)
    if device.type != "cuda":
        return None
    signed = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8, device=device)
    return lambda: torch._int_mm(signed, weight.t())


def _float_product(rows: int, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype) -> Work:
    x = torch.randn(rows, inputs, device=device).to(dtype)
    weight = torch.randn(outputs, inputs, device=device).to(dtype)
    return lambda: functional.linear(x, weight)


def _best(
    make: Callable[..., Work | None], shapes: Sequence[tuple[int, int, int]], device: torch.device
) -> float | None:
    rates = []
    for shape in shapes:
        work = make(*shape, device=device)
        if work is None:
            return None
        rows, inputs, outputs = shape
        rates.append(2e-9 * rows * inputs * outputs / _shortest(work, device))
    return max(rates)


def _copy_rate(device: torch.device) -> float:
    source = torch.zeros(_BYTES // 4, dtype=torch.float32, device=device)
    target: Tensor = torch.empty_like(source)
    return 2e-9 * _BYTES / _shortest(lambda: target.copy_(source), device)


@torch.no_grad()
def _shortest(work: Work, device: torch.device) -> float:
    """Seconds of the fastest of many calls, because a peak is measured without disturbances."""
    work()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        best = min(best, timed(work, device)[1])
    return best


def timed(work: Work, device: torch.device) -> tuple[Any, float]:
    """What a call returns, and its duration in seconds; on a GPU until all its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - began
