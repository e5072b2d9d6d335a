"""Fuses the ops before and after the kernels into them. The patterns match ops, not models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.derived_tensors import derived
from fxquant.backends.native.library import FLOATS
from fxquant.backends.native.tensors import by_sample, only_reader
from fxquant.ir.arguments import args
from fxquant.ir.rewriter import Rewriter

aten = torch.ops.aten

DIVIDED = "_divided"
"""Suffix of the name of a scale that includes a constant factor from before the quantization."""

_VIEWS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.transpose.int,
        aten.permute.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.contiguous.default,
    }
)


@dataclass(frozen=True)
class Kernels:
    """The ops of one set of kernels. The patterns are the same for all sets.

    Attributes:
        linear: The product and the ops that follow it.
        norm_quantize: Norm, modulation and quantization.
        quantize: Codes of values; its arguments after the highest code are also those of ``norm_quantize``.
        attentions: Attentions that can write codes.
        bf16_attention: The attention that multiplies in bfloat16, whatever dtype it reads.
        quantize_tokens: Codes of values on grids that each row finds itself; its arguments are ``(x, qmax, ...)``.
        norm_quantize_tokens: ``norm_quantize`` with such grids.
        quantize_down: ``quantize``, and the inner values of branches of low rank.
        norm_quantize_down: ``norm_quantize``, and these inner values.
    """

    linear: Any
    norm_quantize: Any
    quantize: Any
    attentions: tuple[Any, ...] = ()
    bf16_attention: Any = None
    quantize_tokens: Any = None
    norm_quantize_tokens: Any = None
    quantize_down: Any = None
    norm_quantize_down: Any = None

    @property
    def with_codes(self) -> tuple[Any, ...]:
        """The ops that can write codes, on the grid ``out_scale`` and ``out_zero_point``."""
        return (self.linear, *self.attentions)

    @property
    def read_dense(self) -> dict[Any, tuple[str, ...]]:
        """Arguments that kernels read as contiguous. Each kernel would copy an argument that is not contiguous."""
        rows = (self.norm_quantize, self.norm_quantize_tokens, self.quantize_down, self.norm_quantize_down)
        return {self.linear: ("xq", "residual"), **{op: ("x",) for op in rows if op is not None}}


def fuse(graph: fx.Graph, rewriter: Rewriter, others: Mapping[str, Tensor], kernels: Kernels) -> None:
    """Fuse the ops around kernels into these kernels.

    These ops are fused:

    * an activation after a linear,
    * the quantization of the result of a linear, an attention or a norm, through views and constant factors,
    * a gate and a residual after a linear,
    * and the modulation between a norm and its quantization.

    A linear writes bfloat16 if only a bfloat16 attention reads its result.
    """
    for node in list(graph.nodes):
        if node.target is kernels.linear:
            _fuse_activation(node, rewriter)
    for node in list(graph.nodes):
        if node.target is kernels.quantize:
            if not _fuse_quantize(node, rewriter, others, kernels) and by_sample(args(node).node("scale")):
                fuse_norm(node, rewriter, kernels.norm_quantize)
        elif kernels.quantize_tokens is not None and node.target is kernels.quantize_tokens:
            fuse_norm(node, rewriter, kernels.norm_quantize_tokens)
        elif kernels.quantize_down is not None and node.target is kernels.quantize_down:
            fuse_norm(node, rewriter, kernels.norm_quantize_down)
    for node in list(graph.nodes):
        if node.target is kernels.linear:
            _fuse_gate_and_residual(node, rewriter)
        elif kernels.bf16_attention is not None and node.target is kernels.bf16_attention:
            _read_bf16(node, rewriter, kernels)
    for node in list(graph.nodes):
        for name in kernels.read_dense.get(node.target, ()):
            _read_dense(node, getattr(args(node), name), rewriter)


def _fuse_activation(node: fx.Node, rewriter: Rewriter) -> None:
    reader = only_reader(node)
    if reader is None:
        return
    if reader.target is aten.gelu.default and args(reader).approximate == "tanh":
        name = "gelu_tanh"
    elif reader.target is aten.silu.default:
        name = "silu"
    else:
        return
    _remake(node, reader, rewriter, activation=name)


def _fuse_gate_and_residual(node: fx.Node, rewriter: Rewriter) -> None:
    if args(node).out_scale is not None:
        return
    reader = only_reader(node)
    if reader is not None and reader.target is aten.mul.Tensor:
        gate = _other(reader, node)
        if gate is None or not _is_vector(gate, node):
            return
        node = _remake(node, reader, rewriter, gate=gate)
        reader = only_reader(node)
    if reader is not None and reader.target is aten.add.Tensor and args(reader).alpha == 1:
        residual = _other(reader, node)
        if residual is not None and _alike(residual, node):
            _remake(node, reader, rewriter, residual=residual)


def _fuse_quantize(node: fx.Node, rewriter: Rewriter, others: Mapping[str, Tensor], kernels: Kernels) -> bool:
    scale = args(node).node("scale")
    if not by_sample(scale):
        return False
    views, factor, source = through_views(args(node).x, scale)
    if source is None or source.target not in kernels.with_codes or not _writes(source, node, kernels):
        return False
    if args(source).out_scale is not None:
        return False
    if source.target is kernels.linear and (args(source).gate or args(source).residual):
        return False
    if factor != 1.0:
        grid = scale
        divided = derived(grid, f"_{factor:.6g}{DIVIDED}", rewriter, others, lambda: rewriter.tensor(grid) / factor)
        assert divided is not None
        scale = divided
    arguments = args(source).replaced(out_scale=scale, out_zero_point=args(node).zero_point, qmax=args(node).qmax)
    with rewriter.before(node):  # The grid, perhaps computed from the timestep, is known here.
        codes = rebuild(source, arguments, views, rewriter)
    rewriter.replace(node, codes)
    for view in (*views, source):
        rewriter.erase(view)
    return True


def _writes(source: fx.Node, codes: fx.Node, kernels: Kernels) -> bool:
    """Whether a kernel can write codes of this dtype. A linear writes the dtype that it multiplies."""
    dtype = codes.meta["val"].dtype
    if source.target is kernels.linear:
        return bool(args(source).node("xq").meta["val"].dtype == dtype)
    return not dtype.is_floating_point


def _read_bf16(node: fx.Node, rewriter: Rewriter, kernels: Kernels) -> None:
    """Halve the memory between linears and an attention that rounds its inputs to bfloat16 anyway."""
    found: list[tuple[list[fx.Node], fx.Node]] = []
    for x in (args(node).q, args(node).k, args(node).v):
        views, _, source = through_views(x, None)
        if source is None or source.target is not kernels.linear:
            return
        if args(source).out_dtype != torch.float32 or args(source).out_scale is not None:
            return
        found.append((views, source))
    changed: dict[str, Any] = {}
    if args(node).out_scale is None:
        if not _is_quantized_next(node, kernels):
            return
        changed["out_dtype"] = torch.float32  # Of the result: codes and inner values do not change.
    with rewriter.before(node):
        q, k, v = (
            rebuild(source, args(source).replaced(out_dtype=torch.bfloat16), views, rewriter) for views, source in found
        )
        new = rewriter.call(node.target, args(node).replaced(q=q, k=k, v=v, **changed), [node], layer=True)
    rewriter.replace(node, new)
    for views, source in found:
        for view in (*views, source):
            rewriter.erase(view)


def _is_quantized_next(node: fx.Node, kernels: Kernels) -> bool:
    """Whether only ``quantize_down`` reads a value, perhaps through views."""
    reader = only_reader(node)
    while reader is not None and reader.target in _VIEWS:
        reader = only_reader(reader)
    return reader is not None and reader.target is kernels.quantize_down


def _read_dense(node: fx.Node, value: Any, rewriter: Rewriter) -> None:
    """Make one copy for all kernels that read a value that is not contiguous, for example after a convolution."""
    if not isinstance(value, fx.Node) or value.meta["val"].is_contiguous():
        return
    key = "dense", value
    if key not in rewriter.memo:
        with rewriter.after(value):
            rewriter.memo[key] = rewriter.call(aten.contiguous.default, (value,), [value], layer=True)
    rewriter.redirect(node, value, rewriter.memo[key])


def rebuild(source: fx.Node, arguments: tuple[Any, ...], views: list[fx.Node], rewriter: Rewriter) -> fx.Node:
    """Rebuild a node with other arguments, and the views after it (last view first) without constant factors."""
    return view_again(rewriter.call(source.target, arguments, [source], layer=True), views, rewriter)


def view_again(value: fx.Node, views: list[fx.Node], rewriter: Rewriter) -> fx.Node:
    """Rebuild views (last view first) of another value, without constant factors."""
    for view in reversed(views):
        if view.target is not aten.mul.Tensor:
            value = rewriter.call(view.target, args(view).replaced(self=value), [view], layer=True)
    return value


def through_views(x: Any, scale: fx.Node | None) -> tuple[list[fx.Node], float, fx.Node | None]:
    """Views and constant factors that a value has passed, the last first; the product of the factors; the source.

    Args:
        x: The value.
        scale: The scale of the grid that is to be moved through them; None if only views may be passed.
    """
    views: list[fx.Node] = []
    factor = 1.0
    node = x
    while isinstance(node, fx.Node) and only_reader(node) is not None and not node.kwargs:
        if node.target in _VIEWS:
            if scale is not None and scale.meta["val"].numel() != 1 and not _keeps_samples(node):
                return [], 1.0, None
        elif node.target is aten.mul.Tensor and isinstance(args(node).other, float) and args(node).other > 0:
            if scale is None or scale.op != "get_attr":
                return [], 1.0, None
            factor *= args(node).other
        else:
            return views, factor, node
        views.append(node)
        node = args(node).self
    return [], 1.0, None


def _keeps_samples(view: fx.Node) -> bool:
    """Whether a view keeps the first axis in place."""
    source = args(view).node("self")
    if str(source.meta["val"].shape[0]) != str(view.meta["val"].shape[0]):
        return False
    rank = source.meta["val"].dim()
    if view.target is aten.transpose.int:
        return bool(args(view).dim0 % rank and args(view).dim1 % rank)
    if view.target is aten.permute.default:
        return bool(args(view).dims[0] % rank == 0)
    return view.target is not aten.unsqueeze.default


def fuse_norm(node: fx.Node, rewriter: Rewriter, op: Any) -> None:
    """Replace a kernel that makes codes by `op`, which computes the norm and the modulation before it as well.

    Args:
        node: The kernel; its first argument is the value.
        rewriter: The rewriter of the graph.
        op: Takes the arguments of the norm and the modulation in place of the value, then those of the kernel.
    """
    x, rest = args(node).node("x"), node.args[1:]
    passed: list[fx.Node] = []
    shift, factor, plus = None, None, 0.0
    if x.target is aten.add.Tensor and args(x).alpha == 1 and only_reader(x) is node:
        for value, added in _both_ways(x):
            if isinstance(value, fx.Node) and value.target in (aten.mul.Tensor, *_NORMS) and _is_vector(added, x):
                passed, shift, x = [x], added, value
                break
        else:
            return
    if x.target is aten.mul.Tensor and only_reader(x) is not None:
        for value, multiplied in _both_ways(x):
            if isinstance(value, fx.Node) and value.target in _NORMS and _is_vector(multiplied, x):
                passed, factor, x = [*passed, x], multiplied, value
                break
        else:
            return
    if x.target not in _NORMS or only_reader(x) is None or not _is_norm_of_channels(x):
        return
    if isinstance(factor, fx.Node) and factor.target is aten.add.Tensor and args(factor).alpha == 1:
        inner, one = args(factor).self, args(factor).other
        if isinstance(one, (int, float)) and isinstance(inner, fx.Node):
            factor, plus = inner, float(one)
    centered, norm = x.target is aten.layer_norm.default, args(x)
    if not isinstance(norm.eps, float):
        return
    bias = norm.bias if centered else None
    arguments = (norm.input, centered, norm.eps, norm.weight, bias, factor, plus, shift)
    with rewriter.before(node):
        new = rewriter.call(op, (*arguments, *rest), [x, *reversed(passed), node], layer=True)
    rewriter.replace(node, new)
    for part in (*passed, x):
        rewriter.erase(part)


_NORMS = (aten.layer_norm.default, aten.rms_norm.default)


def _is_norm_of_channels(norm: fx.Node) -> bool:
    dtype = args(norm).node("input").meta["val"].dtype
    if dtype not in FLOATS or len(args(norm).normalized_shape) != 1:
        return False
    names = ("weight", "bias") if norm.target is aten.layer_norm.default else ("weight",)
    given = [name for name in names if getattr(args(norm), name) is not None]
    return all(args(norm).node(name).meta["val"].dtype == dtype for name in given)


def _remake(node: fx.Node, reader: fx.Node, rewriter: Rewriter, **changed: Any) -> fx.Node:
    """Replace a linear and its reader by one linear with other arguments that does both."""
    with rewriter.before(reader):
        new = rewriter.call(node.target, args(node).replaced(**changed), [reader, node], layer=True)
    rewriter.replace(reader, new)
    rewriter.erase(node)
    return new


def _other(reader: fx.Node, node: fx.Node) -> fx.Node | None:
    """The other operand of a binary op; None if it is a number or the same node."""
    left, right = args(reader).self, args(reader).other
    other = right if left is node else left
    return other if isinstance(other, fx.Node) and other is not node else None


def _both_ways(node: fx.Node) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The operands of a binary op in both orders."""
    left, right = args(node).self, args(node).other
    return (left, right), (right, left)


def _is_vector(value: Any, like: fx.Node) -> bool:
    """Whether a value is a vector over the channels of another value, one for all or one per sample, of its dtype."""
    if not isinstance(value, fx.Node):
        return False
    own, of = value.meta["val"], like.meta["val"]
    if own.dtype != of.dtype or of.dtype not in FLOATS or not 1 <= own.dim() <= of.dim():
        return False
    if str(own.shape[-1]) != str(of.shape[-1]) or any(str(size) != "1" for size in own.shape[1:-1]):
        return False
    if own.dim() in (1, 2) and own.dim() < of.dim():  # A leading axis would be the token axis.
        return own.dim() == 1 or str(own.shape[0]) == "1"
    return str(own.shape[0]) in ("1", str(of.shape[0])) if own.dim() > 1 else True


def _alike(value: fx.Node, like: fx.Node) -> bool:
    own, of = value.meta["val"], like.meta["val"]
    return own.dtype == of.dtype and [str(size) for size in own.shape] == [str(size) for size in of.shape]
