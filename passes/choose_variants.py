"""Choose, layer by layer, how the ranges of linears' inputs are found, by the error of the model's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor, fx

from fxquant.calibration.samples import RUN_SAMPLES
from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.inspect.errors.alternatives import Alternative, Candidates
from fxquant.inspect.errors.graphs import Pair
from fxquant.inspect.errors.sweep import Sweep
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage, is_replayed
from fxquant.ir.tensors import copy_graph
from fxquant.passes._rounders import Rounding
from fxquant.pipeline.pipeline import Pass, Pipeline, Tier, register_pass
from fxquant.planning.context import BackendLimits, PassContext
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.linears import FloatLinear, linears_to_quantize
from fxquant.planning.pass_decisions import Decision
from fxquant.planning.plan import Plan

Floats = npt.NDArray[np.float64]

STATIC, BINS, CLIPPED, TOKEN = "one range", "range per bin", "clipped range per bin", "range per token"

_TINY = 1e-30


@dataclass
class Variant(Decision, of="choose-variants"):
    """What was chosen for a layer.

    Attributes:
        chosen: ``one range``, ``range per bin``, ``clipped range per bin`` or ``range per token``.
        gain_db: What this changed in the estimated SQNR of the model's output, against one range in this layer, in dB,
            mean over the measured calls.
        others_db: The same for the other variants.
        group_size: Input channels per weight group; 0 for one group per row.
    """

    chosen: str
    gain_db: float
    others_db: dict[str, float]
    group_size: int


@register_pass
@dataclass(frozen=True)
class ChooseVariants(Pass):
    """Write into the plan how the range of each quantized linear input is found. The graph does not change.

    The variants are: one range, a range per bin of timesteps (``bin-ranges``; a row of a table), the same with ends
    that are clipped to the lowest squared error of the input, and a range per token, which has to be found at run time.

    Every variant is tried for all layers at once, on copies of the graph. A float run and gradients of random products
    with the model's output then estimate what each layer alone adds to the output's error in each variant
    (:mod:`fxquant.inspect.errors.sweep`). From one range in every layer, the pass takes a step to the variant that
    gains most mean SQNR, as long as a static one gains anything, or a range per token gains at least ``gain``. Linears
    that read the same value have the same variant.

    Before that, weights are given groups of ``groups`` input channels, where these divide the width, if the backend
    runs them; layers whose plan has groups keep them. The weights that are rounded here are those that
    ``quantize-linears`` takes afterwards, so give it the same ``rounding``.

    Attributes:
        bins: The most bins of timesteps.
        clip: Whether to try clipped ends.
        gain: What a range per token has to gain, in dB of the mean SQNR of the model's output, per layer.
        groups: Size of weight groups for weights of at most 4 bits; 0 for none.
        rounding: How weights are rounded, as in ``quantize-linears``.
        calls: The most calibration calls to run again, spread over the timesteps.
        probes: Random gradients per call.
        seed: Seed of the random vectors.
    """

    name: ClassVar[str] = "choose-variants"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    keeps_inputs: ClassVar[bool] = True

    bins: int = 10
    clip: bool = True
    gain: float = 0.05
    groups: int = 0
    rounding: Rounding = Rounding.NEAREST
    calls: int = 8
    probes: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for what in ("bins", "calls", "probes"):
            if getattr(self, what) < 1:
                raise ConfigurationError(f"{self.name}: {what}={getattr(self, what)} is not possible; choose 1 or more")
        for what in ("gain", "groups"):
            if getattr(self, what) < 0:
                raise ConfigurationError(f"{self.name}: {what}={getattr(self, what)} should not be negative")

    def wants_samples(self) -> int:
        """The number of samples of calls that run again."""
        return self.calls * RUN_SAMPLES

    def wants_moments(self, layer: LayerPlan) -> bool:
        """Whether the rounding of the trials needs second moments."""
        coded = layer.weight_bits is not None and layer.activation_bits is not None
        return self.rounding is not Rounding.NEAREST and layer.kind == "linear" and coded

    def decides(self, name: str, layer: LayerPlan) -> bool:
        """Whether the pass chooses the range of a layer's input."""
        return layer.kind == "linear" and layer.weight_bits is not None and layer.activation_bits is not None

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        linears = [one for one in linears_to_quantize(graph, context.plan) if _is_open(one.plan)]
        if not linears or is_replayed(rewriter.module):
            return
        if not context.inputs:
            raise CalibrationError(
                f"{self.name} runs calibration calls again, and there are no calls of this kind; pass calibrate= to "
                "fxquant.compile, or statistics that were recorded with fxquant.Statistics(keep_calls=32)"
            )
        self._group(linears, context.backend)
        weights = {one.name: rewriter.tensor(one.weight).detach() for one in linears}
        plans, pairs = {}, {}
        for name, passes in self._variants(context, linears).items():
            trial, module = context.for_trial(), copy_graph(rewriter.module)
            Pipeline.parse(passes).run(module, trial, Stage.TRANSFORMED)
            module.requires_grad_(False)
            context.codes.update(trial.codes)  # The same weights in every variant.
            plans[name], pairs[name] = trial.plan, Pair(None, module, weights)
        errors = self._errors(pairs, context.inputs)
        self._choose(_readers(linears), errors, plans, context.plan)

    def _variants(self, context: PassContext, linears: Sequence[FloatLinear]) -> dict[str, str]:
        """The passes of each variant, as text."""
        rounding = f"rounding={self.rounding.value}"
        found, bins = {STATIC: f"quantize-linears{{{rounding}}}"}, ""
        if context.plan.timestep is not None and any(one.plan.timesteps is None for one in linears):
            bins = f"bin-ranges{{bins={self.bins}}},"
            found[BINS] = f"{bins}quantize-linears{{{rounding}}}"
        if self.clip:
            found[CLIPPED] = f"{bins}quantize-linears{{{rounding} activation-range=mse}}"
        found[TOKEN] = f"quantize-linears{{{rounding} activation-range=dynamic}}"
        return found

    def _group(self, linears: Sequence[FloatLinear], backend: BackendLimits | None) -> None:
        """Give weights groups, where the backend runs them."""
        for one in linears:
            grouped = replace(one.plan, group_size=self.groups)
            if self._fits(one.plan) and (backend is None or backend.refuse(grouped) is None):
                one.plan.group_size = self.groups

    def _fits(self, layer: LayerPlan) -> bool:
        few = layer.weight_bits is not None and layer.weight_bits <= 4 and layer.weight_format is None
        width = layer.shape[1]
        return few and not layer.group_size and 0 < self.groups < width and width % self.groups == 0

    def _errors(self, pairs: Mapping[str, Pair], calls: Sequence[Sequence[Tensor]]) -> dict[str, dict[str, Floats]]:
        """By layer and variant: the estimated error of the output from this layer alone at each call, relative."""
        sweep = Sweep(pairs[STATIC])
        alternatives = {name: Alternative(pair) for name, pair in pairs.items()}
        found: dict[str, dict[str, list[float]]] = {}
        for number, inputs in enumerate(calls):
            sweep.forward(list(inputs))
            watcher = Candidates(sweep, alternatives, inputs)
            sweep.pull(self.probes, self.seed + number, watcher)
            for variant, layers in watcher.products.items():
                for layer in layers:
                    own = found.setdefault(layer, {}).setdefault(variant, [])
                    own.append(watcher.alone(variant, layer) / max(sweep.signal, _TINY))
        return {
            layer: {variant: np.array(cells) for variant, cells in own.items()}
            for layer, own in found.items()
            if len(own) == len(pairs) and all(len(cells) == len(calls) for cells in own.values())
        }

    def _choose(
        self, readers: Sequence[Sequence[str]], errors: dict[str, dict[str, Floats]], plans: Mapping[str, Plan],
        plan: Plan,
    ) -> None:  # fmt: skip
        groups = [names for names in readers if all(name in errors for name in names)]
        sums = [{v: np.sum([errors[n][v] for n in names], axis=0) for v in plans} for names in groups]
        chosen = choose(sums, self.gain)
        whole = np.sum([own[variant] for own, variant in zip(sums, chosen, strict=True)], axis=0)
        decisions = plan.decisions_of(Variant)
        for names, own, variant in zip(groups, sums, chosen, strict=True):
            change = {v: _db(whole - own[variant] + own[STATIC]) - _db(whole - own[variant] + own[v]) for v in plans}
            change = {v: round(float(-difference), 4) for v, difference in change.items()}
            for name in names:
                layer, tried = plan.layer(name), plans[variant].layer(name)
                layer.activation, layer.timesteps = tried.activation, tried.timesteps
                layer.spread, layer.activation_sqnr_db = tried.spread, tried.activation_sqnr_db
                others = {v: db for v, db in change.items() if v not in (variant, STATIC)}
                decisions[name] = Variant(variant, change[variant], others, layer.group_size)


def choose(sums: Sequence[Mapping[str, Floats]], gain: float) -> list[str]:
    """A variant for each value that layers read, by steps that gain most.

    Args:
        sums: For each value and variant, the error of the output from the layers that read it, ``[calls]``.
        gain: What a range per token has to gain in mean dB.
    """
    chosen = [STATIC] * len(sums)
    whole = np.sum([own[STATIC] for own in sums], axis=0)
    while True:
        steps = []
        for number, own in enumerate(sums):
            for variant in own:
                without = whole - own[chosen[number]]
                better = _db(without + own[variant]) - _db(whole)
                least = gain if variant == TOKEN else 0.0
                if better > max(least, 1e-9) and not (chosen[number] == TOKEN and variant != TOKEN):
                    steps.append((better - least, number, variant))
        if not steps:
            return chosen
        _, number, variant = max(steps, key=lambda step: (step[0], -step[1]))
        whole = whole - sums[number][chosen[number]] + sums[number][variant]
        chosen[number] = variant


def _is_open(layer: LayerPlan) -> bool:
    """Whether the range of a layer's input is to be chosen. Formats with a scale per block have no ranges."""
    return layer.activation is None and layer.activation_format is None


def _db(errors: Floats) -> float:
    return float(-10 * np.log10(np.maximum(errors, _TINY)).mean())


def _readers(linears: Sequence[FloatLinear]) -> list[list[str]]:
    """Names of the linears by the value that they read."""
    found: dict[fx.Node, list[str]] = {}
    for one in linears:
        found.setdefault(one.input, []).append(one.name)
    return list(found.values())
