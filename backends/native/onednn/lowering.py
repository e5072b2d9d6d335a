"""Lowers a quantized graph to oneDNN's integer products, and converts its tensors back to checkpoint tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fxquant.backends.native.onednn import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.native.onednn import weights
from fxquant.backends.native.tensors import by_sample, derived, only_reader
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.tensors import drop_unread_tensors, read_tensors

aten, native = torch.ops.aten, torch.ops.fxquant_native

_HELD = "_int8"
_SUMS = "_sums"
_OFFSET = "_missing_offset"


def lower(module: fx.GraphModule, held: Mapping[str, Tensor]) -> None:
    """Rewrite a quantized graph in place.

    Before::

        codes = fxquant.quantize(x, s, z, 0, 255, uint8)
        y = fxquant.linear(codes, s, z, W_packed, W_scale, W_zero_point, bias, bits, 0, dtype)

    After::

        codes = fxquant_native.quantize(x, s, z, 255)
        y = fxquant_native.linear(codes, s, z, W_int8, W_scale, W_zero_point, None, bias, bits, dtype)

    and, where the held weight lacks a part of the weight (:mod:`fxquant.backends.native.onednn.weights`)::

        y = fxquant_native.add_missing(y, fxquant_native.input_sums(codes, s, z), W_missing_offset, dtype)

    A linear, its GELU and the quantization of the GELU become ``fxquant_native.linear_gelu``, if nothing else reads the
    results of the linear and the GELU.
    """
    rewriter = Rewriter(module, "lower to native")
    for node in list(module.graph.nodes):
        if node.target is torch.ops.fxquant.quantize.default:
            _lower_quantize(node, rewriter)
        elif node.target is torch.ops.fxquant.linear.default:
            _lower_linear(node, rewriter, held)
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
        held, zero_point = (str(node.args[position].target) for position in (3, 5))
        if held in found:
            bits = node.args[8 if node.target is native.linear.default else 7]
            packed = held.removesuffix(_HELD)
            found[packed] = weights.unpacked(found.pop(held), found[zero_point], bits)
            found.pop(f"{packed}{_SUMS}", None)
            found.pop(f"{packed}{_OFFSET}", None)
    return found


def _lower_quantize(node: fx.Node, rewriter: Rewriter) -> None:
    x, scale, zero_point, qmin, qmax, dtype = node.args
    assert (qmin, dtype) == (0, torch.uint8), f"{node} does not make uint8 codes from 0"
    with rewriter.before(node):
        new = rewriter.call(native.quantize.default, (x, scale, zero_point, qmax), [node], name=node.name)
    rewriter.replace(node, new)


def _lower_linear(node: fx.Node, rewriter: Rewriter, held: Mapping[str, Tensor]) -> None:
    codes, x_scale, x_zero_point, packed, w_scale, w_zero_point, bias, bits, _, dtype = node.args
    assert isinstance(codes, fx.Node) and isinstance(packed, fx.Node) and isinstance(bits, int)
    in_features = int(codes.meta["val"].shape[-1])
    grid = rewriter.tensor(packed), rewriter.tensor(w_zero_point), bits, in_features
    weight = derived(packed, _HELD, rewriter, held, lambda: weights.prepacked(*grid))
    assert weight is not None
    summed = None
    if not by_sample(x_scale):
        summed = derived(packed, _SUMS, rewriter, held, lambda: weights.sums(*grid))
    offset = derived(
        packed, _OFFSET, rewriter, held, lambda: weights.missing_offset(rewriter.tensor(w_scale), grid[1], bits)
    )
    arguments = (codes, x_scale, x_zero_point, weight, w_scale, w_zero_point, summed, bias, bits)
    with rewriter.before(node):
        if offset is None:
            new = rewriter.call(native.linear.default, (*arguments, dtype), [node])
        else:
            product = rewriter.call(native.linear.default, (*arguments, torch.float32), [node])
            key = "sums", codes, x_scale, x_zero_point
            if key not in rewriter.memo:
                sums = rewriter.call(native.input_sums.default, (codes, x_scale, x_zero_point), [codes])
                rewriter.memo[key] = sums
            new = rewriter.call(native.add_missing.default, (product, rewriter.memo[key], offset, dtype), [node])
    rewriter.replace(node, new)
    if not packed.users:
        rewriter.forget(packed)  # So that a model never holds both forms of all weights.


def _fuse_gelu(node: fx.Node, rewriter: Rewriter) -> None:
    gelu = only_reader(node)
    codes = None if gelu is None else only_reader(gelu)
    if gelu is None or codes is None or gelu.target is not aten.gelu.default:
        return
    if codes.target is not native.quantize.default or gelu.kwargs.get("approximate") != "tanh":
        return
    if node.args[6] is not None:
        return
    _, scale, zero_point, qmax = codes.args
    if not by_sample(scale):
        return
    *grid, bias, bits, _ = node.args[:6] + node.args[7:]
    with rewriter.before(codes):
        new = rewriter.call(
            native.linear_gelu.default, (*grid, bias, bits, scale, zero_point, qmax), [codes, gelu, node]
        )
    rewriter.replace(codes, new)
    rewriter.erase(gelu)
    rewriter.erase(node)
