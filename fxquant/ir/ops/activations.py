"""Operators on activations: observe, scale and shift, quantize."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.ir.ops.definition import check_activation_grid, check_broadcast, define
from fxquant.numerics import grids

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


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, dtype: torch.dtype) -> Tensor:
    """`clamp(round(x / scale) + zero_point, qmin, qmax)` as integers of `dtype`, halves rounded to even.

    `x` is float and finite, `qmin..qmax` must fit `dtype`.
    """
    check_activation_grid(x, scale, zero_point)
    _check_codes(qmin, qmax, dtype)
    return grids.quantize(x, scale, zero_point, qmin, qmax).to(dtype).contiguous()


def _fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, dtype: torch.dtype) -> Tensor:
    check_activation_grid(x, scale, zero_point)
    _check_codes(qmin, qmax, dtype)
    return x.new_empty(x.shape, dtype=dtype)


def token_grid(x: Tensor, bits: int) -> Tensor:
    """Scale and zero point of each token for its min-max range, `[2, ..., 1]` in float32 for `x` `[..., channels]`.

    For dynamic quantization: `torch.unbind` of the result gives the arguments of :func:`quantize` and :func:`linear`.
    """
    low, high = torch.aminmax(x.to(grids.compute_dtype(x.dtype)), dim=-1, keepdim=True)
    scale, zero_point = grids.affine_parameters(low, high, bits)
    return torch.stack([scale, zero_point.float()])


def _fake_token_grid(x: Tensor, bits: int) -> Tensor:
    return x.new_empty((2, *x.shape[:-1], 1), dtype=torch.float32)


def _alias(x: Tensor) -> Tensor:
    # The dispatcher forbids kernels to return their input object itself.
    return x.view_as(x)


def _check_affine(x: Tensor, scale: Tensor, shift: Tensor | None) -> None:
    check_broadcast("scale", scale, x.shape)
    if shift is not None:
        check_broadcast("shift", shift, x.shape)


def _check_codes(qmin: int, qmax: int, dtype: torch.dtype) -> None:
    if dtype.is_floating_point or not torch.iinfo(dtype).min <= qmin < qmax <= torch.iinfo(dtype).max:
        raise ConfigurationError(f"codes from {qmin} to {qmax} do not fit {dtype}.")


define("observe(Tensor(a) x, Tensor timestep, str key, int axis) -> Tensor(a)", observe, _fake_observe)
define(
    "channel_affine(Tensor x, Tensor scale, Tensor? shift) -> Tensor",
    channel_affine,
    _fake_channel_affine,
)
define(
    "quantize(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, ScalarType dtype) -> Tensor",
    quantize,
    _fake_quantize,
)
define("token_grid(Tensor x, int bits) -> Tensor", token_grid, _fake_token_grid)
