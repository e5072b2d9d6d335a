"""Conditions on the ops of fxquant: scales, zero points, codes and groups that fit each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import UnknownNameError, VerificationError
from fxquant.ir.arguments import args
from fxquant.ir.dataflow import behind
from fxquant.ir.meta import PROVENANCE
from fxquant.ir.places import label
from fxquant.numerics.formats import FORMATS, Format


def broken(node: fx.Node, what: str) -> VerificationError:
    """The error about a node; it names the layer of the node and the passes that made it."""
    origins = node.meta.get(PROVENANCE)
    made = f", made by {' <- '.join(str(origin) for origin in reversed(origins))}" if origins else ""
    return VerificationError(f"{label(node)}{made}: {what}")


def text_of(value: Any) -> str:
    """Dtype and shape of a tensor, as in ``float32[2, 3]``; other values as Python writes them."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(text_of, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(size) for size in value.shape)}]"


def _values(node: fx.Node, *names: str) -> Iterator[Tensor | None]:
    """The values of arguments; None for one that is None."""
    for name in names:
        yield None if getattr(args(node), name) is None else args(node).node(name).meta["val"]


def _check_quantize(node: fx.Node) -> None:
    format = _format(node, "format")
    scale, zero_point = _values(node, "scale", "zero_point")
    _check_scales(node, "", format, scale, zero_point)
    (top,) = _values(node, "top")
    if top is not None and (top.dtype != torch.uint8 or zero_point is None or top.shape != zero_point.shape):
        raise broken(node, f"its highest code {text_of(top)} is not uint8 and of the shape of {text_of(zero_point)}")


def _format(node: fx.Node, name: str) -> Format:
    try:
        return FORMATS[getattr(args(node), name)]
    except UnknownNameError as error:
        raise broken(node, str(error)) from None


def _check_scales(node: fx.Node, side: str, format: Format, scale: Tensor | None, zero_point: Tensor | None) -> None:
    """Check dtype and shape of scales and zero points against each other and the format."""
    assert scale is not None
    if zero_point is not None and scale.shape != zero_point.shape:
        raise broken(node, f"{side}scale {text_of(scale)} and {side}zero point {text_of(zero_point)} differ in shape")
    if format.scale_dtype == torch.float32 and not scale.is_floating_point():
        raise broken(node, f"the {side}scale is {text_of(scale)}, not floating-point")
    if format.scale_dtype == torch.uint8 and scale.dtype != torch.uint8:
        raise broken(node, f"the {side}scale is {text_of(scale)}, and {format.name} has scales in bytes")
    if format.zero_points != (zero_point is not None):
        raise broken(node, f"it has {'no' if zero_point is None else 'a'} {side}zero point in the format {format.name}")


def _check_linear(node: fx.Node) -> None:
    codes, x_scale, x_zero_point = _values(node, "xq", "x_scale", "x_zero_point")
    weight, scale, zero_point = _values(node, "wq", "w_scale", "w_zero_point")
    x_format, w_format, group = _format(node, "x_format"), _format(node, "w_format"), args(node).group_size
    assert codes is not None and x_scale is not None and weight is not None and scale is not None
    features = int(codes.shape[-1])
    groups = 1 if group == 0 else features // group
    if group and features % group:
        raise broken(node, f"groups of {group} do not divide {features} input channels")
    if codes.is_floating_point():
        raise broken(node, f"its input is {text_of(codes)}, not integer codes")
    rows = scale.shape[0]
    divides = 0 < rows <= weight.shape[0] and weight.shape[0] % rows == 0
    if not divides or scale.shape[1:] != (groups,) or (zero_point is not None and scale.shape != zero_point.shape):
        raise broken(
            node,
            f"weight scale {text_of(scale)} and zero point {text_of(zero_point)} are not one each for "
            f"{weight.shape[0]} output channels x {groups} groups",
        )
    _check_scales(node, "weight ", w_format, scale, zero_point)
    source = args(node).node("xq")
    if source.target is torch.ops.fxquant.quantize.default:
        own = args(node).x_scale, args(node).x_zero_point, args(node).x_global
        if (args(source).scale, args(source).zero_point, args(source).global_scale) != own:
            raise broken(node, f"its input scale and zero point are not those that {source.name} quantized with")
        if args(source).format != x_format.name:
            raise broken(node, f"its input is {args(source).format}, and it reads {x_format.name}")
    else:
        _check_scales(node, "input ", x_format, x_scale, x_zero_point)


_LAYOUT = ("transpose", "permute", "expand", "view", "reshape", "unsqueeze", "clone", "repeat_interleave")
"""Ops that move codes, and also move grids of more than one number."""


def _check_matmul(node: fx.Node) -> None:
    for what, side in (("left", "a"), ("right", "b")):
        names = (f"{side}q", f"{side}_scale", f"{side}_zero_point")
        format = _format(node, f"{side}_format")
        codes, scale, zero_point = _values(node, *names)
        assert codes is not None and scale is not None
        if codes.is_floating_point():
            raise broken(node, f"its {what} factor is {text_of(codes)}, not integer codes")
        _check_scales(node, f"{what} ", format, scale, zero_point)
        source, *grid = (behind(getattr(args(node), name), _LAYOUT) for name in names)
        if source.target is not torch.ops.fxquant.quantize.default:
            continue
        if grid != [behind(getattr(args(source), name), _LAYOUT) for name in ("scale", "zero_point")]:
            raise broken(node, f"its {what} scale and zero point are not those that {source.name} quantized with")
        if args(source).format != format.name:
            raise broken(node, f"its {what} factor is {args(source).format}, and it reads {format.name}")


def _check_affine(node: fx.Node) -> None:
    x, scale = _values(node, "x", "scale")
    assert x is not None and scale is not None
    try:
        shape = torch.broadcast_shapes(x.shape, scale.shape)
    except RuntimeError as error:
        raise broken(node, f"scale {text_of(scale)} does not broadcast against {text_of(x)}") from error
    if tuple(shape) != tuple(x.shape):
        raise broken(node, f"scale {text_of(scale)} would change the shape of {text_of(x)}")


CHECKS: dict[str, Callable[[fx.Node], None]] = {
    "fxquant.quantize.default": _check_quantize,
    "fxquant.linear.default": _check_linear,
    "fxquant.matmul.default": _check_matmul,
    "fxquant.channel_affine.default": _check_affine,
}
"""The condition of each op that has one, by its name."""
