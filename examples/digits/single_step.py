"""Measures single-step calibration: ``python -m examples.digits.single_step`` from the repository's root.

Compares every choice of the one step that is observed, the first step with later steps that follow from its output, and
all steps. Weights have groups of 64 inputs and are rounded to nearest; ranges are the least and the largest value.
Prints how often the model runs per calibration sample, and the SQNR of the predicted noise.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from rich.progress import track
from tabulate import tabulate
from torch import Tensor, nn

import fxquant
from fxquant.planning.decisions import ActivationRange
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics

from .compare import Call, calibration, noise_sqnr, predicted_noise, test_calls
from .generator import load_pipeline
from .salience import plant_salience

PRECISIONS = ("w8a8-g64", "w4a8-g64")
LATER = (1, 2, 4)


@dataclass(frozen=True)
class Row:
    """One way to calibrate.

    Attributes:
        observed: Which steps were observed.
        forwards: How often the model runs per calibration sample.
        sqnr_db: Mean over test timesteps of the SQNR of the predicted noise, in dB.
        worst_db: SQNR of the worst test timestep, in dB.
    """

    observed: str
    forwards: int
    sqnr_db: float
    worst_db: float


class Comparison:
    """Calibrations of one model at one precision.

    Args:
        model: The float model.
        precision: Text of the precision, such as ``w4a8-g64``.
        calibrate: Runs the sampler once.
        calls: Calls of the model on which the error is measured.
        noise: What the float model predicts in these calls.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: str,
        calibrate: Callable[[], object],
        calls: Sequence[Call],
        noise: Sequence[Tensor],
    ) -> None:
        self.model, self.precision, self.calibrate, self.calls, self.noise = model, precision, calibrate, calls, noise

    def rows(self, steps: Sequence[int] | None = None, later: Sequence[int] = LATER) -> Iterator[Row]:
        """One row for all steps, for each number of later steps, and for each single step.

        Args:
            steps: The steps that are observed alone, from 0; None for every one.
            later: Numbers of later steps that are observed beside step 0.
        """
        statistics = Statistics()
        whole = fxquant.compile(
            self.model, recipe=f"rtn-{self.precision}", calibrate=self.calibrate, statistics=statistics, measure=0
        )
        order = statistics.timesteps.flip(0).tolist()  # The sampler begins with the largest timestep.
        yield self._row("all steps", len(order), whole)
        for count in later:
            recipe = fxquant.make_recipe(f"single-step-{self.precision}").with_options("observe-step", later=count)
            made = fxquant.compile(self.model, recipe=recipe, calibrate=self.calibrate, measure=0)
            yield self._row(f"step 0 and {count} later", 1 + count, made)
        for step in range(len(order)) if steps is None else steps:
            plan = plan_of_timestep(whole.plan, statistics, order[step])
            made = fxquant.compile(self.model, plan=plan, measure=0)
            yield self._row(f"step {step} (t = {order[step]:g})", step + 1, made)

    def _row(self, observed: str, forwards: int, model: nn.Module) -> Row:
        sqnr = noise_sqnr(model, self.noise, self.calls)
        return Row(observed, forwards, float(np.mean(sqnr)), min(sqnr))


def plan_of_timestep(plan: Plan, statistics: Statistics, timestep: float) -> Plan:
    """The same plan with the ranges of one timestep; what calibration at that timestep alone would decide."""
    plan = copy.deepcopy(plan)
    for name, layer in plan.layers.items():
        if layer.activation is not None:
            seen = statistics[layer.observed or name]
            at = seen.timesteps.tolist().index(timestep)
            layer.activation = ActivationRange(float(seen.minimum[at].min()), float(seen.maximum[at].max()), "minmax")
    return plan


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("plain", "planted"), default=["plain", "planted"])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), help="such as w8a8-g64")
    parser.add_argument("--steps", nargs="*", type=int, help="single steps to measure, from 0; every one without it")
    given = parser.parse_args(arguments)
    pipe = load_pipeline()
    table: list[tuple[object, ...]] = []
    for name in given.models:
        model = plant_salience(pipe.transformer) if name == "planted" else pipe.transformer
        calls = test_calls(pipe, model)
        noise = predicted_noise(model, calls)
        for precision in given.precisions:
            compared = Comparison(model, precision, calibration(pipe, model), calls, noise)
            rows = track(compared.rows(given.steps), f"{name} {precision}", transient=True)
            table += [(name, precision, *astuple(row)) for row in rows]
    headers = ["model", "precision", "observed", "forwards", "SQNR mean dB", "worst step dB"]
    print(tabulate(table, headers=headers, floatfmt=".2f"))


if __name__ == "__main__":
    main()
