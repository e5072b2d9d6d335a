"""Run a graph node by node and measure the time of each node."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxquant.inspect.profiling.kinds import kind_of
from fxquant.inspect.profiling.roofline import timed
from fxquant.ir.meta import LAYER
from fxquant.ir.names import qualified_name
from fxquant.planning.plan import Plan


@dataclass(frozen=True)
class Times:
    """Times of the same work in several rounds, in milliseconds."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile of the rounds."""
        if len(self.rounds) < 2:
            return self.rounds[0], self.rounds[0]
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return low, high

    def __add__(self, other: Times) -> Times:
        return Times(tuple(own + its for own, its in zip(self.rounds, other.rounds, strict=True)))

    def to_json(self) -> dict[str, Any]:
        """Median and quartiles."""
        return {"median_ms": self.median, "quartiles_ms": list(self.quartiles)}


def total(times: Sequence[Times]) -> Times:
    """Sums per round; ``times`` must not be empty."""
    first, *rest = times
    return sum(rest, start=first)


@dataclass(frozen=True)
class Work:
    """The least work that a node must do: operations, two per multiply-add, and bytes read and written."""

    operations: int = 0
    traffic: int = 0


class Watch(fx.Interpreter):
    """Runs a graph op by op, and measures the time of each op.

    Attributes:
        seconds: Seconds of each called node in the last run, in the order of the graph.
        work: Work of each called node, by name.
    """

    def __init__(self, module: fx.GraphModule, plan: Plan, device: torch.device) -> None:
        super().__init__(module)
        self.called = [node for node in module.graph.nodes if node.op == "call_function"]
        self.plan = plan
        self.device = device
        self.seconds: list[float] = []
        self.work: dict[str, Work] = {}
        self._node: fx.Node | None = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph once."""
        self.seconds = []
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Remember the current node, and run it."""
        self._node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an op, and measure the time of this call alone."""
        result, seconds = timed(lambda: target(*args, **kwargs), self.device)
        self.seconds.append(seconds)
        assert self._node is not None
        if self._node.name not in self.work:
            self.work[self._node.name] = self._work(self._node, args, result)
        return result

    def _work(self, node: fx.Node, args: tuple[Any, ...], result: Any) -> Work:
        kind = kind_of(node)
        layer = self.plan.layers.get(str(node.meta.get(LAYER)))
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        numel = sum(leaf.numel() for leaf in tensors)
        traffic = sum(leaf.numel() * leaf.element_size() for leaf in (*_tensors(args), *tensors))
        if kind in ("linear", "convolution") and layer is not None:
            return Work(2 * numel * layer.shape[1], traffic)
        if kind == "attention":
            return Work(_products(qualified_name(node.target), args, numel), traffic)
        return Work()


def _products(name: str, args: tuple[Any, ...], numel: int) -> int:
    """Operations of products of two activations; 0 if their form is not known."""
    if "scaled_dot_product_attention" in name:
        q, k = args[:2]
        return 2 * k.shape[-2] * (q.numel() + numel)
    factors = list(_tensors(args))
    return 2 * numel * factors[0].shape[-1] if "softmax" not in name and len(factors) > 1 else 0


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
