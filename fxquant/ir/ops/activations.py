"""Operators on activations: observe, scale and shift, quantize."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.ir.ops.definition import (
    by_block,
    check_block_width,
    check_broadcast,
    check_input_scales,
    check_parts,
    define,
)
from fxquant.numerics import grids
from fxquant.numerics.formats import FORMATS, Format, Scales, top_of

Recorder = Callable[[str, Tensor, Tensor, int], None]
"""Called as `recorder(key, x, timestep, axis)` by each :func:`observe`; it must neither keep nor change `x` itself."""

_recorder: ContextVar[Recorder | None] = ContextVar("fxquant_recorder", default=None)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Send what `fxquant::observe` sees in this context (thread or task) to `recorder`. Only the innermost one is used.

    Args:
        recorder: Called as `recorder(key, x, timestep, axis)`, without gradients.
    """
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def observe(x: Tensor, timestep: Tensor, key: str, axis: int) -> Tensor:
    """Show `x` to the active recorder under the name `key`, and return `x` in the same memory.

    `timestep` is 0-d or `[batch]`, `axis` is the channel axis of `x`. This operator is for eager graphs only: it
    aliases its input and works by side effect, so it is not suitable for `torch.compile`.

    Raises:
        CalibrationError: No recorder is active.
    """
    recorder = _recorder.get()
    if recorder is None:
        raise CalibrationError(
            f"the observer {key!r} ran outside of calibration. Run observed graphs inside fxquant.ir.ops.recording(), "
            "or finish the compilation first."
        )
    with torch.no_grad():
        recorder(key, x, timestep, axis)
    return _alias(x)


def _fake_observe(x: Tensor, timestep: Tensor, key: str, axis: int) -> Tensor:
    return _alias(x)


def channel_affine(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """`x * scale + shift`, rounded once to the dtype of `x`.

    `scale` and `shift` broadcast to the shape of `x`: `[channels]`, or `[batch, 1, channels]` for one row per sample.
    This applies a balancing factor that could not be folded into any weight.
    """
    _check_affine(x, scale, shift)
    dtype = grids.compute_dtype(x.dtype)
    y = x.to(dtype) * scale.to(dtype)
    if shift is not None:
        y = y + shift.to(dtype)
    return y.to(x.dtype).contiguous()


def _fake_channel_affine(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    _check_affine(x, scale, shift)
    return x.new_empty(x.shape)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: str,
    global_scale: Tensor | None = None,
    top: Tensor | None = None,
) -> Tensor:
    """The codes of `x` in a number format, uint8 of the shape of `x`, each the nearest value of the format's grid.

    For integers this is `clamp(round(x / scale) + zero_point, 0, 2**bits - 1)`, halves rounded to even. `x` is float
    and finite. Formats with blocks have a `scale` per block of the last axis, `[..., channels / block]`.

    For integers, `top` is the highest code where it is lower than that of the format: uint8, one for each scale. So
    rows of a table can have fewer bits than others.
    """
    scales = _checked(x, scale, zero_point, format, global_scale)
    _check_top(x, top, format)
    blocks, each = by_block(x, scales, format)
    codes = FORMATS[format].encode(blocks, each).reshape(x.shape).contiguous()
    return codes if top is None else torch.minimum(codes, top)


def _fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: str,
    global_scale: Tensor | None = None,
    top: Tensor | None = None,
) -> Tensor:
    _checked(x, scale, zero_point, format, global_scale)
    _check_top(x, top, format)
    return x.new_empty(x.shape, dtype=torch.uint8)


def token_grid(x: Tensor, format: str) -> Tensor:
    """Scale and zero point of each token for its min-max range, `[2, ..., 1]` in float32 for `x` `[..., channels]`.

    For dynamic quantization to integers and other formats with zero points: `torch.unbind` of the result gives the
    arguments of :func:`quantize` and :func:`linear`.
    """
    kind = _format_with_zero_points(format)
    found = kind.scales(*torch.aminmax(x.to(grids.compute_dtype(x.dtype)), dim=-1, keepdim=True))
    assert found.zero_point is not None
    return torch.stack([found.scale, found.zero_point.float()])


def _fake_token_grid(x: Tensor, format: str) -> Tensor:
    _format_with_zero_points(format)
    return x.new_empty((2, *x.shape[:-1], 1), dtype=torch.float32)


def token_scale(x: Tensor, format: str) -> Tensor:
    """The scale of each token for its largest magnitude, `[..., 1]` for `x` `[..., channels]`, as the format stores it.

    For dynamic quantization to floats. For formats with scales of scales it is a token's float32 scale of its scales.
    """
    kind = _float_format(format)
    low, high = torch.aminmax(x.to(grids.compute_dtype(x.dtype)), dim=-1, keepdim=True)
    outer = kind.global_scale(low, high)
    return kind.scales(low, high).scale if outer is None else outer


def _fake_token_scale(x: Tensor, format: str) -> Tensor:
    kind = _float_format(format)
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32 if kind.global_scales else kind.scale_dtype)


def block_scale(x: Tensor, format: str, global_scale: Tensor | None = None) -> Tensor:
    """The scale of each block of channels, `[..., channels / block]` of the format's dtype of scales.

    `global_scale` broadcasts to `[..., 1]`, for formats that have scales of scales.
    """
    kind = _block_format(x, format, global_scale)
    blocks = x.to(grids.compute_dtype(x.dtype)).unflatten(-1, (-1, kind.block))
    return kind.scales(*torch.aminmax(blocks, dim=-1), global_scale=global_scale).scale.contiguous()


def _fake_block_scale(x: Tensor, format: str, global_scale: Tensor | None = None) -> Tensor:
    kind = _block_format(x, format, global_scale)
    return x.new_empty((*x.shape[:-1], x.shape[-1] // kind.block), dtype=kind.scale_dtype)


def _format_with_zero_points(name: str) -> Format:
    format = FORMATS[name]
    if not format.zero_points:
        raise ConfigurationError(f"{name} has no zero points; token_scale finds its scales.")
    return format


def _float_format(name: str) -> Format:
    format = FORMATS[name]
    if format.zero_points or (format.block and not format.global_scales):
        raise ConfigurationError(f"{name} has no scale without a zero point for each token.")
    return format


def _block_format(x: Tensor, name: str, global_scale: Tensor | None) -> Format:
    format = FORMATS[name]
    if not format.block or format.global_scales != (global_scale is not None):
        needs = "no blocks" if not format.block else f"{'a' if format.global_scales else 'no'} global scale"
        raise ConfigurationError(f"{name} has {needs}; block_scale was given other arguments.")
    check_block_width(x, name)
    return format


def _alias(x: Tensor) -> Tensor:
    # The dispatcher forbids kernels to return their input object itself.
    return x.view_as(x)


def _check_affine(x: Tensor, scale: Tensor, shift: Tensor | None) -> None:
    check_broadcast("scale", scale, x.shape)
    if shift is not None:
        check_broadcast("shift", shift, x.shape)


def _check_top(x: Tensor, top: Tensor | None, format: str) -> None:
    if top is None:
        return
    top_of(format)  # Refuses formats other than integers.
    if top.dtype != torch.uint8:
        raise ConfigurationError(f"the highest code is {top.dtype}, not uint8.")
    check_broadcast("highest code", top, (*x.shape[:-1], 1))


def _checked(x: Tensor, scale: Tensor, zero_point: Tensor | None, format: str, global_scale: Tensor | None) -> Scales:
    scales = Scales(scale, zero_point, global_scale)
    check_parts(FORMATS[format], scales, "input")
    check_input_scales(x, scales, format)
    return scales


define("observe(Tensor(a) x, Tensor timestep, str key, int axis) -> Tensor(a)", observe, _fake_observe)
define(
    "channel_affine(Tensor x, Tensor scale, Tensor? shift) -> Tensor",
    channel_affine,
    _fake_channel_affine,
)
define(
    "quantize(Tensor x, Tensor scale, Tensor? zero_point, str format, Tensor? global_scale=None, Tensor? top=None) "
    "-> Tensor",
    quantize,
    _fake_quantize,
)
define("token_grid(Tensor x, str format) -> Tensor", token_grid, _fake_token_grid)
define("token_scale(Tensor x, str format) -> Tensor", token_scale, _fake_token_scale)
define(
    "block_scale(Tensor x, str format, Tensor? global_scale=None) -> Tensor",
    block_scale,
    _fake_block_scale,
)
