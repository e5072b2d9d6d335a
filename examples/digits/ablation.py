"""Measures each part of PTQ4DiT's balancing: ``python -m examples.digits.ablation`` from the repository's root.

Everything except the balancing stays the same: percentile ranges, default layers, the same calibration noise.
Prints the SQNR of the predicted noise, and how far the combined salience of SSC is from the plain mean.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from rich.progress import track
from tabulate import tabulate

import fxquant
from fxquant.passes.balance_channels import spearman_weights
from fxquant.statistics.collection import Statistics

from .compare import calibration, noise_sqnr, predicted_noise, test_calls
from .generator import load_pipeline
from .salience import plant_salience

VARIANTS = {
    "no balancing": "",
    "CSB, mean over timesteps": "balance-channels{salience=mean},absorb-affines,",
    "CSB, maximum over timesteps": "balance-channels{salience=max},absorb-affines,",
    "CSB + SSC": "balance-channels{salience=spearman},absorb-affines,",
}
QUANTIZE = (
    "quantize-linears{weight-range=percentile activation-range=percentile},"
    "quantize-convolutions{weight-range=percentile activation-range=percentile},quantize-embeddings"
)


def main() -> None:
    """Run the ablation."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pipe = load_pipeline()
    models = {"plain": pipe.transformer, "planted": plant_salience(pipe.transformer)}
    rows, weights = [], []
    for name, model in models.items():
        calls = test_calls(pipe, model)
        noise = predicted_noise(model, calls)
        statistics = Statistics()
        for precision in ("w8a8", "w4a8"):
            for variant, balance in track(VARIANTS.items(), f"{name} {precision}", transient=True):
                recipe = f"remove-no-ops,assign-precision{{precision={precision}}} ; {balance}{QUANTIZE}"
                statistics = Statistics()
                quantized = fxquant.compile(
                    model, recipe=fxquant.Recipe.parse(recipe), calibrate=calibration(pipe, model), measure=0,
                    statistics=statistics,
                )  # fmt: skip
                sqnr = noise_sqnr(quantized, noise, calls)
                rows.append([name, precision, variant, float(np.mean(sqnr)), min(sqnr)])
        weights += [[name, place, *spread] for place, spread in _ssc_weights(model, statistics).items()]
    print(tabulate(rows, headers=["model", "precision", "balancing", "SQNR mean dB", "worst step dB"], floatfmt=".2f"))
    print()
    headers = ["model", "input of", "smallest eta", "largest eta", "uniform"]
    print(tabulate(weights, headers=headers, floatfmt=".4f"))


def _ssc_weights(model: torch.nn.Module, statistics: Statistics) -> dict[str, tuple[float, float, float]]:
    """Smallest, largest and uniform SSC weight of a timestep, over all blocks, for each kind of balanced input."""
    parameters = dict(model.named_parameters())
    found: dict[str, tuple[float, float, float]] = {}
    readers = {
        "attn1.to_q": ("to_q", "to_k", "to_v"),
        "attn1.to_out.0": ("to_out.0",),
        "ff.net.0.proj": ("net.0.proj",),
    }
    for place, names in readers.items():
        every = []
        for key in statistics:
            if key.endswith(place):
                parent = key.removesuffix(place) + place.split(".")[0]
                tops = [parameters[f"{parent}.{name}.weight"].detach().abs().amax(dim=0) for name in names]
                salience = torch.stack(tops).amax(dim=0).double().numpy()
                every.append(spearman_weights(statistics[key].absmax.double().numpy(), salience))
        eta = np.concatenate(every)
        found[place] = (float(eta.min()), float(eta.max()), 1 / len(every[0]))
    return found


if __name__ == "__main__":
    main()
