"""Our products, called as lowered graphs call them: codes in, bfloat16 out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.products import BF16_STEP, FLOAT_SUMS, FP8, FP8_SUMS, Case, Product, Shape
from fxquant.backends.native.gpu import machine, weights
from fxquant.backends.native.gpu import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.numerics.formats import Scales
from fxquant.numerics.packing import pack
from fxquant.numerics.weights import dequantize_weight

_ZERO_POINT = 113
"""Zero point of the activations, neither in the middle nor at an end."""


def our_products() -> Iterator[Product]:
    """One product per kind of weight that the kernels accept."""
    yield _product("native s8 x s8", _Kind(8))
    yield _product("native s8 x s8, symmetric weights", _Kind(8, symmetric=True))
    yield _product("native s8 x u4", _Kind(4))
    yield _product("native s8 x u4, groups of 64", _Kind(4, group_size=64))
    yield Product("native bf16 x u4, groups of 64", "bf16", partial(_weights_alone, _Kind(4, 64)), machine.missing)
    yield Product("native e4m3 x e4m3", "fp8", _floats, partial(machine.missing, fp8=True))


@dataclass(frozen=True)
class _Kind:
    bits: int
    group_size: int = 0
    symmetric: bool = False


def _product(name: str, kind: _Kind) -> Product:
    return Product(name, "int8", partial(_codes, kind), machine.missing)


def _weight(shape: Shape, kind: _Kind, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random packed codes, scales and zero points."""
    _, inputs, outputs = shape
    groups = -(-inputs // kind.group_size) if kind.group_size else 1
    middle = 2 ** (kind.bits - 1)
    packed = pack(torch.randint(0, 2**kind.bits, (outputs, inputs), dtype=torch.uint8, device=device), kind.bits)
    scale = torch.rand(outputs, groups, device=device) / inputs + 1e-4
    if kind.symmetric:
        return packed, scale, torch.full((outputs, groups), middle, dtype=torch.uint8, device=device)
    low, high = middle - middle // 8 - 1, middle + middle // 8 + 1
    return packed, scale, torch.randint(low, high + 1, (outputs, groups), dtype=torch.uint8, device=device)


def _codes(kind: _Kind, shape: Shape, device: torch.device) -> Case:
    rows, inputs, outputs = shape
    packed, scale, zero_point = _weight(shape, kind, device)
    halves = weights.in_halves(kind.bits, packed=True)
    x = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8, device=device)
    x_scale, x_zero_point = _grid(device)
    held = weights.kernel_codes(packed, zero_point, kind.bits, inputs, halves, kind.group_size)
    sums = weights.sums(packed, scale, zero_point, kind.bits, inputs, kind.group_size)
    offset = weights.offset(zero_point, kind.bits)
    # Made beforehand: in a model, layers that read the same value share these sums.
    x_sums = None if offset is None else torch.ops.fxquant_native.triton_row_sums(x)
    bias = torch.randn(outputs, device=device).to(torch.bfloat16)
    arguments = (x, x_scale, x_zero_point, held, scale, zero_point, sums, bias, kind.bits, outputs, "none")
    nothing = (None, None, None, None, 255, torch.bfloat16, kind.group_size, offset, x_sums)
    grid = f"int{kind.bits}", kind.group_size, inputs, torch.float64
    return Case(
        lambda: torch.ops.fxquant_native.triton_linear(*arguments, *nothing),
        lambda part: x_scale.double() * (x[part].double() + (weights.MIDDLE - _ZERO_POINT)),
        lambda: dequantize_weight(packed, Scales(scale.double(), zero_point), *grid),
        _step(),
        FLOAT_SUMS,
        bias=bias,
    )


def _weights_alone(kind: _Kind, shape: Shape, device: torch.device) -> Case:
    rows, inputs, outputs = shape
    packed, scale, zero_point = _weight(shape, kind, device)
    halves = weights.in_halves(kind.bits, packed=True)
    held = weights.kernel_codes(packed, zero_point, kind.bits, inputs, halves, kind.group_size)
    x = torch.randn(rows, inputs, device=device).to(torch.bfloat16)
    bias = torch.randn(outputs, device=device).to(torch.bfloat16)
    arguments = (x, held, scale, zero_point, bias, kind.bits, kind.group_size, outputs)
    grid = f"int{kind.bits}", kind.group_size, inputs, torch.float64
    return Case(
        lambda: torch.ops.fxquant_native.triton_weight_only_linear(*arguments),
        lambda part: x[part].double(),
        lambda: dequantize_weight(packed, Scales(scale.double(), zero_point), *grid),
        _step(),
        FLOAT_SUMS,
        bias=bias,
    )


def _floats(shape: Shape, device: torch.device) -> Case:
    rows, inputs, outputs = shape
    x, held = ((torch.randn(n, inputs, device=device) * 100).clamp(-448, 448).to(FP8) for n in (rows, outputs))
    unit, step = torch.tensor(0.02, device=device), torch.rand(outputs, 1, device=device) * 1e-4
    bias = torch.randn(outputs, device=device).to(torch.bfloat16)
    arguments = (x, unit, None, held, step, None, None, bias, 8, outputs, "none")
    nothing = (None, None, None, None, 255, torch.bfloat16, 0, None, None)
    return Case(
        lambda: torch.ops.fxquant_native.triton_linear(*arguments, *nothing),
        lambda part: unit.double() * x[part].double(),
        lambda: held.double() * step.double(),
        _step(),
        FP8_SUMS,
        bias=bias,
    )


def _step() -> float:
    """Rounding error. Triton's interpreter truncates the bits that bfloat16 lacks; devices round to nearest."""
    return 2 * BF16_STEP if machine.interprets() else BF16_STEP


def _grid(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(0.02, device=device), torch.tensor(_ZERO_POINT, dtype=torch.uint8, device=device)
