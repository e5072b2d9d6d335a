"""Weigh the timesteps in the second moments that weights are rounded with, by how much the model's output suffers."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, fx

from fxquant.calibration.samples import RUN_SAMPLES
from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.inspect.errors.graphs import Pair
from fxquant.inspect.errors.sweep import Sweep, energy
from fxquant.inspect.errors.units import Unit
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage, is_replayed
from fxquant.ir.tensors import copy_graph
from fxquant.ir.time_tables import timestep_input
from fxquant.pipeline.pipeline import Pass, Pipeline, Tier, register_pass
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.linears import FloatLinear, is_rounded, rounded_linears
from fxquant.planning.pass_decisions import Decision
from fxquant.reconstruction.simulate import Lookup

_TINY = 1e-30


class Weighting(enum.Enum):
    """What the error of the model's output at a timestep is divided by."""

    OUTPUT = "output"
    """Nothing: errors count as they are."""
    SIGNAL = "signal"
    """The energy of the float output at that timestep: errors count relative to it, so small outputs count more."""
    ERROR = "error"
    """The energy of the output's error with all layers rounded to nearest: every timestep gains the same decibels."""


@dataclass
class TimestepWeights(Decision, of="weigh-timesteps"):
    """How much an error of a layer's output counts at each timestep.

    Attributes:
        timesteps: The timesteps, ascending.
        weights: Mean square of the gradient of the model's output, divided as the weighting says.
    """

    timesteps: list[float]
    weights: list[float]


@register_pass
@dataclass(frozen=True)
class WeighTimesteps(Pass):
    """Write weights of the timesteps into the plan, one list per linear. The graph does not change.

    AdaTSQ (arXiv 2602.09883): with the weights alpha_t, GPTQ and AdaRound use the second moments

        H = sum_t alpha_t E[x_t x_t^T]

    of a layer's inputs instead of the mean over timesteps. alpha_t is the mean square of the gradient of the model's
    output with respect to the layer's output at timestep t, from calibration calls and random vectors (the diagonal of
    the Fisher information). It is interpolated between the timesteps of these calls.

    Moments are recorded over all timesteps together. How they change with the weights follows from the rows that
    calibration sampled at each timestep (:func:`fxquant.planning.weighted_moments.weighted_moments`).

    Attributes:
        by: What the error of the output is divided by at each timestep: nothing (``output``, as in the paper), the
            energy of the output (``signal``), or its error with all layers rounded to nearest (``error``).
        calls: The most calibration calls to run again, spread over the timesteps.
        probes: Random gradients per call.
        seed: Seed of the random vectors.
    """

    name: ClassVar[str] = "weigh-timesteps"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    keeps_inputs: ClassVar[bool] = True

    by: Weighting = Weighting.OUTPUT
    calls: int = 16
    probes: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for what in ("calls", "probes"):
            if getattr(self, what) < 1:
                raise ConfigurationError(f"{self.name}: {what}={getattr(self, what)} is not possible; choose 1 or more")

    def wants_samples(self) -> int:
        """The number of samples of calls that run again."""
        return self.calls * RUN_SAMPLES

    def decides(self, name: str, layer: LayerPlan) -> bool:
        """Whether the pass weighs the timesteps of a layer."""
        return layer.kind == "linear" and is_rounded(layer)

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        decisions = context.plan.decisions_of(TimestepWeights)
        linears = rounded_linears(graph, context.plan)
        if not is_replayed(rewriter.module) and any(one.name not in decisions for one in linears):
            found = self._measure(graph, context, rewriter, linears)
            decisions.update({name: own for name, own in found.items() if name not in decisions})
        for name, own in decisions.items():
            context.timestep_weights[name] = dict(zip(own.timesteps, own.weights, strict=True))

    def _measure(
        self, graph: fx.Graph, context: PassContext, rewriter: Rewriter, linears: Sequence[FloatLinear]
    ) -> dict[str, TimestepWeights]:
        timestep = timestep_input(graph, context.plan.timestep)
        if not context.inputs:
            raise CalibrationError(
                f"{self.name} runs calibration calls again, and there are no calls of this kind; pass calibrate= to "
                "fxquant.compile, or statistics that were recorded with fxquant.Statistics(keep_calls=32)"
            )
        weights = {one.name: rewriter.tensor(one.weight).detach() for one in linears}
        trial, module = context.for_trial(), copy_graph(rewriter.module)
        Pipeline.parse("quantize-linears").run(module, trial, Stage.TRANSFORMED)
        module.requires_grad_(False)
        sweep = Sweep(Pair(None, module, weights))
        position = [node for node in graph.nodes if node.op == "placeholder"].index(timestep)
        sums: dict[str, dict[float, list[float]]] = {}
        for number, inputs in enumerate(context.inputs):
            sweep.forward(list(inputs))
            watcher = _Gradients(self.probes)
            sweep.pull(self.probes, self.seed + number, watcher)
            whole = self._divisor(sweep, inputs)
            for step in sorted({float(one) for one in inputs[position].flatten().tolist()}):
                for name, square in watcher.squares.items():
                    sums.setdefault(name, {}).setdefault(step, []).append(square / whole)
        return {name: _decided(own) for name, own in sums.items() if name in weights and any(map(any, own.values()))}

    def _divisor(self, sweep: Sweep, inputs: Sequence[Tensor]) -> float:
        """What squares of gradients of one call are divided by: energies per element of the output."""
        if self.by is Weighting.OUTPUT:
            return 1.0
        whole = sweep.signal if self.by is Weighting.SIGNAL else sweep.whole_error(list(inputs))
        return max(whole / max(sweep.exact.numel(), 1), _TINY)


@dataclass(eq=False)
class _Gradients:
    """Watches a sweep: for each layer, the mean over tokens of the squared gradient, summed over output channels."""

    probes: int
    squares: dict[str, float] = field(default_factory=dict)

    def saw(self, unit: Unit, args: tuple[Any, ...], y: Tensor, value: Lookup) -> None:
        self.squares.setdefault(unit.name, 0.0)

    def pulled(self, unit: Unit, gradient: Tensor | None) -> None:
        if gradient is not None and gradient.numel():
            tokens = gradient.numel() // gradient.shape[-1]
            self.squares[unit.name] += energy(gradient) / tokens / self.probes

    def finished(self) -> None:
        """Nothing is kept of a block."""


def _decided(own: Mapping[float, Sequence[float]]) -> TimestepWeights:
    steps = sorted(own)
    return TimestepWeights(steps, [float(np.mean(own[step])) for step in steps])
