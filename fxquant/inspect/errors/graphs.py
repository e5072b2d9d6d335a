"""The graphs that errors are measured with: the quantized graph as passes left it, and the float weights of its layers.

A backend lowers graphs to kernels, in which layers are fused. So the quantized graph is made again from the plan and
bound to the model's own codes, and the float model gives the weights that the codes were rounded from: with the factors
of balancing folded in.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fxquant.capture.calls import CallSpec
from fxquant.capture.fidelity import Original, example
from fxquant.capture.trace import Architecture
from fxquant.errors import CalibrationError, CheckpointError, ConfigurationError
from fxquant.ir.arguments import args
from fxquant.ir.layers import LAYER_OPS, stored_weight
from fxquant.ir.meta import LAYER
from fxquant.ir.stages import Stage
from fxquant.ir.tensors import bind, get_tensor, weights_of
from fxquant.numerics.formats import Scales
from fxquant.numerics.sqnr import sqnr_db
from fxquant.numerics.weights import dequantize_weight
from fxquant.pipeline.backend import resolve_backend
from fxquant.pipeline.pipeline import Pass, Pipeline
from fxquant.pipeline.recipes import recipe_of
from fxquant.planning.branches import Branch, branch_rank
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from fxquant.planning.rotations import Rotation
from fxquant.runtime.float_model import device_of
from fxquant.runtime.model import GraphModel
from fxquant.runtime.replay import bind_all, model_from_plan, refuse_unknown_layers

_FAR = 3.0  # dB between the SQNR of a weight and what the plan says, in more than half of the layers.

_ROUNDED = 30.0  # dB; what passes fold into a weight rounds it in the model's dtype, at worst bfloat16.


@dataclass(frozen=True, eq=False)
class Pair:
    """One kind of call.

    Attributes:
        call: The inputs that the graph serves; None in a pass, which does not know them.
        quantized: The quantized graph, not lowered.
        weights: The float weight of each layer, with what passes folded into it, by name.
    """

    call: CallSpec | None
    quantized: fx.GraphModule
    weights: Mapping[str, Tensor]


def make_pairs(quantized: GraphModel, model: nn.Module, kinds: Iterable[CallSpec]) -> list[Pair]:
    """Make the graphs for some kinds of call.

    Args:
        quantized: The quantized model, on any backend.
        model: The float model that it was made from.
        kinds: The kinds of call, which the plan records.

    Raises:
        ConfigurationError: If ``model`` is another model, or a kind of call is not one that was calibrated.
    """
    plan = copy.deepcopy(quantized.plan)
    assert plan is not None
    wanted = list(kinds)
    other = next((kind for kind in wanted if kind not in plan.calls), None)
    if other is not None:
        raise ConfigurationError(
            f"the model was not calibrated with calls of this kind: {other}; keep statistics of the calibration that "
            "quantized it"
        )
    numbers = [plan.calls.index(kind) for kind in wanted]
    twin = _twin(quantized, plan)
    weights = _float_weights(model, copy.deepcopy(plan), [plan.calls[number] for number in numbers])
    pairs = []
    for number, found in zip(numbers, weights, strict=True):
        captured = twin.captured[number]
        quantizable = {name: weight for name, weight in found.items() if plan.layer(name).weight_bits is not None}
        pairs.append(Pair(captured.call, captured.module, quantizable))
    _refuse_other_model(pairs, plan)
    for pair, found in zip(pairs, weights, strict=True):
        _refuse_other_layers(pair.quantized, found, plan)
    return pairs


def _twin(quantized: GraphModel, plan: Plan) -> GraphModel:
    """The graphs of a quantized model made again from its plan, not lowered, with its tensors."""
    fake = resolve_backend("fake-quant")
    twin = model_from_plan(quantized.architecture, plan, fake, quantized.dtype, quantized.device)
    bind_all(twin, {name: tensor.detach() for name, tensor in quantized.stored_tensors().items()})
    for captured in twin.captured:
        captured.module.requires_grad_(False)
    return twin


def other_pairs(quantized: GraphModel, pairs: Sequence[Pair], first: Plan, model: nn.Module) -> list[Pair]:
    """The graphs of a model whose layers have other precisions, and the same factors folded into their weights.

    Layers that have another branch of low rank than in the first model, or none, have another float weight.

    Args:
        quantized: The other model; its plan is the first one's, but for precisions, ranges, bins and branches.
        pairs: What :func:`make_pairs` made for the first one.
        first: The plan of the first one.
        model: The float model that both were made from.

    Raises:
        ConfigurationError: If a layer is rotated in one of them only, so that it reads another value.
    """
    plan = copy.deepcopy(quantized.plan)
    assert plan is not None
    _refuse_other_rotations(plan, first)
    twin, calls = _twin(quantized, plan), [pair.call for pair in pairs if pair.call is not None]
    own = _weights_beside_branches(model, plan, first, calls)
    return [
        Pair(call, twin.captured[plan.calls.index(call)].module, {**pair.weights, **weights})
        for call, pair, weights in zip(calls, pairs, own, strict=True)
    ]


def _refuse_other_rotations(plan: Plan, first: Plan) -> None:
    """Compare the rotations of two plans, layer by layer."""
    before = first.decisions_of(Rotation)
    for name, rotation in plan.decisions_of(Rotation).items():
        if rotation.block > 1 and name not in before and plan.layer(name).weight_bits is not None:
            raise ConfigurationError(
                f"layer {name!r} is rotated as {plan.layer(name).precision} and not as {first.layer(name).precision}, "
                "from which the recipe begins, so their errors cannot be compared; begin from a recipe that quantizes "
                "inputs, such as w4a8, or leave out the candidates that do"
            )


def _weights_beside_branches(
    model: nn.Module, plan: Plan, first: Plan, calls: Sequence[CallSpec]
) -> list[dict[str, Tensor]]:
    """For each call, the float weights of the layers whose branches of low rank differ between two plans."""
    changed = {name for name in plan.layers if branch_rank(plan, name) != branch_rank(first, name)}
    if not changed:
        return [{} for _ in calls]
    wanted = copy.deepcopy(plan)
    for name, branch in wanted.decisions_of(Branch).items():
        if name not in changed:
            branch.rank = 0  # Its factors are not needed, and take long.
    found = _float_weights(model, wanted, calls)
    return [{name: weight for name, weight in weights.items() if name in changed} for weights in found]


def _float_weights(model: nn.Module, plan: Plan, calls: Iterable[CallSpec]) -> list[dict[str, Tensor]]:
    """For each call: the weights of all layers, just before those with few bits are quantized, by layer."""
    recipe = recipe_of(plan)
    passes = [*recipe.prepare, *itertools.takewhile(_keeps_float, recipe.convert)]
    # Passes that learn from calls have decided; they change the plan and not the graph.
    passes = [step for step in passes if not step.wants_samples()]
    tensors, architecture = weights_of(model), Architecture.of(model, plan.timestep)
    device, original, context, found = device_of(model), Original(model, plan.timestep), PassContext(plan), []
    for call in calls:
        try:
            original.warm(example(call, device), architecture)
            captured = architecture.capture_spec(call, device)
            bind(captured.module, tensors)
            refuse_unknown_layers(captured, plan)
        except (CalibrationError, CheckpointError) as error:
            raise ConfigurationError(
                f"the float model is another one than the one that was quantized: {error}"
            ) from error
        Pipeline(passes).run(captured.module, context)
        context.shared.settle_names(captured.module)
        own = {}
        for node in captured.module.graph.nodes:
            if LAYER in node.meta and node.target in LAYER_OPS:
                weight = stored_weight(node)
                if weight is not None:
                    own[str(node.meta[LAYER])] = get_tensor(captured.module, str(weight.target)).detach()
        found.append(own)
    return found


def _keeps_float(step: Pass) -> bool:
    return step.establishes < Stage.QUANTIZED


def _refuse_other_model(pairs: Iterable[Pair], plan: Plan) -> None:
    """Compare weights with their codes: those of another model, such as a fine-tuned one, are farther from the codes.

    Raises:
        ConfigurationError: If most layers are farther from their codes than the plan says.
    """
    far = []
    for pair in pairs:
        for node in pair.quantized.graph.nodes:
            codes = codes_of(node)
            layer = plan.layers.get(node.meta.get(LAYER, ""))
            if codes is None or layer is None or layer.weight_sqnr_db is None or node.meta[LAYER] not in pair.weights:
                continue
            exact = pair.weights[node.meta[LAYER]].flatten(1).float()
            if get_tensor(pair.quantized, str(codes.codes.target)).shape[0] == exact.shape[0]:
                far.append(sqnr_db(exact, rounded_weight(node, pair, exact)) < layer.weight_sqnr_db - _FAR)
    if far and sum(far) > len(far) / 2:
        raise ConfigurationError(
            "the weights of the float model are not those that were quantized, in "
            f"{sum(far)} of {len(far)} layers; pass the model that was compiled"
        )


def _refuse_other_layers(module: fx.GraphModule, weights: Mapping[str, Tensor], plan: Plan) -> None:
    """Compare the weights of layers that stayed float with those of the float model, as passes left both.

    Raises:
        ConfigurationError: If one differs by more than rounding.
    """
    for node in module.graph.nodes:
        name = node.meta.get(LAYER, "")
        if node.target not in LAYER_OPS or name not in weights or plan.layer(name).weight_bits is not None:
            continue
        weight = stored_weight(node)
        held = None if weight is None else get_tensor(module, str(weight.target))
        if held is None or held.shape != weights[name].shape:
            continue
        if sqnr_db(weights[name].to(held.device), held) < _ROUNDED:
            raise ConfigurationError(
                f"the weight of {name} in the float model is not that in the quantized one, where it stayed float; "
                "pass the model that was compiled"
            )


_WEIGHTS: dict[Any, tuple[str, ...]] = {
    torch.ops.fxquant.linear.default: ("wq", "w_scale", "w_zero_point", "w_global"),
    torch.ops.fxquant.conv2d.default: ("wq", "w_scale", "w_zero_point"),
    torch.ops.fxquant.dequantize_weight.default: ("wq", "scale", "zero_point", "global_scale"),
}
"""The arguments that are the weight of an op: packed codes, scales, zero points, the scale of the scales."""


class WeightNodes(NamedTuple):
    """Nodes of the stored weight that a layer reads; None for parts that its format does not have."""

    codes: fx.Node
    scale: fx.Node
    zero_point: fx.Node | None
    global_scale: fx.Node | None = None


def codes_of(node: fx.Node) -> WeightNodes | None:
    """The stored weight that a layer reads; None for nodes that read none."""
    if node.target not in _WEIGHTS:
        return None
    found = [getattr(args(node), name) for name in _WEIGHTS[node.target]]
    if not all(part is None or (isinstance(part, fx.Node) and part.op == "get_attr") for part in found):
        return None
    return WeightNodes(*found)


def rounded_weight(node: fx.Node, pair: Pair, exact: Tensor) -> Tensor:
    """The dequantized codes that a layer reads, ``[out, in]``, in the dtype of its float weight ``exact``."""
    nodes, given = codes_of(node), args(node)
    assert nodes is not None

    weight_only = node.target is torch.ops.fxquant.dequantize_weight.default
    format = given.format if weight_only else given.w_format
    group = 0 if node.target is torch.ops.fxquant.conv2d.default else given.group_size

    def read(part: fx.Node | None) -> Tensor | None:
        return None if part is None else get_tensor(pair.quantized, str(part.target))

    packed, scale = read(nodes.codes), read(nodes.scale)
    assert packed is not None and scale is not None
    scales = Scales(scale, read(nodes.zero_point), read(nodes.global_scale))
    return dequantize_weight(packed, scales, format, group, exact.shape[1], exact.dtype)
