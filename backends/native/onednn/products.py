"""Integer products by oneDNN, for one grid, one grid per sample or one grid per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fxquant.backends.native.onednn.weights import MIDDLE
from fxquant.backends.onednn_products import sums_exactly

_NONE = torch.zeros(1, dtype=torch.int64)  # Zero points of the weight. It has none, and the kernel does not read them.


@dataclass(frozen=True, eq=False)
class Grid:
    """Scale and zero point of activations: one number each, or one per sample along the first axis."""

    scale: Tensor
    zero_point: Tensor

    def of(self, sample: int) -> tuple[float, int]:
        """Scale and zero point of one sample."""
        return _row(self.scale, sample).item(), int(_row(self.zero_point, sample).item())


@dataclass(frozen=True)
class Gelu:
    """What the kernel does to a product before it returns: GELU by the tanh formula, and quantization to uint8."""

    grid: Grid
    qmax: int


def product(
    codes: Tensor,
    grid: Grid,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    gelu: Gelu | None = None,
) -> Tensor:
    """`scale * w_scale * sum_k (codes_k - zero_point) weight_k + bias`, `[..., out]` of `dtype`, or uint8 after GELU.

    One product for all samples if they share grids and bias, else one product per sample.

    Args:
        codes: uint8 `[..., in]`, with samples along the first axis if anything depends on the sample.
        grid: Grid of the codes.
        weight: Prepacked int8 `[in, out]`.
        w_scale: float32 `[out, 1]` or `[out]`.
        bias: `[out]`, or one row per sample `[batch, ..., out]` with axes of size 1 between; or None.
        dtype: float32, bfloat16 or float16.
        gelu: What to do to the result; None for nothing.
    """
    shared = [grid.scale, grid.zero_point, *([] if gelu is None else [gelu.grid.scale, gelu.grid.zero_point])]
    rows = None if bias is None else bias.reshape(-1, bias.shape[-1])
    if not codes.numel():
        return codes.new_empty((*codes.shape[:-1], weight.shape[1]), dtype=torch.uint8 if gelu else dtype)
    # Samplers give all samples of a call the same timestep, so the rows of tables are usually equal.
    if all(_is_one(value) for value in (*shared, *([] if rows is None else [rows]))):
        return _product(codes, grid, 0, weight, w_scale, rows, dtype, gelu)
    return torch.stack(
        [_product(codes[sample], grid, sample, weight, w_scale, rows, dtype, gelu) for sample in range(codes.shape[0])]
    )


def product_of_rows(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    w_sums: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """:func:`product` for codes with a grid per row: scale and zero point are `[..., 1]`; the result is float32.

    The kernel takes one zero point, the middle. The difference to the zero point of a row, times `w_sums`, the sums of
    the weight's columns, is added afterwards.
    """
    if not codes.numel():
        return codes.new_empty((*codes.shape[:-1], weight.shape[1]), dtype=torch.float32)
    w_step = w_scale.flatten()
    y = _multiply(codes, 1.0, MIDDLE, weight, w_step, None, torch.float32, None)
    difference = (MIDDLE - zero_point.to(torch.float32)).expand(*codes.shape[:-1], 1)
    y = y.addcmul_(difference, w_sums * w_step).mul_(scale)
    return y if bias is None else y.add_(bias)


def _product(
    codes: Tensor,
    grid: Grid,
    sample: int,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    gelu: Gelu | None,
) -> Tensor:
    row = None if bias is None else _row(bias, sample).to(torch.float32).contiguous()
    out = None if gelu is None else gelu.grid.of(sample)
    y = _multiply(codes, *grid.of(sample), weight, w_scale.flatten(), row, dtype, out)
    return y if gelu is None or gelu.qmax == 255 else y.clamp_(max=gelu.qmax)


def _multiply(
    codes: Tensor,
    scale: float,
    zero_point: int,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: tuple[float, int] | None,
) -> Tensor:
    if sums_exactly():
        return _kernel(codes, scale, zero_point, weight, w_scale, bias, dtype, out)
    # A code is 2 * (code >> 1) + (code & 1), and pairs of products of 7-bit codes fit 16 bits.
    y = _kernel(codes >> 1, 2.0 * scale, zero_point >> 1, weight, w_scale, bias, torch.float32, None)
    y += _kernel(codes & 1, scale, zero_point & 1, weight, w_scale, None, torch.float32, None)
    if out is None:
        return y.to(dtype)
    return functional.gelu(y, approximate="tanh").div_(out[0]).round_().add_(out[1]).clamp_(0, 255).to(torch.uint8)


def _kernel(
    codes: Tensor,
    scale: float,
    zero_point: int,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: tuple[float, int] | None,
) -> Tensor:
    kernel = torch.ops.onednn.qlinear_pointwise.default
    if out is None:
        y = kernel(codes, scale, zero_point, weight, w_scale, _NONE, bias, 1.0, 0, dtype, "none", [], "")
    else:
        y = kernel(codes, scale, zero_point, weight, w_scale, _NONE, bias, *out, torch.uint8, "gelu", [], "tanh")
    assert isinstance(y, Tensor)
    return y


def _is_one(rows: Tensor) -> bool:
    """Whether all samples share a value: there is only one row, or all rows are equal."""
    return rows.dim() == 0 or rows.shape[0] == 1 or bool((rows[1:] == rows[:1]).all())


def _row(rows: Tensor, sample: int) -> Tensor:
    return rows if rows.dim() == 0 else rows[sample if rows.shape[0] > 1 else 0]
