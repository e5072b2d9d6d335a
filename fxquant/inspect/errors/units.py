"""What one layer computes, float and quantized: the parts of a quantized graph whose error is measured one by one.

In a float run of a quantized graph, ``fxquant::quantize`` returns its input, and layers use their float weights. So the
same graph computes the float model, and any single layer of it can be quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.nn import functional

from fxquant.inspect.errors.graphs import Pair, codes_of, rounded_weight
from fxquant.ir.attention import ATTENTION
from fxquant.ir.meta import LAYER
from fxquant.ir.ops.definition import decode_input
from fxquant.numerics import grids
from fxquant.numerics.formats import Scales
from fxquant.reconstruction.simulate import Lookup

aten, ours = torch.ops.aten, torch.ops.fxquant


@dataclass(frozen=True)
class LocalError:
    """Error of one output, as tensors of the output's shape.

    Attributes:
        both: With a quantized weight and a quantized input.
        weights: With a quantized weight only; None if there is no weight.
        inputs: What a quantized input adds to that; None if the input stays float.
    """

    both: Tensor
    weights: Tensor | None
    inputs: Tensor | None


class Unit(Protocol):
    """A layer or attention."""

    @property
    def name(self) -> str:
        """Its name in the plan."""

    @property
    def output(self) -> fx.Node:
        """The node whose value it makes."""

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """Nodes whose values :meth:`error` looks up."""

    def error(self, args: tuple[Any, ...], value: Lookup) -> LocalError:
        """The error of the output if this unit alone is quantized, given the arguments of the output node."""


@dataclass(frozen=True, eq=False)
class CodedLayer:
    """A linear or convolution with quantized weight and input: ``fxquant.linear`` or ``fxquant.conv2d``."""

    name: str
    output: fx.Node
    pair: Pair
    reads: tuple[fx.Node, ...] = ()

    def error(self, args: tuple[Any, ...], value: Lookup) -> LocalError:
        """See :class:`Unit`."""
        exact = float_weight(self.output, self.pair)
        delta = rounded_weight(self.output, self.pair, exact) - exact
        x = args[0].to(exact.dtype)
        top = value(self.reads[0]) if self.reads else None
        moved = _fake_quantized((x, *_input_scales(self.output, args)), top) - x
        weights = _product(self.output, args, x, delta)
        inputs = _product(self.output, args, moved, delta.add_(exact))  # The quantized weight.
        return LocalError(weights + inputs, weights, inputs)

    def exact(self, args: tuple[Any, ...]) -> Tensor:
        """The product in float, without a bias."""
        weight = float_weight(self.output, self.pair)
        return _product(self.output, args, args[0].to(weight.dtype), weight)

    def coded(self, args: tuple[Any, ...]) -> Tensor:
        """The product of rounded weight and input, without a bias, in the dtype of :meth:`exact`."""
        weight = rounded_weight(self.output, self.pair, float_weight(self.output, self.pair))
        x = args[0].to(weight.dtype)
        return _product(self.output, args, _fake_quantized((x, *_input_scales(self.output, args))), weight)


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """A linear or convolution whose weight alone is quantized: an aten op that reads ``fxquant.dequantize_weight``."""

    name: str
    output: fx.Node
    pair: Pair
    source: fx.Node
    reads: tuple[fx.Node, ...] = ()

    def error(self, args: tuple[Any, ...], value: Lookup) -> LocalError:
        """See :class:`Unit`."""
        exact = float_weight(self.source, self.pair)
        delta = (rounded_weight(self.source, self.pair, exact) - exact).to(args[1].dtype).reshape(args[1].shape)
        target: Any = self.output.target
        error = target(args[0], delta, None, *args[3:])
        return LocalError(error, error, None)


@dataclass(frozen=True, eq=False)
class StoredTable:
    """An embedding whose table is quantized."""

    name: str
    output: fx.Node
    pair: Pair
    reads: tuple[fx.Node, ...]

    def error(self, args: tuple[Any, ...], value: Lookup) -> LocalError:
        """See :class:`Unit`."""
        error = ours.dequantize_weight(*args) - self.rows(value)
        return LocalError(error, error, None)

    def rows(self, value: Lookup) -> Tensor:
        """The float rows that are looked up."""
        dtype = self.output.meta["val"].dtype
        return functional.embedding(value(self.reads[0]), self.pair.weights[self.name]).to(dtype)


@dataclass(frozen=True, eq=False)
class CodedAttention:
    """The two quantized products of an attention, with everything between them."""

    name: str
    output: fx.Node
    inner: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]

    def error(self, args: tuple[Any, ...], value: Lookup) -> LocalError:
        """See :class:`Unit`."""
        exact = float_value(self.output, args, None, value)
        held: dict[fx.Node, Any] = {}

        def look(node: fx.Node) -> Any:
            return held[node] if node in held else value(node)

        for node in self.inner:
            own = map_arg(node.args, look)
            if node.target is ours.quantize.default:
                held[node] = _fake_quantized(own)
            else:
                found = float_value(node, own, None, look)
                function: Any = node.target
                held[node] = function(*own, **node.kwargs) if found is NotImplemented else found
        error = held[self.output] - exact
        return LocalError(error, None, error)


def units_of(pair: Pair) -> dict[fx.Node, Unit]:
    """The units of a graph by the node of their output, in the order of the graph."""
    found: dict[fx.Node, Unit] = {}
    for node in pair.quantized.graph.nodes:
        name = str(node.meta.get(LAYER, ""))
        if node.target in (ours.linear.default, ours.conv2d.default) and name in pair.weights:
            found[node] = CodedLayer(name, node, pair, _top(node.args[0]))
        elif node.target is ours.dequantize_weight.default and name in pair.weights:
            if codes_of(node) is None:
                found[node] = StoredTable(name, node, pair, (node.args[0].args[1],))
                continue
            for user in _readers(node):
                found[user] = StoredLayer(name, user, pair, node)
        elif node.target is ours.matmul.default and (inner := _between(node)):
            own = set(inner)
            reads = dict.fromkeys(n for part in inner for n in part.all_input_nodes if n not in own)
            found[node] = CodedAttention(_attention_name(node), node, inner, tuple(reads))
    return found


def float_value(node: fx.Node, args: Sequence[Any], pair: Pair | None, value: Lookup) -> Any:
    """The value of a node in a float run; ``NotImplemented`` for nodes that compute what they do in the float model.

    Args:
        node: The node.
        args: Values of its arguments.
        pair: Holds the float weights; None where no layer occurs.
        value: Looks up other values.
    """
    if node.target is ours.quantize.default:
        return args[0]
    if node.target is ours.token_grid.default:  # It has no derivative.
        with torch.no_grad():
            return ours.token_grid(args[0].detach(), args[1])
    if node.target is ours.token_scale.default or node.target is ours.block_scale.default:
        with torch.no_grad():
            return node.target(args[0].detach(), *args[1:])
    if node.target is ours.matmul.default:
        dtype = grids.compute_dtype(args[8])
        return torch.matmul(args[0].to(dtype), args[3].to(dtype)).to(args[8])
    if pair is None or str(node.meta.get(LAYER, "")) not in pair.weights:
        return NotImplemented
    if node.target in (ours.linear.default, ours.conv2d.default):
        weight = float_weight(node, pair)
        y, bias = _product(node, args, args[0].to(weight.dtype), weight), args[6]
        if bias is not None:
            shaped = bias.reshape(-1, 1, 1) if node.target is ours.conv2d.default and bias.dim() == 1 else bias
            y = y + shaped.to(y.dtype)
        return y.to(args[10] if node.target is ours.linear.default else args[14])
    if node.target is ours.dequantize_weight.default:
        name = str(node.meta[LAYER])
        if codes_of(node) is None:
            return StoredTable(name, node, pair, (node.args[0].args[1],)).rows(value)  # type: ignore[union-attr, arg-type]
        return float_weight(node, pair).to(args[6])
    return NotImplemented


def float_weight(node: fx.Node, pair: Pair) -> Tensor:
    """The float weight ``[out, in]`` of a layer, in the dtype in which its product is computed."""
    dtype = grids.compute_dtype(node.meta["val"].dtype)
    return pair.weights[str(node.meta[LAYER])].flatten(1).to(dtype)


def _input_scales(node: fx.Node, args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of ``fxquant.quantize`` behind the value, given the arguments of a layer that reads the codes."""
    is_linear = node.target is ours.linear.default
    outer = args[11:12] if is_linear else ()
    return (args[1], args[2], args[7], *outer)


def _top(codes: Any) -> tuple[fx.Node, ...]:
    """The node of the highest code of codes, if it is not that of their format."""
    if isinstance(codes, fx.Node) and codes.target is ours.quantize.default and len(codes.args) > 5:
        return tuple(node for node in codes.args[5:] if isinstance(node, fx.Node))
    return ()


def _fake_quantized(args: Sequence[Any], top: Tensor | None = None) -> Tensor:
    """The dequantized codes of ``fxquant.quantize``, given its arguments."""
    x, scale, zero_point, format, *outer = args
    codes = ours.quantize(x, scale, zero_point, format, *(outer or [None]), top)
    return decode_input(codes, Scales(scale, zero_point, *outer), format, x.dtype)


def _product(node: fx.Node, args: Sequence[Any], x: Tensor, weight: Tensor) -> Tensor:
    """The product of a linear or convolution with other factors, without its bias."""
    if node.target is ours.linear.default:
        return functional.linear(x, weight)
    kernel, stride, padding, dilation, groups = args[9:14]
    return functional.conv2d(x, weight.unflatten(1, kernel), None, stride, padding, dilation, groups)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """The layers that read a dequantized weight, directly or as the kernel of a convolution."""
    for user in node.users:
        if user.target is aten.view.default:
            yield from _readers(user)
        elif len(user.args) > 1 and user.args[1] is node:
            yield user


def _between(product: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes of an attention whose second product this is, up to the codes of q, k and v; empty for the first."""
    probabilities = next((node for node in _coded(product.args[0]) if node.target is ours.quantize.default), None)
    ancestors: set[fx.Node] = set()
    stack = [] if probabilities is None else [probabilities.args[0]]
    while stack:  # Back to the first product. The softmax and the mask are between; layers are not.
        node = stack.pop()
        if not isinstance(node, fx.Node) or node.op != "call_function" or node in ancestors or LAYER in node.meta:
            continue
        ancestors.add(node)
        if node.target not in (ours.matmul.default, ours.quantize.default):
            stack += node.all_input_nodes
    products = [node for node in ancestors if node.target is ours.matmul.default]
    if len(products) != 1:
        return ()
    (first,) = products
    order = {node: number for number, node in enumerate(product.graph.nodes)}
    on_path = {first}
    for node in sorted(ancestors, key=order.__getitem__):
        if any(source in on_path for source in node.all_input_nodes):
            on_path.add(node)
    found = {*on_path, product}
    for node in (first, product):
        for number in (0, 3):
            found |= _coded(node.args[number])
    return tuple(sorted(found, key=order.__getitem__))


def _coded(node: Any) -> set[fx.Node]:
    """The ops on codes back to ``fxquant.quantize``."""
    found: set[fx.Node] = set()
    while isinstance(node, fx.Node) and node.op == "call_function" and not node.meta["val"].dtype.is_floating_point:
        found.add(node)
        if node.target is ours.quantize.default:
            break
        node = node.args[0]
    return found


def _attention_name(product: fx.Node) -> str:
    node = product
    for _ in range(4):
        if ATTENTION in node.meta:
            return str(node.meta[ATTENTION])
        if len(node.users) != 1:
            break
        node = next(iter(node.users))
    return product.name
