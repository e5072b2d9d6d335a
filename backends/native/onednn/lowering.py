"""Lowers a quantized graph to oneDNN's integer products, and converts its tensors back to checkpoint tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fxquant.backends.derived_tensors import derived
from fxquant.backends.native.activations import lower_quantize
from fxquant.backends.native.onednn import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.native.onednn import weights
from fxquant.backends.native.tensors import by_sample, only_reader
from fxquant.ir.arguments import args
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.tensors import drop_unread_tensors, read_tensors
from fxquant.ir.tops import separate_tops
from fxquant.numerics.formats import bits_of

aten, native = torch.ops.aten, torch.ops.fxquant_native

_PREPACKED = "_int8"
_SUMS = "_sums"
_OFFSET = "_missing_offset"


def lower(module: fx.GraphModule, others: Mapping[str, Tensor]) -> None:
    """Rewrite a quantized graph in place.

    Before::

        codes = fxquant.quantize(x, s, z, 0, 255, uint8)
        y = fxquant.linear(codes, s, z, W_packed, W_scale, W_zero_point, bias, "int8", "int4", 0, dtype)

    After::

        codes = fxquant_native.quantize(x, s, z, 255)
        y = fxquant_native.linear(codes, s, z, W_int8, W_scale, W_zero_point, None, bias, bits, dtype)

    and, where the int8 weight lacks a part of the weight (:mod:`fxquant.backends.native.onednn.weights`)::

        y = fxquant_native.add_missing(y, fxquant_native.input_sums(codes, s, z), W_missing_offset, dtype)

    A linear, its GELU and the quantization of the GELU become ``fxquant_native.linear_gelu``, if nothing else reads the
    results of the linear and the GELU.
    """
    rewriter = Rewriter(module, "lower to native")
    separate_tops(module.graph, rewriter)
    for node in list(module.graph.nodes):
        if node.target is torch.ops.fxquant.quantize.default:
            lower_quantize(node, rewriter)
        elif node.target is torch.ops.fxquant.linear.default:
            _lower_linear(node, rewriter, others)
    for node in list(module.graph.nodes):
        if node.target is native.linear.default:
            _fuse_gelu(node, rewriter)
    module.graph.eliminate_dead_code()
    drop_unread_tensors(module)


def stored(module: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors of a lowered graph, with packed codes in place of weights and without derived tensors."""
    found = read_tensors(module)
    for node in module.graph.nodes:
        if node.target not in (native.linear.default, native.linear_gelu.default):
            continue
        weight, zero_point = (str(args(node).node(name).target) for name in ("weight", "w_zero_point"))
        if weight in found:
            packed = weight.removesuffix(_PREPACKED)
            found[packed] = weights.unpacked(found.pop(weight), found[zero_point], args(node).bits)
            found.pop(f"{packed}{_SUMS}", None)
            found.pop(f"{packed}{_OFFSET}", None)
    return found


def _lower_linear(node: fx.Node, rewriter: Rewriter, others: Mapping[str, Tensor]) -> None:
    given = args(node)
    codes, packed, bits = given.node("xq"), given.node("wq"), bits_of(given.w_format)
    grid = rewriter.tensor(packed), rewriter.tensor(given.w_zero_point), bits, int(codes.meta["val"].shape[-1])
    weight = derived(packed, _PREPACKED, rewriter, others, lambda: weights.prepacked(*grid))
    assert weight is not None
    summed = None
    if not by_sample(given.node("x_scale")):
        summed = derived(packed, _SUMS, rewriter, others, lambda: weights.sums(*grid))
    offset = derived(
        packed, _OFFSET, rewriter, others, lambda: weights.missing_offset(rewriter.tensor(given.w_scale), grid[1], bits)
    )
    left = codes, given.x_scale, given.x_zero_point
    arguments = (*left, weight, given.w_scale, given.w_zero_point, summed, given.bias, bits)
    with rewriter.before(node):
        if offset is None:
            new = rewriter.call(native.linear.default, (*arguments, given.out_dtype), [node], layer=True)
        else:
            product = rewriter.call(native.linear.default, (*arguments, torch.float32), [node], layer=True)
            key = "sums", *left
            if key not in rewriter.memo:
                rewriter.memo[key] = rewriter.call(native.input_sums.default, left, [codes], layer=True)
            corrected = (product, rewriter.memo[key], offset, given.out_dtype)
            new = rewriter.call(native.add_missing.default, corrected, [node], layer=True)
    rewriter.replace(node, new)
    if not packed.users:
        rewriter.forget(packed)  # So that a model never holds both forms of all weights.


def _fuse_gelu(node: fx.Node, rewriter: Rewriter) -> None:
    gelu = only_reader(node)
    codes = None if gelu is None else only_reader(gelu)
    if gelu is None or codes is None or gelu.target is not aten.gelu.default:
        return
    if codes.target is not native.quantize.default or args(gelu).approximate != "tanh":
        return
    given, out = args(node), args(codes)
    if given.w_sums is not None or not by_sample(out.node("scale")):
        return
    factors = (given.xq, given.x_scale, given.x_zero_point, given.weight, given.w_scale, given.w_zero_point)
    arguments = (*factors, given.bias, given.bits, out.scale, out.zero_point, out.qmax)
    with rewriter.before(codes):
        new = rewriter.call(native.linear_gelu.default, arguments, [codes, gelu, node], layer=True)
    rewriter.replace(codes, new)
    rewriter.erase(gelu)
    rewriter.erase(node)
