"""Calls the weight-only product kernel: checks arguments, allocates the result, never waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.backends.native.gpu import machine
from fxquant.backends.native.gpu.arguments import check_floats
from fxquant.backends.native.gpu.configs import Config, step_of
from fxquant.backends.native.gpu.weights import LEAST_GROUP, half_of, held_width
from fxquant.errors import BackendError

# Timestep embedders have one row per sample, so reading their weights limits them. Captions have a few hundred rows.
_FEW = Config(16, 32, 128, 4, 4)
_MANY = Config(64, 64, 64, 4, 3)
_LEAST_ROWS = 64


def fits(group_size: int) -> bool:
    """Whether the kernel accepts weights in groups of `group_size` inputs, 0 for one group."""
    return group_size % LEAST_GROUP == 0


def config_for(rows: int) -> Config:
    """The tiling for a product of `rows` rows of a weight in one group."""
    return _FEW if rows < _LEAST_ROWS else _MANY


def choose(rows: int, group_size: int) -> Config:
    """The tiling for a product of `rows` rows. No step crosses the end of a group."""
    config = config_for(rows)
    return Config(config.block_m, config.block_n, step_of(config, group_size), config.warps, config.stages)


def weight_only_linear(
    x: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    """The op ``triton_weight_only_linear``: `x` times `w_scale * (w - w_zero_point)`, plus bias, summed in float32.

    Args:
        x: Float `[..., in]`.
        weight: In the layout of :mod:`fxquant.backends.native.gpu.weights`.
        w_scale: float32 `[out, groups]`.
        w_zero_point: uint8 `[out, groups]`.
        bias: `[out]`.
        bits: Bits of the weight.
        group_size: Input channels per group, 0 for one group.
        out_features: Output channels.

    Raises:
        BackendError: If arguments do not fit.
    """
    op = "triton_weight_only_linear"
    machine.check_tensors(op, x, weight, w_scale, w_zero_point, bias)
    from fxquant.backends.native.gpu.kernels.weight_only import weight_only_kernel

    check_floats(op, x)
    halves = weight.dtype == torch.uint8
    inner = x.shape[-1]
    shape = (out_features, held_width(inner, halves, group_size))
    if tuple(weight.shape) != shape or not weight.is_contiguous() or not fits(group_size) or not inner:
        raise BackendError(
            f"a weight of {out_features} outputs and {inner} inputs must be contiguous {shape}, in one group or in "
            f"groups of a multiple of {LEAST_GROUP}, not {tuple(weight.shape)} in groups of {group_size}"
        )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise BackendError(f"the bias {tuple(bias.shape)} is not a vector of {out_features} channels")
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], out_features))
    if not out.numel():
        return out
    rows = x.numel() // inner
    config = choose(rows, group_size)
    with torch.cuda.device_of(x):
        weight_only_kernel[(-(-rows // config.block_m), -(-out_features // config.block_n))](
            x,
            weight,
            out,
            w_scale,
            w_zero_point,
            None if bias is None else bias.contiguous(),
            rows,
            out_features,
            inner,
            WHOLE=bits == 8,
            HALF=half_of(group_size) if halves else 0,
            GROUP=group_size,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out
