"""Give the inputs of linears bits that differ from bin to bin of timesteps."""

from __future__ import annotations

import copy
import heapq
import warnings
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from fxquant.errors import ConfigurationError, QualityWarning
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage, is_replayed
from fxquant.numerics.activations import round_in_range
from fxquant.numerics.formats import FORMATS
from fxquant.numerics.packing import MAX_BITS, MIN_BITS
from fxquant.numerics.ranges import activation_range
from fxquant.passes._inputs import InputRange, decide_range
from fxquant.passes.choose_variants import Variant
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.layer_inputs import layer_input
from fxquant.planning.linears import FloatLinear, linears_to_quantize
from fxquant.planning.pass_decisions import Decision
from fxquant.planning.plan import Plan
from fxquant.planning.weighted_moments import interpolated


@dataclass
class Bits(Decision, of="bin-bits"):
    """The bits of a layer's input.

    Attributes:
        bits: Bits in each bin of timesteps, the lowest timesteps first.
        mean: Their mean over the calibrated timesteps.
    """

    bits: list[int]
    mean: float


@dataclass(frozen=True)
class _Place:
    """One bin, or all bins, of one value that linears read.

    Attributes:
        names: The linears.
        bins: How many bins it stands for.
        cost: Multiplications of these linears, times the timesteps of the bin: what each further bit costs.
        errors: Error of the model's output with ``lowest``, ``lowest + 1``, ... bits.
    """

    names: tuple[str, ...]
    bins: int
    cost: float
    errors: list[float]


@register_pass
@dataclass(frozen=True)
class BinBits(Pass):
    """Write the bits of each input in each bin of timesteps into the plan. The graph does not change.

    Later, ``quantize-linears`` writes them as data into the graph: beside scale and zero point, the highest code is a
    row of a table over the bins, ``fxquant::quantize(x, s[bin], z[bin], "int8", None, top[bin])``. There is no branch,
    and products are the same. AdaTSQ (arXiv 2602.09883) lets bits follow the timestep.

    For each bin and each number of bits, sampled rows are rounded, and the error of the layer's output is weighted by
    what ``weigh-timesteps`` found for its timesteps; run that pass before, best with ``by=error``. From ``lowest`` bits
    everywhere, one bit after the other goes where it takes away most error per multiplication, as long as the mean
    stays at most ``bits``. It counts each timestep alike, and each layer by its multiplications.

    Only integer inputs with bins are changed (``bin-ranges``, ``group-timesteps`` or ``choose-variants`` before), up to
    the bits that the plan gives the layer. Linears that read the same value share bits. Ranges that ``choose-variants``
    found for these bins are found again for their bits, by the same search.

    Attributes:
        bits: The mean number of bits.
        lowest: The fewest bits.
        by_bin: Whether bits may differ from bin to bin; otherwise they differ only from layer to layer.
    """

    name: ClassVar[str] = "bin-bits"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    keeps_inputs: ClassVar[bool] = True

    bits: float = 6.0
    lowest: int = 3
    by_bin: bool = True

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.lowest <= self.bits <= MAX_BITS:
            raise ConfigurationError(
                f"{self.name}: a mean of {self.bits:g} bits with {self.lowest} or more in each bin is not possible; "
                f"choose lowest from {MIN_BITS} and bits from lowest to {MAX_BITS}"
            )

    def decides(self, name: str, layer: LayerPlan) -> bool:
        """Whether the pass decides the bits of a layer's input."""
        return layer.kind == "linear" and layer.weight_bits is not None and layer.activation_bits is not None

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        variants = context.plan.decisions_of(Variant)
        found = [one for one in linears_to_quantize(graph, context.plan) if self._is_open(one, variants)]
        if is_replayed(rewriter.module) or context.statistics is None:
            return
        if not found:
            self._warn_of_none(context.plan)
            return
        readers: dict[fx.Node, list[FloatLinear]] = {}
        for one in found:
            readers.setdefault(one.input, []).append(one)
        places = [place for linears in readers.values() for place in self._places(linears, context, rewriter)]
        chosen = allocate([(place.cost, place.errors) for place in places], self.bits - self.lowest)
        decided: dict[tuple[str, ...], list[int]] = {}
        for place, extra in zip(places, chosen, strict=True):
            decided.setdefault(place.names, []).extend([self.lowest + extra] * place.bins)
        open_nodes = {one.name: one for one in found}
        for names, bits in decided.items():
            steps = context.plan.layer(names[0]).bins(
                context.observed(context.plan.layer(names[0]).observed or names[0]).timesteps
            )
            mean = round(float(np.mean([bits[int(number)] for number in steps])), 3)
            for name in names:
                layer = context.plan.layer(name)
                layer.timesteps = copy.copy(layer.timesteps)
                assert layer.timesteps is not None
                layer.timesteps.bits = list(bits)
                context.plan.decisions_of(Bits)[name] = Bits(list(bits), mean)
                if layer.activation is not None:
                    one, method = open_nodes[name], InputRange(layer.activation.method)
                    layer.activation = None
                    decide_range(one.node, one.input, context, rewriter, method)

    def _warn_of_none(self, plan: Plan) -> None:
        """Warn that the pass decides nothing, although inputs of linears are quantized."""
        inputs = [name for name, own in plan.layers.items() if own.kind == "linear" and own.activation_bits is not None]
        if inputs and not plan.decisions_of(Bits):
            warnings.warn(
                f"{self.name} changes no layer, such as {inputs[0]}: only integer inputs of more than {self.lowest} "
                "bits with a range per bin of timesteps have bits by bin. Put bin-ranges, group-timesteps or "
                "choose-variants before it, and weigh-timesteps{by=error} between them",
                QualityWarning,
                stacklevel=3,
            )

    def _is_open(self, one: FloatLinear, variants: Container[str]) -> bool:
        layer = one.plan
        integer = layer.activation_format is None and layer.activation_bits is not None
        binned = layer.timesteps is not None and layer.timesteps.bits is None and len(layer.boundaries) > 0
        dynamic = layer.activation is not None and layer.activation.method == InputRange.DYNAMIC.value
        decided = layer.activation is not None and one.name not in variants
        return integer and binned and not dynamic and not decided and (layer.activation_bits or 0) > self.lowest

    def _places(self, linears: Sequence[FloatLinear], context: PassContext, rewriter: Rewriter) -> list[_Place]:
        """The bins of a value, with the errors of the linears that read it."""
        first = linears[0]
        names = tuple(one.name for one in linears)
        unweighted = next((name for name in names if name not in context.timestep_weights), None)
        if unweighted is not None:
            raise ConfigurationError(
                f"{self.name} compares errors at timesteps by their effect on the model's output, which is not known "
                f"for layer {unweighted}; put weigh-timesteps{{by=error}} before it, or leave the layer out by "
                "an override of assign-precision"
            )
        weights = [rewriter.tensor(one.weight).detach().double() for one in linears]
        most = first.plan.activation_bits
        assert most is not None
        whole = layer_input(context, first.name)
        shares = [interpolated(context.timestep_weights[name], whole.timesteps) for name in names]
        tokens = context.observed(first.plan.observed or first.name).count.double().mean().item()
        places = []
        for number in range(len(first.plan.boundaries) + 1):
            inside = torch.nonzero(whole.bins == number).flatten().tolist()
            rows = [whole.rows[step] for step in inside]
            seen = layer_input(context, first.name, number)
            ends = float(seen.minimum.min()), float(seen.maximum.max())
            errors = []
            for bits in range(self.lowest, most + 1):
                moved = [_moved(own, bits, ends) for own in rows]
                total = 0.0
                for weight, share in zip(weights, shares, strict=True):
                    for step, delta in zip(inside, moved, strict=True):
                        energy = float((delta @ weight.T).square().mean()) if len(delta) else 0.0
                        total += float(share[step]) * energy * tokens
                errors.append(total)
            macs = float(sum(weight.numel() for weight in weights))
            places.append(_Place(names, 1, macs * max(len(inside), 1), errors))
        if self.by_bin:
            return places
        errors = np.sum([place.errors for place in places], axis=0).tolist()
        return [_Place(names, len(places), sum(place.cost for place in places), errors)]


def _moved(rows: Tensor, bits: int, ends: tuple[float, float]) -> Tensor:
    """How far rounding moves rows, with the range that is best for these bits."""
    format = FORMATS[f"int{bits}"]
    if not len(rows):
        return rows.double()
    return round_in_range(rows, format, *activation_range(rows, *ends, format, "percentile")).double() - rows.double()


def allocate(places: Sequence[tuple[float, Sequence[float]]], mean: float) -> list[int]:
    """How many further bits each place gets, one after the other where a bit takes away most error per cost.

    Args:
        places: The cost of a bit, and the errors with 0, 1, 2, ... further bits.
        mean: The most further bits, as a mean weighted by costs.
    """
    left = mean * sum(cost for cost, _ in places)
    chosen = [0] * len(places)

    def gain(number: int) -> tuple[float, int]:
        cost, errors = places[number]
        return (errors[chosen[number] + 1] - errors[chosen[number]]) / cost, number

    waiting = [gain(number) for number, (_, errors) in enumerate(places) if len(errors) > 1]
    heapq.heapify(waiting)
    while waiting:
        change, number = heapq.heappop(waiting)
        cost, errors = places[number]
        if cost > left * (1 + 1e-9) or change > 0:
            continue
        left -= cost
        chosen[number] += 1
        if chosen[number] + 1 < len(errors):
            heapq.heappush(waiting, gain(number))
    return chosen
