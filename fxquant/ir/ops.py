"""The operators of observed and quantized graphs, as PyTorch custom operators `torch.ops.fxquant.*`.

Each has one schema, one reference kernel that defines its meaning on every device, and one fake kernel for shapes.
Importing this module registers them. They stay single nodes in FX and export graphs and under `torch.compile`; a
backend replaces them or runs the reference. An operator belongs here if passes and backends have to agree on it.

Codes and scales: `scale * (q - zero_point)`, see :mod:`fxquant.quantizer`. Scales and zero points of activations are
0-d or broadcast to the activation with 1 in the last axis: `[batch, 1, 1]` is one a sample, `[batch, tokens, 1]` one a
token. Arithmetic is in float32, or in float64 where the float side of the operator is float64, in which integers up to
2**53 are exact. Autocast does not reach inside. The operators are for inference and define no gradients. Results are
contiguous, and errors are :class:`~fxquant.errors.ConfigurationError` unless a description says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional

from fxquant import quantizer
from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.packing import packed_size, unpack

Recorder = Callable[[str, Tensor, Tensor, int], None]
"""Called as `recorder(key, x, timestep, axis)` by each :func:`observe`; it must neither keep nor change `x` itself."""

_recorder: ContextVar[Recorder | None] = ContextVar("fxquant_recorder", default=None)

_library = torch.library.Library("fxquant", "DEF")


def _define(schema: str, reference: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxquant::{name}", fake, lib=_library)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Send what `fxquant::observe` sees in this context (thread or task) to `recorder`. The innermost one counts.

    Args:
        recorder: Called as `recorder(key, x, timestep, axis)`, without gradients.
    """
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def observe(x: Tensor, timestep: Tensor, key: str, axis: int) -> Tensor:
    """Return `x`, the same memory, after showing it to the active recorder under the name `key`.

    `timestep` is 0-d or `[batch]`, `axis` is the channel axis of `x`. For eager graphs only: it aliases its input and
    acts by side effect, so it is no subject for `torch.compile`.

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

    `scale` and `shift` broadcast to the shape of `x`: `[channels]`, or `[batch, 1, channels]` for a row a sample. This
    is a balancing factor that no weight could take in.
    """
    _check_affine(x, scale, shift)
    dtype = quantizer.compute_dtype(x.dtype)
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
    _check_activation_grid(x, scale, zero_point)
    _check_codes(qmin, qmax, dtype)
    return quantizer.quantize(x, scale, zero_point, qmin, qmax).to(dtype).contiguous()


def _fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, dtype: torch.dtype) -> Tensor:
    _check_activation_grid(x, scale, zero_point)
    _check_codes(qmin, qmax, dtype)
    return x.new_empty(x.shape, dtype=dtype)


def token_grid(x: Tensor, bits: int) -> Tensor:
    """Scale and zero point of each token, `[2, ..., 1]` in float32 for `x` `[..., channels]`: its own min-max range.

    Dynamic quantization: `torch.unbind` of the result are the arguments of :func:`quantize` and :func:`linear`.
    """
    low, high = torch.aminmax(x.to(quantizer.compute_dtype(x.dtype)), dim=-1, keepdim=True)
    scale, zero_point = quantizer.affine_parameters(low, high, bits)
    return torch.stack([scale, zero_point.float()])


def _fake_token_grid(x: Tensor, bits: int) -> Tensor:
    return x.new_empty((2, *x.shape[:-1], 1), dtype=torch.float32)


def dequantize_weight(
    wq: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight `scale * (q - zero_point)`, `[out, in_features]` of `dtype`, of packed codes.

    `wq` is uint8 `[out, packed_size(in_features, bits)]`, `scale` and `zero_point` are `[out, groups]`; `group_size` is
    the input channels a group, 0 for one group a row. For a linear whose activations stay float.
    """
    _check_weight(wq, scale, zero_point, bits, group_size, in_features)
    return quantizer.dequantize_weight(wq, scale, zero_point, bits, group_size, in_features, dtype).contiguous()


def _fake_dequantize_weight(
    wq: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    _check_weight(wq, scale, zero_point, bits, group_size, in_features)
    return wq.new_empty((wq.shape[0], in_features), dtype=dtype)


def linear(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """An integer product, then real numbers: `x_scale * w_scale * sum_k (xq_k - x_zp) (wq_k - w_zp) + bias`.

    `xq` is integers `[..., in]`; the weight is as for :func:`dequantize_weight`. With groups, `w_scale` and
    `w_zero_point` belong to the group of k and move into the sum. `bias` broadcasts to the result: `[out]`, or
    `[batch, 1, out]` for a row a sample. The result is `[..., out]` of `out_dtype`.
    """
    _check_activation_grid(xq, x_scale, x_zero_point)
    _check_weight(wq, w_scale, w_zero_point, bits, group_size, xq.shape[-1])
    if bias is not None:
        _check_broadcast("bias", bias, (*xq.shape[:-1], wq.shape[0]))
    dtype = quantizer.compute_dtype(out_dtype)
    x = xq.to(dtype) - x_zero_point.to(dtype)
    # bfloat16 holds integers up to 256 only, so an autocast product would drop bits of the codes.
    with torch.autocast(xq.device.type, enabled=False):
        if group_size == 0:
            weight = unpack(wq, bits, xq.shape[-1]).to(dtype) - w_zero_point.to(dtype)
            y = functional.linear(x, weight) * w_scale.to(dtype).flatten()
        else:
            weight = quantizer.dequantize_weight(wq, w_scale, w_zero_point, bits, group_size, xq.shape[-1], dtype)
            y = functional.linear(x, weight)
    y = y * x_scale.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(out_dtype).contiguous()


def _fake_linear(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_activation_grid(xq, x_scale, x_zero_point)
    _check_weight(wq, w_scale, w_zero_point, bits, group_size, xq.shape[-1])
    if bias is not None:
        _check_broadcast("bias", bias, (*xq.shape[:-1], wq.shape[0]))
    return xq.new_empty((*xq.shape[:-1], wq.shape[0]), dtype=out_dtype)


def conv2d(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """The convolution that :func:`linear` is for matrices, on `xq` integers `[batch, in, height, width]`.

    `kernel` is `[in / groups, kernel height, kernel width]`; the weight codes are packed as rows of that many,
    `[out, packed_size(prod(kernel), bits)]`, with `w_scale` and `w_zero_point` `[out, 1]`. `groups` are those of the
    convolution. Padding adds real zeros, which are `x_zero_point` in codes. `bias` is `[out]` or broadcasts to the
    result, which is `[batch, out, height, width]` of `out_dtype`.
    """
    _check_activation_grid(xq, x_scale, x_zero_point)
    _check_weight(wq, w_scale, w_zero_point, bits, 0, math.prod(kernel))
    _check_conv_input(xq, kernel, groups)
    dtype = quantizer.compute_dtype(out_dtype)
    x = xq.to(dtype) - x_zero_point.to(dtype)
    weight = unpack(wq, bits, math.prod(kernel)).to(dtype) - w_zero_point.to(dtype)
    with torch.autocast(xq.device.type, enabled=False):
        y = functional.conv2d(x, weight.unflatten(1, kernel), None, stride, padding, dilation, groups)
    y = y * w_scale.to(dtype).reshape(-1, 1, 1) * x_scale.to(dtype)
    if bias is not None:
        y = y + (bias.reshape(-1, 1, 1) if bias.dim() == 1 else bias).to(dtype)
    return y.to(out_dtype).contiguous()


def _fake_conv2d(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_activation_grid(xq, x_scale, x_zero_point)
    _check_weight(wq, w_scale, w_zero_point, bits, 0, math.prod(kernel))
    _check_conv_input(xq, kernel, groups)
    sizes = [
        (xq.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[1 + i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]
    return xq.new_empty((xq.shape[0], wq.shape[0], *sizes), dtype=out_dtype)


def _alias(x: Tensor) -> Tensor:
    # The dispatcher forbids kernels to hand back the very object that they were given.
    return x.view_as(x)


def _check_broadcast(what: str, value: Tensor, shape: Sequence[int]) -> None:
    pairs = zip(reversed(value.shape), reversed(shape), strict=False)
    # Symbolic sizes are left alone: comparing them would pin the batch that the graph keeps open.
    clash = any(isinstance(own, int) and isinstance(size, int) and own not in (1, size) for own, size in pairs)
    if clash or value.dim() > len(shape):
        raise ConfigurationError(f"the {what} of shape {tuple(value.shape)} does not broadcast to {tuple(shape)}.")


def _check_affine(x: Tensor, scale: Tensor, shift: Tensor | None) -> None:
    _check_broadcast("scale", scale, x.shape)
    if shift is not None:
        _check_broadcast("shift", shift, x.shape)


def _check_activation_grid(x: Tensor, scale: Tensor, zero_point: Tensor) -> None:
    for what, value in (("scale", scale), ("zero point", zero_point)):
        _check_broadcast(what, value, (*x.shape[:-1], 1))


def _check_codes(qmin: int, qmax: int, dtype: torch.dtype) -> None:
    if dtype.is_floating_point or not torch.iinfo(dtype).min <= qmin < qmax <= torch.iinfo(dtype).max:
        raise ConfigurationError(f"codes from {qmin} to {qmax} do not fit {dtype}.")


def _check_conv_input(xq: Tensor, kernel: list[int], groups: int) -> None:
    if xq.dim() != 4 or xq.shape[1] != kernel[0] * groups:
        raise ConfigurationError(
            f"a convolution of kernel {kernel} in {groups} groups reads [batch, {kernel[0] * groups}, height, width], "
            f"not {tuple(xq.shape)}."
        )


def _check_weight(wq: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int, in_features: int) -> None:
    grid = (wq.shape[0], quantizer.group_count(in_features, group_size))
    size = packed_size(in_features, bits)
    if wq.dtype != torch.uint8 or wq.dim() != 2 or wq.shape[1] != size:
        raise ConfigurationError(
            f"a weight of {in_features} inputs and {bits} bits is packed as uint8 [out, {size}], "
            f"not {wq.dtype} {tuple(wq.shape)}."
        )
    for name, value in (("scale", scale), ("zero point", zero_point)):
        if tuple(value.shape) != grid:
            raise ConfigurationError(f"the {name} of this weight is [out, groups] = {grid}, not {tuple(value.shape)}.")


_define("observe(Tensor(a) x, Tensor timestep, str key, int axis) -> Tensor(a)", observe, _fake_observe)
_define(
    "channel_affine(Tensor x, Tensor scale, Tensor? shift) -> Tensor",
    channel_affine,
    _fake_channel_affine,
)
_define(
    "quantize(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, ScalarType dtype) -> Tensor",
    quantize,
    _fake_quantize,
)
_define("token_grid(Tensor x, int bits) -> Tensor", token_grid, _fake_token_grid)
_define(
    "dequantize_weight(Tensor wq, Tensor scale, Tensor zero_point, int bits, int group_size, int in_features, "
    "ScalarType dtype) -> Tensor",
    dequantize_weight,
    _fake_dequantize_weight,
)
_define(
    "linear(Tensor xq, Tensor x_scale, Tensor x_zero_point, Tensor wq, Tensor w_scale, Tensor w_zero_point, "
    "Tensor? bias, int bits, int group_size, ScalarType out_dtype) -> Tensor",
    linear,
    _fake_linear,
)
_define(
    "conv2d(Tensor xq, Tensor x_scale, Tensor x_zero_point, Tensor wq, Tensor w_scale, Tensor w_zero_point, "
    "Tensor? bias, int bits, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
    "ScalarType out_dtype) -> Tensor",
    conv2d,
    _fake_conv2d,
)
