"""Lowers linears of block formats to torch's products, and converts their tensors back to those of checkpoints."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.derived_tensors import derived
from fxquant.backends.native.gpu import blocks
from fxquant.backends.native.library import FLOATS
from fxquant.errors import BackendError
from fxquant.ir.arguments import args
from fxquant.ir.layers import layer_of
from fxquant.ir.rewriter import Rewriter
from fxquant.numerics.formats import FORMATS
from fxquant.planning.decisions import LayerPlan

aten, reference, native = torch.ops.aten, torch.ops.fxquant, torch.ops.fxquant_native

FORMAT_NAMES = ("mxfp8", "mxfp4", "nvfp4")
"""Formats that torch multiplies, each by itself."""

_HELD, _SWIZZLED = "_held", "_swizzled"


def refuse(layer: LayerPlan) -> str | None:
    """Why no product takes a layer with a block format, and what to use instead; None if one does."""
    assert layer.format_of_weight is not None and layer.format_of_input is not None
    weight, x = layer.format_of_weight.name, layer.format_of_input.name
    if weight != x:
        block = weight if weight in FORMAT_NAMES else x
        return (
            f"products of {block} are {block} by {block}, not {x} by {weight}; choose w{block}a{block}, or backend "
            "'fake-quant'"
        )
    return None


def lower(graph: fx.Graph, rewriter: Rewriter, others: Mapping[str, Tensor]) -> None:
    """Replace linears of block formats, and the quantization of their inputs.

    Before::

        s = fxquant.block_scale(x, "mxfp8")
        codes = fxquant.quantize(x, s, None, "mxfp8")
        y = fxquant.linear(codes, s, None, W_packed, W_scale, None, bias, "mxfp8", "mxfp8", 32, dtype)

    After::

        codes, scales = fxquant_native.triton_quantize_blocks(x, "mxfp8", None)
        y = fxquant_native.scaled_linear(codes, scales, None, W_held, W_swizzled, None, bias, "mxfp8", in, out, dtype)
    """
    for node in list(graph.nodes):
        if node.target is reference.linear.default and args(node).x_format in FORMAT_NAMES:
            _lower_linear(node, rewriter, others)
    graph.eliminate_dead_code()


def stored(node: fx.Node, found: dict[str, Tensor]) -> None:
    """Put the tensors of a checkpoint in place of those that a ``scaled_linear`` reads.

    Args:
        node: The node.
        found: The tensors of the graph by name.
    """
    given = args(node)
    inner, out, format = given.in_features, given.out_features, given.format
    name = str(given.node("weight").target)
    if name in found:
        found[name.removesuffix(_HELD)] = blocks.unheld_weight(found.pop(name), out, inner, format)
    name = str(given.node("w_scales").target)
    if name in found:
        columns = inner // FORMATS[format].block
        found[name.removesuffix(_SWIZZLED)] = blocks.unswizzled(found.pop(name), out, columns)


def _lower_linear(node: fx.Node, rewriter: Rewriter, others: Mapping[str, Tensor]) -> None:
    given = args(node)
    codes, packed, w_scale, dtype = given.node("xq"), given.node("wq"), given.node("w_scale"), given.out_dtype
    format, inner, out = given.x_format, int(codes.meta["val"].shape[-1]), int(packed.meta["val"].shape[0])
    held_codes, scales = _codes_of(node, codes, given.node("x_scale"), rewriter)

    def make_weight() -> Tensor:
        return blocks.held_weight(rewriter.tensor(packed), inner, format)

    weight = derived(packed, _HELD, rewriter, others, make_weight)
    w_scales = derived(w_scale, _SWIZZLED, rewriter, others, lambda: blocks.swizzled(rewriter.tensor(w_scale)))
    kernel_dtype = dtype if dtype in FLOATS else torch.float32
    inputs = (held_codes, scales, given.x_global, weight, w_scales, given.w_global, given.bias)
    with rewriter.before(node):
        arguments = (*inputs, format, inner, out, kernel_dtype)
        new = rewriter.call(native.scaled_linear.default, arguments, [node], layer=True)
        if kernel_dtype != dtype:
            new = rewriter.call(aten.to.dtype, (new, dtype), [node], layer=True)
    rewriter.replace(node, new)
    for tensor in (packed, w_scale):
        if not tensor.users:
            rewriter.forget(tensor)  # So that memory never holds both forms of all weights of a model.


def _codes_of(node: fx.Node, codes: fx.Node, scale: fx.Node, rewriter: Rewriter) -> tuple[fx.Node, fx.Node]:
    """Codes and scales in the form that is multiplied, once for all linears that read them."""
    key = "block codes", codes
    if key not in rewriter.memo:
        x = args(codes).node("x") if codes.target is reference.quantize.default else None
        if x is None or scale.target is not reference.block_scale.default or args(scale).x is not x:
            raise BackendError(
                f"layer {layer_of(node) or node.name} reads codes of {args(node).x_format} whose scales are not those "
                "that fxquant::block_scale finds; leave it to the pass quantize-linears, or use backend 'fake-quant'"
            )
        outer = args(codes).global_scale
        with rewriter.before(codes):
            if x.meta["val"].dtype not in FLOATS:
                x = rewriter.call(aten.to.dtype, (x, torch.float32), [codes], layer=True)
            arguments: tuple[Any, ...] = (x, args(node).x_format, outer)
            both = rewriter.call(native.triton_quantize_blocks.default, arguments, [scale, codes], layer=True)
            parts = tuple(rewriter.call(operator.getitem, (both, part), [codes], layer=True) for part in (0, 1))
        rewriter.memo[key] = parts
    found: tuple[fx.Node, fx.Node] = rewriter.memo[key]
    return found
