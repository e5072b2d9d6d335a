"""Conditions on the ops of fxquant: scales, zero points, codes and groups that fit each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import VerificationError
from fxquant.ir.arguments import args
from fxquant.ir.dataflow import behind
from fxquant.ir.meta import PROVENANCE
from fxquant.ir.places import label


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


def _values(node: fx.Node, *names: str) -> Iterator[Tensor]:
    return (args(node).node(name).meta["val"] for name in names)


def _check_quantize(node: fx.Node) -> None:
    scale, zero_point = _values(node, "scale", "zero_point")
    qmin, qmax, dtype = args(node).qmin, args(node).qmax, args(node).dtype
    if scale.shape != zero_point.shape:
        raise broken(node, f"scale {text_of(scale)} and zero point {text_of(zero_point)} differ in shape")
    if not scale.is_floating_point():
        raise broken(node, f"the scale is {text_of(scale)}, not floating-point")
    limits = torch.iinfo(dtype)
    if not limits.min <= qmin < qmax <= limits.max:
        raise broken(node, f"codes {qmin}..{qmax} do not fit {dtype}")


def _check_linear(node: fx.Node) -> None:
    codes, x_scale, x_zero_point = _values(node, "xq", "x_scale", "x_zero_point")
    weight, scale, zero_point = _values(node, "wq", "w_scale", "w_zero_point")
    bits, group = args(node).bits, args(node).group_size
    features = int(codes.shape[-1])
    groups = 1 if group == 0 else features // group
    if group and features % group:
        raise broken(node, f"groups of {group} do not divide {features} input channels")
    if codes.is_floating_point():
        raise broken(node, f"its input is {text_of(codes)}, not integer codes")
    if tuple(scale.shape) != (weight.shape[0], groups) or scale.shape != zero_point.shape:
        raise broken(
            node,
            f"weight scale {text_of(scale)} and zero point {text_of(zero_point)} are not one each for "
            f"{weight.shape[0]} output channels x {groups} groups",
        )
    source = args(node).node("xq")
    if source.target is torch.ops.fxquant.quantize.default:
        if (args(source).scale, args(source).zero_point) != (args(node).x_scale, args(node).x_zero_point):
            raise broken(node, f"its input scale and zero point are not those that {source.name} quantized with")
    elif x_scale.shape != x_zero_point.shape:
        raise broken(node, "input scale and zero point differ in shape")
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise broken(node, f"weights of {bits} bits are not supported")


_LAYOUT = ("transpose", "permute", "expand", "view", "reshape", "unsqueeze", "clone", "repeat_interleave")
"""Ops that move codes, and also move grids of more than one number."""


def _check_matmul(node: fx.Node) -> None:
    for what, side in (("left", "a"), ("right", "b")):
        names = (f"{side}q", f"{side}_scale", f"{side}_zero_point")
        codes, scale, zero_point = _values(node, *names)
        if codes.is_floating_point():
            raise broken(node, f"its {what} factor is {text_of(codes)}, not integer codes")
        if not scale.is_floating_point():
            raise broken(node, f"the {what} scale is {text_of(scale)}, not floating-point")
        if scale.shape != zero_point.shape:
            raise broken(node, f"the {what} scale and zero point differ in shape")
        source, *grid = (behind(args(node).node(name), _LAYOUT) for name in names)
        if source.target is not torch.ops.fxquant.quantize.default:
            continue
        if grid != [behind(args(source).node(name), _LAYOUT) for name in ("scale", "zero_point")]:
            raise broken(node, f"its {what} scale and zero point are not those that {source.name} quantized with")


def _check_affine(node: fx.Node) -> None:
    x, scale = _values(node, "x", "scale")
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
