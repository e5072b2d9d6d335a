"""Audits balancing of a tiny model: what is balanced, and whether the model still computes the same."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from fxquant.capture.graph import CapturedGraph
from fxquant.capture.trace import Architecture
from fxquant.channels.walk import solve
from fxquant.channels.wants import Cost
from fxquant.ir.meta import LAYER
from fxquant.ir.ops import recording
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.tensors import bind, copy_graph, get_tensor, weights_of
from fxquant.passes._seeds import seeds_to_transform
from fxquant.pipeline.pipeline import Pipeline
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics
from tests.zoo.models import Entry

STEPS = (900.0, 500.0, 100.0)


@dataclass
class Audit:
    """A model after balancing and absorbing, in float64.

    Attributes:
        found: The graph.
        plan: The plan: balanced layers with their cost, and why others are not balanced.
        error: Largest difference between the outputs and those of the captured graph, over their largest element.
        tokens: Layers that could be balanced only by multiplying all tokens at run time.
    """

    found: CapturedGraph
    plan: Plan
    error: float
    tokens: frozenset[str]


def audit(entry: Entry, passes: str = "balance-channels,absorb-affines") -> Audit:
    """Capture a model in float64, calibrate it, balance and absorb, and compare."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = entry.model(torch.float64)
        architecture = Architecture.of(model, entry.timestep)
        calls = [entry.call(3, seed=seed, step=step, dtype=torch.float64) for seed, step in enumerate(STEPS)]
        calls.append(entry.call(3, seed=9, dtype=torch.float64))
        found = architecture.capture(architecture.canonical((), calls[0]))
    bind(found.module, weights_of(model))
    without_float32(found.module)
    inputs = [found.inputs(architecture.canonical((), call).leaves) for call in calls]
    expected = [outputs(found, tensors) for tensors in inputs]
    plan = Plan("", "", entry.timestep)
    Pipeline.parse("remove-no-ops,assign-precision").run(found.module, plan)
    observed, statistics = copy_graph(found.module), Statistics()
    Pipeline.parse("insert-observers").run(observed, plan)
    with recording(statistics.record), torch.no_grad():
        for tensors in inputs:
            observed(*tensors)
    context = PassContext(plan, statistics)
    tokens = balanced_on_tokens(found.module.graph, context)
    Pipeline.parse(passes).run(found.module, context)
    actual = [outputs(found, tensors) for tensors in inputs]
    error = max(
        float((a - e).abs().max() / e.abs().max())
        for left, right in zip(actual, expected, strict=True)
        for a, e in zip(left, right, strict=True)
    )
    return Audit(found, plan, error, tokens)


def balanced_on_tokens(graph: fx.Graph, context: PassContext) -> frozenset[str]:
    """Layers of blocks that can be scaled in all channels with ``dearest=tokens``, at that cost."""
    seeds = seeds_to_transform(graph, context, ["block"])
    grants = solve(graph, seeds, Cost.TOKENS).grants.values()
    dear = (grant for grant in grants if grant.cost is Cost.TOKENS and grant.granted.all())
    return frozenset(reader.meta[LAYER] for grant in dear for reader in grant.seed.readers if LAYER in reader.meta)


def without_float32(module: fx.GraphModule) -> None:
    """Convert parts that a model always computes in float32 to float64, so that float32 rounding hides no error."""

    def wider(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype is torch.float32:
            return value.double()
        return torch.float64 if value is torch.float32 else value

    rewriter = Rewriter(module, "test")
    for node in module.graph.nodes:
        if node.op == "get_attr" and get_tensor(module, str(node.target)).dtype is torch.float32:
            rewriter.put(node, get_tensor(module, str(node.target)).double())
        if node.op == "call_function":
            node.args, node.kwargs = pytree.tree_map(wider, (node.args, node.kwargs))
        if isinstance(node.meta.get("val"), (Tensor, list, tuple)) and node.op == "call_function":
            # Inference would give sizes that depend on values new symbols, so those are only converted.
            value = node.meta["val"]
            node.meta["val"] = pytree.tree_map(wider, value) if free_unbacked_symbols(value) else rewriter.infer(node)
    module.recompile()


def outputs(found: CapturedGraph, tensors: list[Tensor]) -> list[Tensor]:
    """The floating-point outputs of a graph."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(found.module(*tensors))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
