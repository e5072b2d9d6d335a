"""Rewrites the graphs of a model so that only parameters of the model change, and collects the changed parameters.

Passes with the option ``dearest=in-place`` decide within one graph. A parameter may be read by several graphs, or have
several names. Layers for which this does not fit are left out, and the passes run again without them.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxquant.calibration.calibrate import Calibration
from fxquant.capture.graph import CapturedGraph
from fxquant.errors import PassError
from fxquant.ir.digest import graph_digest
from fxquant.ir.histories import history_of
from fxquant.ir.meta import LAYER
from fxquant.ir.places import place_of
from fxquant.ir.shared import attributes_of
from fxquant.ir.tensors import read_tensors, weights_and_buffers
from fxquant.pipeline.pipeline import Instrument, Pass, Pipeline
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import Balance, LayerPlan, Shift
from fxquant.planning.plan import Plan

_AFFINE = torch.ops.fxquant.channel_affine.default


@dataclass(frozen=True)
class Rewritten:
    """Graphs that are equal to the captured ones except for the values of parameters.

    Attributes:
        graphs: The graphs.
        plan: What was decided.
        changed: The new values of the parameters that changed, by name.
    """

    graphs: list[CapturedGraph]
    plan: Plan
    changed: dict[str, Tensor]


def rewrite_in_place(
    model: nn.Module, calibration: Calibration, passes: Sequence[Pass], instruments: Sequence[Instrument] = ()
) -> Rewritten:
    """Run passes on copies of all calibrated graphs, without the layers that would need more than changed parameters.

    Args:
        model: The float model.
        calibration: The finished calibration of the model.
        passes: Passes that keep what a graph computes.
        instruments: They watch the passes.

    Raises:
        PassError: If a pass changes a graph in another way than layers decide.
    """
    names = _Names(model)
    known = {name for captured in calibration.prepared for name in read_tensors(captured.module)}
    left_out: dict[str, str] = {}
    while True:
        plan = copy.deepcopy(calibration.plan)
        for name, reason in left_out.items():
            plan.layer(name).balance = Balance(cost="not", group=name, reason=reason)
            plan.layer(name).shift = Shift(cost="not", reason=reason)
        context = PassContext(plan, calibration.statistics)
        graphs: list[CapturedGraph] = []
        roots: dict[fx.Node, str] = {}
        for number, prepared in enumerate(calibration.prepared):
            captured = prepared.copy()
            context.inputs = calibration.inputs_of(number)
            context.forget_inputs()
            Pipeline(passes, instruments, prove=calibration.prepare.prove).run(captured.module, context)
            module = captured.module
            roots |= {n: history_of(module, n).root for n in module.graph.nodes if n.op == "get_attr"}
            context.shared.settle_names(module)
            graphs.append(captured)
        changed = _changed(calibration.prepared, graphs)
        found = _unfit_graphs(graphs, plan, known, roots) or _unfit_parameters(graphs, plan, names, changed)
        if not found:
            _refuse_other_graphs(calibration.prepared, graphs)
            return Rewritten(graphs, plan, changed)
        if not found.keys() - left_out.keys():
            raise PassError(f"a float model cannot hold the result: {next(iter(found.values()))}")
        left_out.update(found)


class _Names:
    """The names of a model's tensors, and which of them stand for one tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._places = {name: tensor.untyped_storage().data_ptr() for name, tensor in weights_and_buffers(model)}

    def others(self, name: str) -> list[str]:
        """Other names of the memory in which a tensor lies."""
        mine = self._places[name]
        return [other for other, place in self._places.items() if other != name and place == mine]


def _changed(before: Sequence[CapturedGraph], after: Sequence[CapturedGraph]) -> dict[str, Tensor]:
    """The model's tensors to which passes gave other values, by name."""
    changed: dict[str, Tensor] = {}
    for old, new in zip(before, after, strict=True):
        held = read_tensors(old.module)
        for name, tensor in read_tensors(new.module).items():
            if name in held and tensor.data_ptr() != held[name].data_ptr() and not torch.equal(tensor, held[name]):
                changed[name] = tensor.detach()
    return changed


def _unfit_graphs(
    graphs: Sequence[CapturedGraph], plan: Plan, known: Collection[str], roots: Mapping[fx.Node, str]
) -> dict[str, str]:
    """The layers because of which graphs hold ops or tensors that the model does not have, each with the reason.

    Args:
        graphs: The graphs. A tensor that other graphs need with other values has another name in each.
        plan: What was decided.
        known: Names of the tensors that the graphs read before.
        roots: For each node that reads a tensor, the tensor's name in the model.
    """
    found: dict[str, str] = {}
    for captured in graphs:
        for node in captured.module.graph.nodes:
            if node.target is _AFFINE:
                behind = [user.meta[LAYER] for user in node.users if LAYER in user.meta]
                reason = "a kind of call reads its input where nothing can absorb the factors"
                found |= _with_groups(behind or [node.meta.get(LAYER, "")], reason, plan)
            elif _is_new(node, known) and any(user.target is not _AFFINE for user in node.users):
                root = roots[node]
                reason = f"{root} would need other values in another kind of call, or for another reader"
                found |= _with_groups(_layers_at(root, graphs, plan, roots), reason, plan)
    return found


def _is_new(node: fx.Node, known: Collection[str]) -> bool:
    return node.op == "get_attr" and node.target not in known


def _unfit_parameters(
    graphs: Sequence[CapturedGraph], plan: Plan, names: _Names, changed: Mapping[str, Tensor]
) -> dict[str, str]:
    """The layers because of which a tensor changes that must not, each with the reason."""
    read = {name for captured in graphs for name in read_tensors(captured.module)}
    found: dict[str, str] = {}
    for name, tensor in changed.items():
        if name not in names.parameters:
            reason = f"{name} is not a parameter, and the model's code may compute it again"
            found |= _with_groups(_layers_at(name, graphs, plan), reason, plan)
            continue
        for other in names.others(name):
            equal = other in changed and torch.equal(changed[other], tensor)
            if other in read and not equal:
                reason = f"{name} is also {other}, which stays as it is"
                found |= _with_groups(_layers_at(name, graphs, plan), reason, plan)
    return found


def _layers_at(
    name: str, graphs: Sequence[CapturedGraph], plan: Plan, roots: Mapping[fx.Node, str] | None = None
) -> list[str]:
    """The layers whose factors or shifts were folded into a tensor.

    Raises:
        PassError: If there are none.
    """
    places: set[str] = {name}
    for captured in graphs:
        for node in captured.module.graph.nodes:
            for attribute in attributes_of(node):
                if attribute is not None and (roots or {}).get(attribute, attribute.target) == name:
                    places |= {place_of(node), node.name, str(node.meta.get(LAYER))}
    found = [layer for layer, own in plan.layers.items() if layer in places or places & _into(own)]
    if not found:
        raise PassError(
            f"a pass changed {name!r} in a way that a float model cannot hold, and the plan does not say for which "
            "layer; use a recipe that only balances and shifts channels, such as smoothquant-w8a8"
        )
    return found


def _into(layer: LayerPlan) -> set[str]:
    decided = [one for one in (layer.balance, layer.shift) if one is not None]
    return {place for one in decided for place in one.into}


def _with_groups(layers: Sequence[str], reason: str, plan: Plan) -> dict[str, str]:
    """These layers and those that share factors with them, with the reason."""
    groups = {own.balance.group for name in layers if (own := plan.layers.get(name)) and own.balance}
    together = [name for name, own in plan.layers.items() if own.balance is not None and own.balance.group in groups]
    return dict.fromkeys([*(name for name in layers if name in plan.layers), *together], reason)


def _refuse_other_graphs(before: Sequence[CapturedGraph], after: Sequence[CapturedGraph]) -> None:
    for old, new in zip(before, after, strict=True):
        if graph_digest(old.module.graph) != graph_digest(new.module.graph):
            raise PassError(
                "a pass changed more than parameters, so no float model of the same class computes the result; use a "
                "recipe that only balances and shifts channels, such as smoothquant-w8a8"
            )
