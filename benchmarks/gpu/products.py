"""Matrix products of torch and ours, each with its expected result in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, int, int]
"""Rows, inputs and outputs."""

FP8 = torch.float8_e4m3fn
BF16_STEP = 2.0**-8
FLOAT_SUMS = 2.0**-20
"""Allowed error of long sums in float32, as a share of the sum of magnitudes."""
FP8_SUMS = 2.0**-11
"""The same for products of 8-bit floats, whose sums tensor cores keep in fewer bits."""


@dataclass(frozen=True)
class Case:
    """One product, ready to run.

    Attributes:
        run: Returns `[rows, outputs]`, computed anew in each call.
        left: Returns the true values of the activations in float64, `[rows, inputs]` for a range of rows.
        right: Returns the true values of the weight in float64, `[outputs, inputs]`.
        step: Allowed error of rounding the result, as a share of the result.
        sums: Allowed error of summation, as a share of the sum of magnitudes.
        target: The tensor that `run` always writes to, if there is one.
        bias: Added to the product, `[outputs]`.
    """

    run: Callable[[], Tensor]
    left: Callable[[slice], Tensor]
    right: Callable[[], Tensor]
    step: float
    sums: float
    target: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Product:
    """A way to multiply.

    Attributes:
        name: Name in the table.
        numbers: Kind of number that it multiplies: ``bf16``, ``int8`` or ``fp8``. Shares are relative to its peak.
        make: Makes the product with random inputs of a shape.
        lacks: Returns why it cannot run on a device, or None.
    """

    name: str
    numbers: str
    make: Callable[[Shape, torch.device], Case]
    lacks: Callable[[torch.device], str | None] = lambda device: None


def all_products() -> list[Product]:
    """The products of torch, then ours."""
    from benchmarks.gpu.our_products import our_products

    return [*_of_torch(), *our_products()]


def _of_torch() -> Iterator[Product]:
    yield Product("torch.mm", "bf16", _mm)
    yield Product("torch._int_mm", "int8", _int_mm)
    yield Product("torch._scaled_mm, per row", "fp8", _scaled_mm, lacks_fp8)


def lacks_fp8(device: torch.device) -> str | None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "the device cannot multiply 8-bit floats"
    return None


def _mm(shape: Shape, device: torch.device) -> Case:
    x, weight = _normal(shape, device)
    x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
    out = x.new_empty(shape[0], shape[2])
    return Case(
        lambda: torch.mm(x, weight.t(), out=out),
        lambda rows: x[rows].double(),
        weight.double,
        BF16_STEP,
        FLOAT_SUMS,
        out,
    )


def _int_mm(shape: Shape, device: torch.device) -> Case:
    rows, inputs, outputs = shape
    x = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8, device=device)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
    out = torch.empty(rows, outputs, dtype=torch.int32, device=device)
    return Case(
        lambda: torch._int_mm(x, weight.t(), out=out), lambda rows: x[rows].double(), weight.double, 0.0, 0.0, out
    )


def _scaled_mm(shape: Shape, device: torch.device) -> Case:
    x, weight = _normal(shape, device)
    x_scale, w_scale = (tensor.abs().amax(1, keepdim=True) / 448.0 for tensor in (x, weight))
    xq, wq = (x / x_scale).to(FP8), (weight / w_scale).to(FP8)
    out = torch.empty(shape[0], shape[2], dtype=torch.bfloat16, device=device)

    def run() -> Tensor:
        torch._scaled_mm(xq, wq.t(), x_scale, w_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True, out=out)
        return out

    return Case(
        run,
        lambda rows: xq[rows].double() * x_scale[rows].double(),
        lambda: wq.double() * w_scale.double(),
        BF16_STEP,
        FP8_SUMS,
        out,
    )


def _normal(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, inputs, outputs = shape
    return torch.randn(rows, inputs, device=device), torch.randn(outputs, inputs, device=device)
