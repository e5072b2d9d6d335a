"""Rules for ops with parameters, where a request ends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, fx

from fxquant.channels.rules.table import rule, shape_of, tied
from fxquant.channels.wants import Barrier, End, Outcome, Push, Want
from fxquant.ir import ops as _ops  # noqa: F401  (registers the ops that rules are for)
from fxquant.ir.arguments import args
from fxquant.ir.layers import parameter_of
from fxquant.ir.places import place_of
from fxquant.ir.rewriter import Rewriter

aten = torch.ops.aten


@rule(aten.linear.default)
def linear(node: fx.Node, want: Want) -> Outcome:
    """End: W <- diag(a) W, b <- a b + c."""
    if len(shape_of(args(node).node("weight"))) < 2:
        return Barrier(f"the weight of {node.name} is a vector, so its outputs are not channels")
    reason = "a linear's outputs cannot be scaled differently from token to token"
    return tied(want, range(want.scale.ndim - 1), reason) or _rows_end(node, want)


@rule(
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
)
def convolution(node: fx.Node, want: Want) -> Outcome:
    """End: the same, for output channels."""
    spatial = len(shape_of(args(node).node("weight"))) - 2
    channels = want.scale.ndim - 1 - spatial  # An unbatched input has its channels first.
    reason = "a convolution's outputs cannot be scaled differently from place to place"
    return tied(want, (axis for axis in range(want.scale.ndim) if axis != channels), reason) or _rows_end(node, want)


def _rows_end(node: fx.Node, want: Want) -> Outcome:
    if not are_parameters(node, "weight", "bias"):
        return Barrier(f"the weight of {node.name} is computed in the graph")
    shifted = bool(want.offset.any())
    gives = "bias" if shifted and args(node).bias is None else None
    return End(partial(_fold_rows, node, shifted), into=layer_of(node), gives=gives)


def _fold_rows(node: fx.Node, shifted: bool, rewriter: Rewriter, a: Tensor, c: Tensor) -> None:
    out_features = shape_of(args(node).node("weight"))[0]
    rows, shift = a.flatten().expand(out_features), c.flatten().expand(out_features)

    def folded(weight: Tensor) -> Tensor:
        return weight.double() * rows.to(weight.device).reshape(-1, *[1] * (weight.dim() - 1))

    rewriter.fold(node, "weight", folded, by=("rows", rows))
    if args(node).bias is not None:

        def moved(bias: Tensor) -> Tensor:
            return bias.double() * rows.to(bias.device) + shift.to(bias.device)

        rewriter.fold(node, "bias", moved, by=("affine", rows, shift))
    elif shifted:
        rewriter.give(node, "bias", shift)


def are_parameters(node: fx.Node, *names: str) -> bool:
    """Whether these arguments are parameters of the model, or not given."""
    given = [name for name in names if getattr(args(node), name) is not None]
    return all(parameter_of(args(node).node(name)).op == "get_attr" for name in given)


def layer_of(node: fx.Node) -> str:
    """Name of the layer of a node, for the report."""
    return place_of(node)


@rule(aten.layer_norm.default)
def layer_norm(node: fx.Node, want: Want) -> Outcome:
    """End: weight <- a weight, bias <- a bias + c; a norm without weights is given them."""
    return _norm(node, want, "weight", "bias")


@rule(aten.rms_norm.default)
def rms_norm(node: fx.Node, want: Want) -> Outcome:
    """End: weight <- a weight; a norm without a weight is given one. (a, 0) to a weight that is computed."""
    return _norm(node, want, "weight")


def _norm(node: fx.Node, want: Want, *parameters: str) -> Outcome:
    shape = args(node).normalized_shape
    if not all(isinstance(size, int) for size in shape):
        return Barrier(f"{node.name} normalizes over the batch")
    found = tied(
        want, range(want.scale.ndim - len(shape)), "a norm's outputs cannot be scaled differently from token to token"
    )
    if found is not None:
        return found
    if "bias" not in parameters and want.offset.any():
        return Barrier("an RMS norm cannot take a constant shift")
    if not are_parameters(node, *parameters):
        return _to_operands(node, want, parameters)
    given, shifted = args(node).weight is not None, bool(want.offset.any())
    fold = partial(_fold_norm, node, parameters, shifted)
    needed = ("weight", "bias") if shifted else ("weight",)
    gives = next((name for name in needed if getattr(args(node), name) is None), None)
    return End(fold, into=node.name, operands=0 if given else 1, gives=gives)


def _to_operands(node: fx.Node, want: Want, parameters: Sequence[str]) -> Outcome:
    """Push the request to a weight and bias that are computed in the graph, such as ``1 + w``."""
    given = [getattr(args(node), name) for name in parameters]
    operands = [operand for operand in given if isinstance(operand, fx.Node)]
    if len(operands) < len(given) or want.offset.any():
        return Barrier(f"the weight of {node.name} is computed in the graph")
    rank = len(shape_of(operands[0]))
    moved = want.map(lambda array: array.reshape(array.shape[array.ndim - rank :]))
    return Push([(operand, moved) for operand in operands])


def _fold_norm(
    node: fx.Node, parameters: Sequence[str], shifted: bool, rewriter: Rewriter, a: Tensor, c: Tensor
) -> None:
    shape = list(args(node).normalized_shape)
    a, c = (t.reshape(t.shape[t.dim() - len(shape) :]).expand(shape) for t in (a, c))
    if args(node).weight is None:
        rewriter.give(node, "weight", a)
    else:
        rewriter.fold(node, "weight", lambda w: w.double() * a.to(w.device), by=("affine", a))
    if "bias" in parameters and args(node).bias is not None:
        rewriter.fold(node, "bias", lambda b: b.double() * a.to(b.device) + c.to(b.device), by=("affine", a, c))
    elif "bias" in parameters and shifted:
        rewriter.give(node, "bias", c)


@rule(aten.embedding.default)
def embedding(node: fx.Node, want: Want) -> Outcome:
    """End: fold into the columns of (a private copy of) the table."""
    found = tied(
        want, range(want.scale.ndim - 1), "an embedding's rows cannot be scaled differently from token to token"
    )
    if found is not None:
        return found
    if not are_parameters(node, "weight"):
        return Barrier(f"the table of {node.name} is computed in the graph")
    return End(partial(_fold_table, node), into=layer_of(node))


def _fold_table(node: fx.Node, rewriter: Rewriter, a: Tensor, c: Tensor) -> None:
    def folded(table: Tensor) -> Tensor:
        return table.double() * a.flatten().to(table.device) + c.flatten().to(table.device)

    rewriter.fold(node, "weight", folded, by=("columns", a, c))


@rule("get_attr")
def parameter(node: fx.Node, want: Want) -> Outcome:
    """End: fold into (a private copy of) the parameter."""
    if not node.meta["val"].is_floating_point():
        return Barrier(f"{node.target} is not a floating-point tensor")
    return End(partial(_fold_parameter, node), into=str(node.target))


def _fold_parameter(
    node: fx.Node, rewriter: Rewriter, a: Tensor, c: Tensor, readers: Sequence[fx.Node] | None = None
) -> fx.Node:
    def folded(parameter: Tensor) -> Tensor:
        return parameter.double() * a.to(parameter.device) + c.to(parameter.device)

    return rewriter.fold_attribute(node, folded, readers, by=("affine", a, c))


@rule("placeholder")
def model_input(node: fx.Node, want: Want) -> Outcome:
    """Barrier: an input of the model."""
    return Barrier(f"it comes straight from the model's input {node.name}")
