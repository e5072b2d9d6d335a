"""Products of block formats on GPUs of compute capability 10 and newer: MX formats and NVFP4.

torch multiplies them (``torch.nn.functional.scaled_mm``); one Triton kernel makes the codes of activations. Scales are
in the layout that tensor cores read: tiles of 128 rows and 4 columns, in which the 4 bytes of a row are followed by
those of the rows 32, 64 and 96 further down.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import ScalingType, SwizzleType

from fxquant.backends.native.gpu import machine, rotations
from fxquant.backends.native.gpu.arguments import check_floats, per_row
from fxquant.errors import BackendError
from fxquant.numerics.formats import FORMATS

TILE_ROWS, TILE_COLUMNS = 128, 4
MULTIPLE = 16
"""Matrices that are multiplied have multiples of this many output channels, and of bytes per row."""

_E4M3 = torch.float8_e4m3fn
_E2M1 = torch.float4_e2m1fn_x2
_VALUES = 4096


def padded(size: int, multiple: int) -> int:
    """The next multiple; also of symbolic sizes."""
    return (size + multiple - 1) // multiple * multiple


def held_bytes(channels: int, format: str) -> int:
    """Bytes per row of codes, filled up with zeros."""
    return padded(channels * FORMATS[format].bits // 8, MULTIPLE)


def scale_bytes(rows: int, channels: int, format: str) -> int:
    """Bytes of the scales of a matrix."""
    block = FORMATS[format].block
    return padded(rows, TILE_ROWS) * padded((channels + block - 1) // block, TILE_COLUMNS)


def swizzled(scales: Tensor) -> Tensor:
    """Scales in the layout that tensor cores read, missing ones of the last tiles as 0.

    Args:
        scales: uint8 `[rows, columns]`.

    Returns:
        uint8 `[bytes]`.
    """
    rows, columns = scales.shape
    whole = functional.pad(scales, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))
    tiles = whole.unflatten(1, (-1, TILE_COLUMNS)).unflatten(0, (-1, 4, 32))
    return tiles.permute(0, 3, 2, 1, 4).flatten()


def unswizzled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Undo :func:`swizzled` for a matrix of scales `[rows, columns]`."""
    across = padded(columns, TILE_COLUMNS) // TILE_COLUMNS
    tiles = scales.unflatten(0, (-1, across, 32, 4, TILE_COLUMNS))
    return tiles.permute(0, 3, 2, 1, 4).flatten(3).flatten(0, 2)[:rows, :columns].contiguous()


def held_weight(packed: Tensor, channels: int, format: str) -> Tensor:
    """A weight as matrices are multiplied: uint8 or, in 8 bits, float8_e4m3fn, `[out, bytes]`, both filled up.

    Args:
        packed: uint8 `[out, bytes]`, codes as in checkpoints.
        channels: Input channels.
        format: The format of the codes.
    """
    out, size = packed.shape
    missing = (0, held_bytes(channels, format) - size, 0, -out % MULTIPLE)
    weight = functional.pad(packed, missing) if any(missing) else packed
    return weight.view(_E4M3) if FORMATS[format].bits == 8 else weight


def unheld_weight(weight: Tensor, out: int, channels: int, format: str) -> Tensor:
    """Undo :func:`held_weight`."""
    return weight.view(torch.uint8)[:out, : channels * FORMATS[format].bits // 8].contiguous()


def quantize_blocks(
    x: Tensor, format: str, global_scale: Tensor | None = None, signs: Tensor | None = None, block: int = 1
) -> tuple[Tensor, Tensor]:
    """The op ``triton_quantize_blocks``: codes and scales as ``fxquant::quantize`` and ``block_scale``, bit for bit.

    Args:
        x: float32, bfloat16 or float16 `[..., channels]`.
        format: ``mxfp8``, ``mxfp4`` or ``nvfp4``.
        global_scale: float32, one for all, one per sample or one per row; for ``nvfp4``.
        signs: int8 `[channels]` of 1 and -1 if channels are rotated before.
        block: Channels per Hadamard matrix of the rotation.

    Returns:
        Codes, `[..., bytes]` as in :func:`held_weight`. Scales of all rows as in :func:`swizzled`, uint8.

    Raises:
        BackendError: If arguments do not fit.
    """
    op = "triton_quantize_blocks"
    machine.check_tensors(op, x, global_scale, signs)
    from fxquant.backends.native.gpu.kernels.blocks import quantize_blocks_kernel

    check_floats(op, x)
    kind, channels = FORMATS[format], x.shape[-1]
    if channels % kind.block or not channels:
        raise BackendError(f"{op}: {format} has blocks of {kind.block} channels, which do not divide {channels}")
    if signs is not None:
        rotations.check(op, x, signs, block)
    x = x.contiguous()
    rows, eight = x.numel() // channels, kind.bits == 8
    held = held_bytes(channels, format)
    codes = x.new_empty((*x.shape[:-1], held), dtype=_E4M3 if eight else torch.uint8)
    scales = x.new_empty(scale_bytes(rows, channels, format), dtype=torch.uint8)
    if not rows:
        return codes, scales
    outer, outer_rows = per_row(global_scale, x, rows, "global scale")
    columns = max(TILE_COLUMNS, block // kind.block)
    height = max(1, min(32, _VALUES // (columns * kind.block)))
    tiles = padded(channels // kind.block, TILE_COLUMNS) // TILE_COLUMNS
    with torch.cuda.device_of(x):
        quantize_blocks_kernel[(padded(rows, TILE_ROWS) // height, -(-tiles * TILE_COLUMNS // columns))](
            x,
            None if signs is None else signs.contiguous(),
            codes,
            scales,
            outer,
            rows,
            channels,
            held,
            tiles,
            outer_rows,
            FACTOR=block**-0.5,
            STEPS=block.bit_length() - 1,
            EXPONENT=getattr(kind, "exponent", 0),
            FP8=eight,
            BLOCK=kind.block,
            ROWS=height,
            COLUMNS=columns,
            num_warps=max(4, min(16, height * columns * kind.block // 1024)),
        )
    return codes, scales


def scaled_linear(
    codes: Tensor,
    scales: Tensor,
    x_global: Tensor | None,
    weight: Tensor,
    w_scales: Tensor,
    w_global: Tensor | None,
    bias: Tensor | None,
    format: str,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The op ``scaled_linear``: the product of codes of block formats, times their scales, plus bias.

    Sums are float32. The product is rounded to `dtype` before the bias is added, for ``mxfp4`` to bfloat16.

    Args:
        codes: `[..., bytes]`, as :func:`quantize_blocks` makes them.
        scales: uint8, from there.
        x_global: Global scale of the codes, for ``nvfp4``: float32, one for all, one per sample or one per row.
        weight: As :func:`held_weight` makes it.
        w_scales: As :func:`swizzled` makes them.
        w_global: Global scale of the weight, one number.
        bias: `[out]`, or one per sample.
        format: Of both sides.
        in_features: Input channels.
        out_features: Output channels; a weight that is filled up has more.
        dtype: Dtype of the result: float32, bfloat16 or float16.

    Returns:
        `[..., out]` of `dtype`.

    Raises:
        BackendError: If arguments do not fit.
    """
    machine.check_tensors("scaled_linear", codes, scales, x_global, weight, w_scales, w_global, bias)
    reason = machine.missing_blocks(codes.device, format)
    if reason is not None:
        raise BackendError(f"scaled_linear cannot run: {reason}")
    _check(codes, scales, weight, w_scales, format, in_features, out_features)
    leading, rows = codes.shape[:-1], codes.numel() // codes.shape[-1]
    matrix, turned = codes.reshape(rows, -1), weight.t()
    if FORMATS[format].bits == 4:
        matrix, turned = matrix.view(_E2M1), weight.view(_E2M1).t()
    levels = [[scales], [w_scales]]
    outer: Tensor | None = None
    kernel_dtype = torch.bfloat16 if format == "mxfp4" else dtype
    if x_global is not None and w_global is not None:
        if x_global.numel() == 1:
            levels = [[scales, x_global.reshape(1)], [w_scales, w_global.reshape(1)]]
        else:  # torch takes one for all. Without it, products exceed float16.
            outer, kernel_dtype = x_global * w_global, torch.float32
    mx = not FORMATS[format].global_scales
    held = torch.float8_e8m0fnu if mx else _E4M3
    each = ScalingType.BlockWise1x32 if mx else ScalingType.BlockWise1x16
    recipe = [each, ScalingType.TensorWise][: len(levels[0])]
    swizzle = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE][: len(levels[0])]
    x_levels, w_levels = ([level[0].view(held), *level[1:]] for level in levels)
    y = functional.scaled_mm(
        matrix, turned, x_levels, recipe, w_levels, recipe, swizzle, swizzle, output_dtype=kernel_dtype
    )
    y = y.narrow(1, 0, out_features).reshape(*leading, out_features)
    if outer is not None:
        y = y * outer
    return (y if bias is None else y + bias.to(y.dtype)).to(dtype).contiguous()


def _check(
    codes: Tensor, scales: Tensor, weight: Tensor, w_scales: Tensor, format: str, in_features: int, out_features: int
) -> None:
    held, out = held_bytes(in_features, format), padded(out_features, MULTIPLE)
    rows = codes.numel() // max(1, codes.shape[-1])
    wanted = {
        "codes": (codes.shape[-1:], (held,)),
        "weight": (weight.shape, (out, held)),
        "scales": (scales.shape, (scale_bytes(rows, in_features, format),)),
        "scales of the weight": (w_scales.shape, (scale_bytes(out_features, in_features, format),)),
    }
    for what, (found, right) in wanted.items():
        if tuple(found) != right:
            raise BackendError(
                f"scaled_linear: the {what} of {in_features} inputs and {out_features} outputs in {format} are "
                f"{[*right]}, not {[*found]}"
            )
