"""Builds a graph op by op, in the form that capture produces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.ir.layers import stored_weight
from fxquant.ir.meta import LAYER
from fxquant.ir.proofs import prove
from fxquant.ir.tensors import set_tensor

aten = torch.ops.aten
BATCH, TOKENS, CHANNELS = 2, 3, 8

_MODE = FakeTensorMode()  # One mode for all graphs, so that its cache holds the shapes of ops that ran before.


class Builder:
    """A graph that grows.

    Attributes:
        module: The graph module so far; call :meth:`finish` at the end.
        values: Floating-point values that ops may read, with two or more axes.
        parameters: Floating-point parameters and values computed only from parameters. Several ops may read one.
        layers: The linears made so far.
        mask: A boolean input ``[2, 24]`` with the keys that each sample sees. Sometimes a sample sees no key.
    """

    def __init__(self, seed: int) -> None:
        self.module = fx.GraphModule(nn.Module(), fx.Graph())
        self.graph = self.module.graph
        self.generator = torch.Generator().manual_seed(seed)
        self.values: list[fx.Node] = []
        self.parameters: list[fx.Node] = []
        self.layers: list[fx.Node] = []
        self.mask: fx.Node | None = None
        self._names = 0
        self._inputs: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def random(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        """Uniform random float64 values."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> fx.Node:
        """Add an input. An input called ``timestep`` receives timesteps."""
        node = self.graph.placeholder(name)
        with _MODE:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        self._inputs.append((name, shape, dtype))
        return node

    def parameter(self, *shape: int, low: float = -1.0, high: float = 1.0) -> fx.Node:
        """Add a random parameter."""
        node = self.tensor(self.random(*shape, low=low, high=high))
        self.parameters.append(node)
        return node

    def tensor(self, value: Tensor) -> fx.Node:
        """Add a tensor to the module."""
        target = f"p{self._names}"
        self._names += 1
        set_tensor(self.module, target, value)
        node = self.graph.get_attr(target)
        with _MODE:
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add one op. If its result is a floating-point tensor, it becomes a value or a parameter."""
        fakes = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
        with _MODE, torch.no_grad():
            value = target(*fakes[0], **fakes[1])
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        prove(node)  # Saves verification from running the op again.
        if isinstance(value, Tensor) and value.is_floating_point():
            held = all(source in self.parameters for source in node.all_input_nodes)
            if held or value.dim() >= 2:
                (self.parameters if held else self.values).append(node)
        return node

    def linear(self, x: fx.Node, out: int, bias: bool = True) -> fx.Node:
        """Add a linear layer of a block with its own parameters."""
        return self.apply(x, self.parameter(out, shape(x)[-1]), self.parameter(out) if bias else None)

    def apply(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None, layer: str | None = None) -> fx.Node:
        """Add a linear layer of a block with these parameters, or a further call of a layer."""
        node = self.call(aten.linear.default, x, weight, *([] if bias is None else [bias]))
        if stored_weight(node) is not None:  # Capture names layers like this.
            node.meta[LAYER] = layer or f"blocks.0.l{len(self.layers)}"
            self.layers.append(node)
        return node

    def finish(self, *also: fx.Node) -> fx.GraphModule:
        """Return the values that no op reads, and the given ones; finish the graph."""
        loose = [node for node in self.values if not node.users and node.op == "call_function"]
        returned = tuple(dict.fromkeys([*loose, *also]))
        output = self.graph.output(returned)
        output.meta["val"] = tuple(node.meta["val"] for node in returned)
        self.graph.eliminate_dead_code()
        self.module.recompile()
        return self.module

    def inputs(self, *timesteps: float) -> list[Tensor]:
        """Random inputs. There is one timestep for all samples or one per sample, cut to the shape of the input.

        Boolean entries are random. One random sample gets the same random value everywhere.
        """
        found = []
        for name, size, dtype in self._inputs:
            if name == "timestep":
                steps = torch.tensor(timesteps * BATCH if len(timesteps) == 1 else timesteps, dtype=torch.float64)
                found.append((steps[: size[0]] if size else steps[0]).to(dtype))
            elif dtype is torch.bool:
                seen = self.random(*size) > 0
                seen[int(self.random(1, low=0, high=2))] = self.random(1) > 0
                found.append(seen)
            else:
                found.append(self.random(*size, low=-2, high=3))
        return found


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a value."""
    return tuple(node.meta["val"].shape)
