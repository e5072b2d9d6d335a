"""Insert the observers of calibration into the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.ir.arguments import args, source_of
from fxquant.ir.attention import SIDES, Attention, find_attentions
from fxquant.ir.meta import ITEM, LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.ir.time_tables import timestep_input
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan

_ALWAYS = "no_timestep"
_OBSERVE = torch.ops.fxquant.observe.default
_TRANSPOSE = torch.ops.aten.transpose.int
_UNFLATTEN = torch.ops.aten.unflatten.int


@register_pass
@dataclass(frozen=True)
class InsertObservers(Pass):
    """Put ``fxquant::observe`` on every value that a layer with quantized activations reads, and on q, k and v.

    Before::

        q = linear(x, wq); k = linear(x, wk)

    After::

        x_observed = observe(x, timestep, "to_q", -1); q = linear(x_observed, wq); k = linear(x_observed, wk)

    Layers that read the same value share an observer, whose key is the first of these layers. The channel axis is the
    last axis, or the second axis for convolutions. q, k and v of attentions that are to be quantized are observed under
    ``<attention>:q`` and so on. v is observed with the channels of all heads together, because balancing treats these
    channels differently. Observers return their input, so the output is equal bit for bit.

    Attributes:
        weight_only: Names of linears with float activations that are observed too, joined by ``;``. Balancing, and
            rounding weights by their inputs, need their statistics.
    """

    name: ClassVar[str] = "insert-observers"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.OBSERVED
    establishes: ClassVar[Stage] = Stage.OBSERVED
    keeps_inputs: ClassVar[bool] = True

    weight_only: str = ""

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        plan = context.plan
        weight_only = set(self.weight_only.split(";"))
        observers: dict[tuple[fx.Node, int], fx.Node] = {}
        keys: dict[fx.Node, str] = {}
        for node in list(graph.nodes):
            if LAYER not in node.meta:
                continue
            layer = plan.layer(node.meta[LAYER])
            if layer.activation_bits is None and node.meta[LAYER] not in weight_only:
                continue
            value, axis = source_of(node), 1 if layer.kind == "conv" else -1
            if _OBSERVE in (value.target, value.target is _TRANSPOSE and source_of(value).target):
                continue  # Observed already, directly or transposed with the samples first.
            observer = observers.get((value, axis))
            if observer is None:
                with rewriter.before(node):
                    timestep = _timestep(rewriter, value, plan.timestep)
                    observer = _observer(rewriter, value, timestep, node.meta[LAYER], axis)
                observers[value, axis] = observer
                keys[observer] = node.meta[LAYER]
            layer.observed = keys[observer]
            rewriter.redirect(node, value, observer)
        for found in find_attentions(graph):
            entry = plan.attentions.get(found.name)
            if found.operands and entry is not None and entry.bits is not None:
                for side in SIDES:
                    self._observe_operand(found, side, plan, rewriter)

    def _observe_operand(self, found: Attention, side: str, plan: Plan, rewriter: Rewriter) -> None:
        operand = found.operands[side]
        value, observed = operand.value, plan.attention(found.name).observed
        source = value  # An observer over all heads is two views away.
        for _ in range(2):
            source = source_of(source) if source.target in (_TRANSPOSE, _UNFLATTEN) and side == "v" else source
        if source.target is torch.ops.fxquant.observe.default:
            observed[side] = str(args(source).key)
            return
        shape = value.meta["val"].shape
        together = side == "v" and len(shape) == 4 and isinstance(shape[1], int) and isinstance(shape[3], int)
        observed[side] = f"{found.name}:{side}"

        def call(op: Any, *arguments: Any, name: str) -> fx.Node:
            return rewriter.call(op, arguments, sources=[value], name=f"{value.name}_{name}")

        with rewriter.before(operand.reader):
            timestep = _timestep(rewriter, value, plan.timestep)
            if not together:
                new = call(_OBSERVE, value, timestep, observed[side], operand.axis, name="observed")
            else:
                heads = call(_TRANSPOSE, value, 1, 2, name="by_token")
                flat = call(torch.ops.aten.flatten.using_ints, heads, 2, name="together")
                seen = call(_OBSERVE, flat, timestep, observed[side], -1, name="observed")
                apart = call(_UNFLATTEN, seen, 2, [shape[1], shape[3]], name="apart")
                new = call(_TRANSPOSE, apart, 1, 2, name="by_head")
        rewriter.redirect(operand.reader, value, new)


def _timestep(rewriter: Rewriter, value: fx.Node, name: str | None) -> fx.Node:
    """The timesteps of the samples; one constant for all if the model has no timestep."""
    if name is not None:
        return timestep_input(rewriter.graph, name)
    if _ALWAYS not in rewriter.memo:
        device = value.meta["val"].device
        rewriter.memo[_ALWAYS] = rewriter.constant(_ALWAYS, torch.zeros(1, device=device), [value])
    always: fx.Node = rewriter.memo[_ALWAYS]
    return always


def _observer(rewriter: Rewriter, value: fx.Node, timestep: fx.Node, key: str, axis: int) -> fx.Node:
    """The observed value. If its tokens come first, the observer gets it transposed, with the samples first."""
    batch = _batch_axis(value, timestep)
    timestep = _time_of(rewriter, value, timestep)

    def swapped(of: fx.Node) -> fx.Node:
        return rewriter.call(
            torch.ops.aten.transpose.int, (of, 0, batch), sources=[value], name=f"{of.name}_swapped", layer=True
        )

    seen = swapped(value) if batch else value
    observer = rewriter.call(
        torch.ops.fxquant.observe.default,
        (seen, timestep, key, axis),
        sources=[value],
        name=f"{value.name}_observed",
        layer=True,
    )
    return swapped(observer) if batch else observer


def _time_of(rewriter: Rewriter, value: fx.Node, timestep: fx.Node) -> fx.Node:
    """The timesteps; as one sample's if the value may concatenate tokens of samples of several lengths."""
    steps, leading = timestep.meta["val"].shape, value.meta["val"].shape[0]
    lists = any(ITEM in node.meta for node in rewriter.graph.nodes if node.op == "placeholder")
    if not lists or len(steps) != 1 or not isinstance(steps[0], int) or leading in (1, steps[0]):
        return timestep
    return rewriter.call(torch.ops.aten.unsqueeze.default, (timestep, 0), sources=[timestep], name="timesteps")


def _batch_axis(value: fx.Node, timestep: fx.Node) -> int:
    """The sample axis of a value: the leading axis, unless its size does not fit the number of timesteps."""
    steps, shape = timestep.meta["val"].shape, value.meta["val"].shape
    if len(steps) != 1 or str(steps[0]) == "1":
        return 0
    size, leading = steps[0], shape[0]
    if isinstance(size, int) and isinstance(leading, int):
        leads = leading % size == 0
    else:
        leads = not isinstance(size, int) and not isinstance(leading, int)
    inner = range(1, len(shape) - 1)
    alike = [axis for axis in inner if str(shape[axis]) == str(size)]
    open_axes = [axis for axis in inner if not isinstance(shape[axis], int)]  # A batch not tied to the timesteps.
    return 0 if leads else next(iter([*alike, *open_axes]), 0)
