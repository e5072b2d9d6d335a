"""The same model in several precisions, which share everything that was decided before the weights are rounded."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import fx

from fxquant.errors import ConfigurationError, shortened
from fxquant.inspect.errors.graphs import Pair, codes_of
from fxquant.ir.meta import LAYER
from fxquant.ir.tensors import get_tensor
from fxquant.pipeline.recipes import Recipe
from fxquant.planning.branches import Branch
from fxquant.planning.linears import is_rounded
from fxquant.planning.plan import Plan
from fxquant.planning.precision import Precision
from fxquant.planning.roundings import with_precision

_WITH_RANK = re.compile(r"(?P<precision>.+)-r(?P<rank>\d{1,9})")


@dataclass(frozen=True)
class Candidate:
    """What a layer can have. Prints and parses as a precision, with a rank behind it: ``w4a4``, ``w4a4-g64-r16``.

    Attributes:
        precision: The precision.
        rank: Rank of the branch of low rank beside the layer, 0 for none; None for what the recipe decides.
    """

    precision: Precision
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and not is_rounded(self.precision):
            raise ConfigurationError(
                f"candidate {self}: branches lie beside weights of fewer than 8 bits, or with quantized inputs; leave "
                "out the rank"
            )

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Read ``w4a8``, ``w4a4-g64``, ``w4a4-r16`` (a branch of rank 16), ``w4a4-r0`` (no branch) or ``float``.

        Raises:
            ConfigurationError: If the text is none of these.
        """
        match = _WITH_RANK.fullmatch(text)
        if match is None:
            return cls(Precision.parse(text))
        found = cls(Precision.parse(match["precision"]), int(match["rank"]))
        if str(found) != text:
            raise ConfigurationError(f"{shortened(text)!r} is not a candidate; write {found}")
        return found

    def __str__(self) -> str:
        return str(self.precision) if self.rank is None else f"{self.precision}-r{self.rank}"


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
    """As :func:`with_candidates`, with the branches of the plan."""
    return with_candidates(plan, {name: Candidate(precision) for name, precision in chosen.items()})


def with_candidates(plan: Plan, chosen: Mapping[str, Candidate]) -> Plan:
    """A copy of a plan in which some layers have other precisions or branches; their ranges are decided again.

    What was folded into weights and the bins of timesteps stay as they are. What ``bin-bits`` and ``choose-variants``
    decided about such a layer was decided for its earlier precision, for all layers that read the same value together;
    they decide it again.

    Args:
        plan: A plan of a compiled model.
        chosen: Candidates by layer. A rank fits layers about whose branch the plan decides.
    """
    made = copy.deepcopy(plan)
    branches = made.decisions_of(Branch)
    for name, candidate in chosen.items():
        if candidate.rank is not None and name in branches and branches[name].rank != candidate.rank:
            reason = None if candidate.rank else "the search chose no branch"
            branches[name] = replace(branches[name], rank=candidate.rank, reason=reason)
    precisions = {name: candidate.precision for name, candidate in chosen.items()}
    changed = {name: precision for name, precision in precisions.items() if made.layer(name).precision != precision}
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


def possible(plan: Plan, name: str, candidate: Candidate) -> str | None:
    """Why a layer cannot have a candidate; None if it can."""
    if candidate.rank:
        branch, (out, columns) = plan.decisions_of(Branch).get(name), plan.layer(name).shape
        if branch is None:
            return "the recipe gives it no branch of low rank"
        if candidate.rank * (out + columns) >= out * columns:
            return f"a branch of rank {candidate.rank} is not smaller than a weight of {out} x {columns}"
    alone = Plan(plan.recipe, plan.model_class, plan.timestep)
    only = Plan("", "", None, layers={name: plan.layer(name)})
    alone.layers[name] = with_precisions(only, {name: candidate.precision}).layer(name)
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
