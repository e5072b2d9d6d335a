"""Compares groupings of timesteps: ``python -m examples.digits.grouping`` from the repository's root.

Everything except the groups is as in the recipe ``htg``. Prints the SQNR of the predicted noise, and how far the
midpoints of the channels' ranges are from the means of their groups: the sum of squared distances as a share of the sum
with one group. The greedy merge of HTG is compared with the exact optimum.
"""

from __future__ import annotations

import argparse

import numpy as np
from diffusers import DiTPipeline
from rich.progress import track
from tabulate import tabulate
from torch import nn

import fxquant
from fxquant.pipeline.recipes import make_recipe
from fxquant.planning.grouping import within
from fxquant.runtime.model import GraphModel
from fxquant.statistics.collection import Statistics

from .compare import CALIBRATION_STEPS, calibration, noise_sqnr, predicted_noise, test_calls
from .generator import load_pipeline
from .salience import plant_salience

GROUPS = (1, 2, -(-CALIBRATION_STEPS // 10), 5, 10, CALIBRATION_STEPS)
METHODS = ("greedy", "optimal")
PRECISIONS = ("w8a8", "w4a8")


def recipe(precision: str, groups: int, method: str) -> fxquant.Recipe:
    """The recipe ``htg`` with this number of groups and this grouping method."""
    return make_recipe(f"htg-{precision}").with_options("group-timesteps", groups=groups, method=method)


def distances(quantized: GraphModel, statistics: Statistics) -> float:
    """Squared distances of midpoints to group means, as a share of those to one mean; averaged over inputs."""
    assert quantized.plan is not None
    shares = {}
    for layer in quantized.plan.layers.values():
        if layer.timesteps is None or layer.observed is None or layer.observed in shares:
            continue
        seen = statistics[layer.observed]
        middles = ((seen.minimum + seen.maximum) / 2).double().numpy()
        bins = layer.bins(seen.timesteps)
        starts = [0, *(i for i in range(1, len(bins)) if bins[i] != bins[i - 1])]
        shares[layer.observed] = within(middles, starts) / within(middles, [0])
    return float(np.mean(list(shares.values())))


def calibrate(pipe: DiTPipeline, model: nn.Module, precision: str) -> tuple[fxquant.Plan, Statistics]:
    """The plan of ``htg`` and its statistics; other groups are decided from the same statistics."""
    statistics = Statistics()
    quantized = fxquant.compile(
        model, recipe=f"htg-{precision}", calibrate=calibration(pipe, model), measure=0, statistics=statistics
    )
    assert quantized.plan is not None
    return quantized.plan, statistics


def main() -> None:
    """Measure all groupings."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pipe = load_pipeline()
    models: dict[str, nn.Module] = {"plain": pipe.transformer, "planted": plant_salience(pipe.transformer)}
    variants = [(groups, method) for groups in GROUPS[1:-1] for method in METHODS]
    variants = [(GROUPS[0], METHODS[0]), *variants, (GROUPS[-1], METHODS[0])]
    rows = []
    for name, model in models.items():
        calls = test_calls(pipe, model)
        noise = predicted_noise(model, calls)
        calibrated = {precision: calibrate(pipe, model, precision) for precision in PRECISIONS}
        for groups, method in track(variants, name, transient=True):
            row = [name, groups, method if 1 < groups < GROUPS[-1] else "either", 0.0]
            for precision, (first, statistics) in calibrated.items():
                plan = first.undecided(str(recipe(precision, groups, method)))
                quantized = fxquant.compile(model, plan=plan, statistics=statistics)
                sqnr = noise_sqnr(quantized, noise, calls)
                row[3] = distances(quantized, statistics)
                row += [float(np.mean(sqnr)), min(sqnr)]
            rows.append(row)
    headers = ["model", "groups", "grouping", "distances"]
    headers += [f"{precision} {what}" for precision in PRECISIONS for what in ("SQNR mean dB", "worst step dB")]
    print(tabulate(rows, headers=headers, floatfmt=("", "", "", ".3f", ".2f", ".2f", ".2f", ".2f")))


if __name__ == "__main__":
    main()
