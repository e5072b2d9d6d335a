"""Calls the product of float activations and weights in float formats: checks arguments and allocates the result."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.backends.native.gpu import machine
from fxquant.backends.native.gpu.arguments import check_floats
from fxquant.backends.native.gpu.configs import Config, step_of
from fxquant.backends.native.gpu.weight_only import config_for
from fxquant.backends.native.gpu.weights import LEAST_GROUP, half_of, held_width
from fxquant.errors import BackendError
from fxquant.numerics.formats import FORMATS


@dataclass(frozen=True)
class Layout:
    """How the kernel reads a format.

    Attributes:
        exponent: Bits of the exponent of an element.
        mantissa: Bits of its mantissa; with no exponent, elements are looked up in the values of the format.
        scales: How scales are stored: ``float32``, ``e8m0`` or ``e4m3``.
    """

    exponent: int
    mantissa: int
    scales: str


LAYOUTS = {
    "nf4": Layout(0, 0, "float32"),
    "mxfp4": Layout(2, 1, "e8m0"),
    "nvfp4": Layout(2, 1, "e4m3"),
    "fp8": Layout(4, 3, "float32"),
    "fp8e5m2": Layout(5, 2, "float32"),
    "mxfp8": Layout(4, 3, "e8m0"),
    "mxfp6": Layout(2, 3, "e8m0"),
    "mxfp6e3m2": Layout(3, 2, "e8m0"),
}


def fits(format: str, group_size: int) -> bool:
    """Whether the kernel takes weights of a format in groups of `group_size` inputs, 0 for one group."""
    whole = group_size % LEAST_GROUP == 0 or LEAST_GROUP % group_size == 0  # 0 is a multiple.
    return format in LAYOUTS and whole


def choose(rows: int, group_size: int) -> Config:
    """The tiling for a product of `rows` rows. A step lies in one group, or holds whole groups."""
    config = config_for(rows)
    step = config.block_k
    if group_size and step % group_size:
        step = step_of(config, group_size)
    return Config(config.block_m, config.block_n, step, config.warps, config.stages)


@functools.cache
def numbers_on(format: str, device: torch.device) -> Tensor | None:
    """The table of the elements of a format, float32 `[16]`; None if the kernel computes them."""
    return None if LAYOUTS[format].exponent else FORMATS[format].values().to(device)


def float_weight_linear(
    x: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    global_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
    out_features: int,
) -> Tensor:
    """The op ``triton_float_weight_linear``: `x` times the decoded weight, plus bias, summed in float32.

    Args:
        x: Float `[..., in]`.
        weight: In the layout of :mod:`fxquant.backends.native.gpu.weights`.
        w_scale: Scales as they are stored, float32 or uint8 `[out, groups]`.
        global_scale: float32, one number, for formats that have one.
        bias: `[out]`.
        format: Name of the format of the weight.
        group_size: Input channels per group, 0 for one group.
        out_features: Output channels.

    Raises:
        BackendError: If arguments do not fit.
    """
    op = "triton_float_weight_linear"
    machine.check_tensors(op, x, weight, w_scale, global_scale, bias)
    from fxquant.backends.native.gpu.kernels.float_weights import float_weight_kernel

    check_floats(op, x)
    _check(x, weight, w_scale, global_scale, bias, format, group_size, out_features)
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], out_features))
    if not out.numel():
        return out
    rows, inner, layout = x.numel() // x.shape[-1], x.shape[-1], LAYOUTS[format]
    config = choose(rows, group_size)
    with torch.cuda.device_of(x):
        float_weight_kernel[(-(-rows // config.block_m), -(-out_features // config.block_n))](
            x,
            weight,
            out,
            w_scale,
            global_scale,
            numbers_on(format, x.device),
            None if bias is None else bias.contiguous(),
            rows,
            out_features,
            inner,
            EXPONENT=layout.exponent,
            MANTISSA=layout.mantissa,
            SCALES=layout.scales,
            HALF=half_of(group_size) if weight.dtype == torch.uint8 else 0,
            GROUP=group_size,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out


def _check(
    x: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    global_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    group_size: int,
    out_features: int,
) -> None:
    if not fits(format, group_size):
        raise BackendError(
            f"the kernel decodes {', '.join(LAYOUTS)} in one group, or in groups that divide {LEAST_GROUP} or are a "
            f"multiple of it, not {format} in groups of {group_size}"
        )
    inner, halves = x.shape[-1], weight.dtype == torch.uint8
    shape = (out_features, held_width(inner, halves, group_size))
    if tuple(weight.shape) != shape or not weight.is_contiguous() or not inner:
        raise BackendError(
            f"a weight of {out_features} outputs and {inner} inputs must be contiguous {shape}, not "
            f"{tuple(weight.shape)}"
        )
    grid = (out_features, -(-inner // group_size) if group_size else 1)
    kind = FORMATS[format]
    if tuple(w_scale.shape) != grid or w_scale.dtype != kind.scale_dtype or not w_scale.is_contiguous():
        raise BackendError(
            f"the scales of {format} must be contiguous {kind.scale_dtype} {grid}, not {w_scale.dtype} "
            f"{tuple(w_scale.shape)}"
        )
    if (global_scale is not None) != kind.global_scales:
        raise BackendError(f"{format} has {'one' if kind.global_scales else 'no'} scale for the whole tensor")
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise BackendError(f"the bias {tuple(bias.shape)} is not a vector of {out_features} channels")
