"""Layers in other precisions, in one float run: what each would add to the error of the model's output.

Graphs of one model that differ in the precision of layers compute the same values in a float run. So one run and its
gradients are enough for all precisions. Only the local errors are computed once per precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fxquant.inspect.errors.graphs import Pair
from fxquant.inspect.errors.sweep import Sweep
from fxquant.inspect.errors.units import CodedLayer, StoredLayer, Unit, units_of
from fxquant.ir.tensors import get_tensor
from fxquant.reconstruction.simulate import Lookup


@dataclass(eq=False)
class Alternative:
    """The layers of a graph, whose errors are computed from what the same layers of another graph read.

    Args:
        pair: The graph, and the float weights of its layers.
    """

    pair: Pair
    layers: dict[str, CodedLayer | StoredLayer] = field(init=False)

    def __post_init__(self) -> None:
        units = units_of(self.pair).values()
        self.layers = {unit.name: unit for unit in units if isinstance(unit, (CodedLayer, StoredLayer))}
        self._inputs = [node for node in self.pair.quantized.graph.nodes if node.op == "placeholder"]

    def error(self, name: str, x: Tensor, inputs: Sequence[Tensor], exact: Tensor | None = None) -> Tensor:
        """The error of a layer's output if it alone is quantized, of the output's shape.

        Args:
            name: The layer.
            x: What it reads in the float model.
            inputs: The inputs of the model.
            exact: What :meth:`CodedLayer.exact` gives for it, if it was computed before.
        """
        unit = self.layers[name]
        first = unit.output.args[0]
        assert isinstance(first, fx.Node)
        source = first.args[0] if first.target is torch.ops.fxquant.quantize.default else first
        assert isinstance(source, fx.Node)
        known: dict[fx.Node, Any] = {**dict(zip(self._inputs, inputs, strict=True)), source: x}

        def value(node: fx.Node) -> Any:
            if node not in known:
                known[node] = self._compute(node, value)
            return known[node]

        arguments = map_arg(unit.output.args, value)
        if exact is not None and isinstance(unit, CodedLayer):
            return unit.coded(arguments) - exact
        return unit.error(arguments, value).both

    def exact(self, name: str, args: tuple[Any, ...]) -> Tensor | None:
        """The float product of a layer with quantized input, without a bias; None for other layers."""
        unit = self.layers[name]
        return unit.exact(args) if isinstance(unit, CodedLayer) else None

    def _compute(self, node: fx.Node, value: Lookup) -> Any:
        """The value of a node between the layer's input and its output: the grid of its input, its bias."""
        if node.op == "get_attr":
            return get_tensor(self.pair.quantized, str(node.target))
        if node.target is torch.ops.fxquant.quantize.default:
            return value(node.args[0])  # type: ignore[arg-type]
        if node.target is torch.ops.fxquant.dequantize_weight.default:
            return node.meta["val"]  # A layer asks for the dtype and shape of its rounded weight, not for its values.
        function: Any = node.target
        return function(*map_arg(node.args, value), **map_arg(dict(node.kwargs), value))


@dataclass(eq=False)
class Candidates:
    """Watches a sweep: for each unit and each alternative, products of gradients and errors.

    Attributes:
        sweep: The sweep of the graph that all alternatives are compared in.
        alternatives: Graphs with other precisions, by name of the precision.
        inputs: The inputs of the call.
        products: By alternative and layer, one vector float64 ``[samples]`` per gradient. Their squares estimate the
            energy of the error of the model's output.
        local: By alternative and layer, the energy of the error of the layer's own output.
        macs: By layer, multiplications and additions of one sample.
    """

    sweep: Sweep
    alternatives: Mapping[str, Alternative]
    inputs: Sequence[Tensor]
    products: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    local: dict[str, dict[str, float]] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._errors: dict[Unit, dict[str, Tensor]] = {}
        for name in self.alternatives:
            self.products[name], self.local[name] = {}, {}

    def saw(self, unit: Unit, args: tuple[Any, ...], y: Tensor, value: Lookup) -> None:
        """Compute the error of the unit in every alternative that has it."""
        having = [name for name, other in self.alternatives.items() if unit.name in other.layers]
        if not having:
            return
        self._errors[unit] = found = {}
        exact = dict[int, Tensor | None]()  # The same for all that share the float weight.
        for name in having:
            other = self.alternatives[name]
            weight = id(other.pair.weights[unit.name])
            if weight not in exact:
                exact[weight] = other.exact(unit.name, args)
            found[name] = other.error(unit.name, args[0], self.inputs, exact[weight])
            self.local[name][unit.name] = float(found[name].float().square().sum(dtype=torch.float64))
            self.products[name][unit.name] = []
        columns = self.alternatives[having[0]].pair.weights[unit.name][0].numel()
        self.macs[unit.name] = y.numel() // max(self.sweep.samples, 1) * columns

    def pulled(self, unit: Unit, gradient: Tensor | None) -> None:
        """Keep the products with one gradient."""
        for name, error in self._errors.get(unit, {}).items():
            self.products[name][unit.name].append(self.sweep.products(gradient, error))

    def finished(self) -> None:
        """Free the errors."""
        self._errors.clear()

    def alone(self, alternative: str, layer: str) -> float:
        """Estimated energy of the output's error if this layer alone is quantized."""
        found = self.products[alternative][layer]
        return float(sum(one.square().sum() for one in found)) / max(len(found), 1)

    def all_but(self, alternative: str) -> dict[str, float]:
        """For each layer, the estimated energy of the output's error if all layers but this one are quantized."""
        layers = self.products[alternative]
        sums = [sum(each) for each in zip(*layers.values(), strict=True)]
        return {
            name: float(sum((whole - own).square().sum() for whole, own in zip(sums, found, strict=True)))
            / max(len(found), 1)
            for name, found in layers.items()
        }

    def measure(self, alternative: str, layer: str) -> float:
        """Energy of the output's error if this layer alone is quantized, by running the rest of the model."""
        other = self.alternatives[alternative]
        return self.sweep.measure(layer, lambda args, value: other.error(layer, args[0], self.inputs))
