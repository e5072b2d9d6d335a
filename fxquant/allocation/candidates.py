"""The same model in several precisions, which share everything that was decided before the weights are rounded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import fx

from fxquant.errors import ConfigurationError
from fxquant.inspect.errors.graphs import Pair, codes_of
from fxquant.ir.meta import LAYER
from fxquant.ir.tensors import get_tensor
from fxquant.pipeline.recipes import Recipe
from fxquant.planning.plan import Plan
from fxquant.planning.precision import Precision
from fxquant.planning.roundings import with_precision


def precision_of_recipe(recipe: Recipe) -> Precision:
    """The precision that a recipe assigns to the layers that it quantizes.

    Raises:
        ConfigurationError: If it assigns none.
    """
    for step in recipe.prepare:
        if step.name == "assign-precision":
            return Precision.parse(step.precision)  # type: ignore[attr-defined]
    raise ConfigurationError("the recipe has no pass assign-precision, so there is no precision to vary")


def varied_layers(plan: Plan, precision: Precision) -> list[str]:
    """The linears that have the recipe's precision; those with another one, by role or override, keep it."""
    return [name for name, layer in plan.layers.items() if layer.kind == "linear" and layer.precision == precision]


def with_precisions(plan: Plan, chosen: Mapping[str, Precision]) -> Plan:
    """A copy of a plan in which some layers have other precisions; their ranges are decided again.

    What was folded into weights and the bins of timesteps stay as they are. What ``bin-bits`` and ``choose-variants``
    decided about such a layer was decided for its earlier precision, for all layers that read the same value together;
    they decide it again.

    Args:
        plan: A plan of a compiled model.
        chosen: Precisions by layer.
    """
    made = copy.deepcopy(plan)
    changed = {name: precision for name, precision in chosen.items() if made.layer(name).precision != precision}
    for name in _readers(made, changed):
        _forget_by_bin(made, name)
    for name, precision in changed.items():
        layer = made.layers[name] = with_precision(made.layer(name), precision)
        layer.activation = layer.activation_sqnr_db = layer.spread = None
        layer.weight_sqnr_db = None
        layer.reason = None
        if precision.weight_bits is None:
            layer.reason = "the search keeps it in float"
        elif precision.activation_bits is None:
            layer.reason = f"the search chose {precision}, which keeps its activations in float"
    made.output_sqnr_db, made.attribution, made.passes = {}, None, []
    return made


def _readers(plan: Plan, names: Iterable[str]) -> list[str]:
    """These layers, and those that read the same values."""
    values = {plan.layer(name).observed or name for name in names}
    return [name for name, layer in plan.layers.items() if (layer.observed or name) in values]


def _forget_by_bin(plan: Plan, name: str) -> None:
    """Drop what passes decided about a layer's input for its precision: bits of bins, and how its range is found."""
    layer, forget = plan.layer(name), plan.pass_decisions.forget
    by_bits, by_variant = forget("bin-bits", name), forget("choose-variants", name)
    if not (by_bits or by_variant):
        return
    layer.activation = layer.activation_sqnr_db = layer.spread = None
    if by_variant and layer.shift is None:  # Bins that shifts depend on stay.
        layer.timesteps = None
    elif layer.timesteps is not None:
        layer.timesteps = replace(layer.timesteps, bits=None)


def possible(plan: Plan, name: str, precision: Precision) -> str | None:
    """Why a layer cannot have a precision; None if it can."""
    alone = Plan(plan.recipe, plan.model_class, plan.timestep)
    alone.layers[name] = with_precisions(Plan("", "", None, layers={name: plan.layer(name)}), {name: precision}).layer(
        name
    )
    try:
        alone.check()
    except ConfigurationError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class StoredWeight:
    """The codes, scales and zero points that a layer reads.

    Attributes:
        codes: Name of the tensor of codes. Layers with tied weights and the same format read the same one.
        bytes: Size of all of them.
    """

    codes: str
    bytes: int


def stored_weights(pairs: Iterable[Pair], names: Iterable[str]) -> dict[str, StoredWeight]:
    """What layers read, by their names; those whose weight has no codes are left out."""
    wanted, found = set(names), dict[str, StoredWeight]()
    for pair in pairs:
        for node in pair.quantized.graph.nodes:
            name = str(node.meta.get(LAYER, ""))
            if name in wanted and name not in found and (codes := codes_of(node)) is not None:
                size = sum(_bytes(pair.quantized, part) for part in codes if part is not None)
                found[name] = StoredWeight(str(codes.codes.target), size)
    return found


def _bytes(module: fx.GraphModule, node: fx.Node) -> int:
    tensor = get_tensor(module, str(node.target))
    return tensor.numel() * tensor.element_size()
