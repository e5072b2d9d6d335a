"""From a quantized graph to one of oneDNN's integer products, and from its tensors back to those of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.backends.native import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.native import weights
from fxquant.capture import drop_unread_tensors, read_tensors
from fxquant.ir.rewriter import Rewriter
from fxquant.timesteps import reads_rows

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

    and, where the held weight lacks a part of the weight (:mod:`fxquant.backends.native.weights`)::

        y = fxquant_native.add_missing(y, fxquant_native.input_sums(codes, s, z), W_missing_offset, dtype)

    A linear, its GELU and the quantization of that, which nothing else reads, become ``fxquant_native.linear_gelu``.
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
    """The tensors of a lowered graph, with packed codes in place of weights and without what follows from others."""
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
    assert (qmin, dtype) == (0, torch.uint8), f"{node} is not of codes from 0"
    with rewriter.before(node):
        new = rewriter.call(native.quantize.default, (x, scale, zero_point, qmax), [node], name=node.name)
    rewriter.replace(node, new)


def _lower_linear(node: fx.Node, rewriter: Rewriter, held: Mapping[str, Tensor]) -> None:
    codes, x_scale, x_zero_point, packed, w_scale, w_zero_point, bias, bits, _, dtype = node.args
    assert isinstance(codes, fx.Node) and isinstance(packed, fx.Node) and isinstance(bits, int)
    in_features = int(codes.meta["val"].shape[-1])
    grid = rewriter.tensor(packed), rewriter.tensor(w_zero_point), bits, in_features
    weight = _held(packed, _HELD, rewriter, held, lambda: weights.prepacked(*grid))
    assert weight is not None
    summed = None
    if not _by_sample(x_scale):
        summed = _held(packed, _SUMS, rewriter, held, lambda: weights.sums(*grid))
    offset = _held(
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
        rewriter.forget(packed)  # So that both forms of the weights of a model never add up.


def _held(
    packed: fx.Node, suffix: str, rewriter: Rewriter, held: Mapping[str, Tensor], make: Callable[[], Tensor | None]
) -> fx.Node | None:
    """The node of a tensor that follows from a packed weight: that of another graph, or made here; None for none."""
    name = f"{packed.target}{suffix}"
    if name not in rewriter.memo:
        # Without values nothing can be made; then the other graphs tell whether there is such a tensor.
        without = isinstance(rewriter.tensor(packed), FakeTensor)
        value = held.get(name) if without or name in held else make()
        rewriter.memo[name] = None if value is None else rewriter.constant(name, value, [packed])
    node: fx.Node | None = rewriter.memo[name]
    return node


def _by_sample(scale: object) -> bool:
    """Whether a grid is one for all or one a sample, not one a token."""
    assert isinstance(scale, fx.Node)
    return scale.op == "get_attr" or reads_rows(scale)


def _fuse_gelu(node: fx.Node, rewriter: Rewriter) -> None:
    gelu = _only_reader(node, aten.gelu.default)
    codes = None if gelu is None else _only_reader(gelu, native.quantize.default)
    if gelu is None or codes is None or gelu.kwargs.get("approximate") != "tanh" or node.args[6] is not None:
        return
    _, scale, zero_point, qmax = codes.args
    if not _by_sample(scale):
        return
    *grid, bias, bits, _ = node.args[:6] + node.args[7:]
    with rewriter.before(codes):
        new = rewriter.call(
            native.linear_gelu.default, (*grid, bias, bits, scale, zero_point, qmax), [codes, gelu, node]
        )
    rewriter.replace(codes, new)
    rewriter.erase(gelu)
    rewriter.erase(node)


def _only_reader(node: fx.Node, target: object) -> fx.Node | None:
    reader = next(iter(node.users), None)
    return reader if reader is not None and len(node.users) == 1 and reader.target is target else None
