"""Compare number formats on the digits model, plain and with planted salience: `python -m examples.digits.formats`.

Prints, for each recipe, the SQNR of the predicted noise (mean over test timesteps and at the worst one) and the size
of the checkpoint. It takes some minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tabulate import tabulate

from fxquant.pipeline.recipes import make_recipe

from .compare import Calibrated, checkpoint_megabytes, noise_sqnr, predicted_noise, test_calls
from .generator import load_pipeline
from .salience import plant_salience

RECIPES = (
    *("rtn-w8a8", "rtn-dynamic-w8a8", "rtn-wfp8afp8", "rtn-dynamic-wfp8afp8", "rtn-wmxfp8amxfp8"),
    *("rtn-wmxfp6amxfp6", "rtn-w4a8", "rtn-wmxfp4amxfp8", "rtn-w4a4", "rtn-dynamic-w4a4", "rtn-dynamic-w4a4-g32"),
    *("rtn-dynamic-w4a4-g16", "rtn-wmxfp4amxfp4", "rtn-wnvfp4anvfp4", "rtn-dynamic-wnvfp4anvfp4"),
    *("ptq4dit-dynamic-gptq-w4a4-g32", "ptq4dit-gptq-wmxfp4amxfp4", "ptq4dit-gptq-wnvfp4anvfp4"),
    *("rtn-w4a16-g64", "rtn-wnf4a16-g64", "rtn-wmxfp4a16", "rtn-wnvfp4a16"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="recipes with precision")
    parser.add_argument("--layers", default="blocks", help="layers that are quantized: default, blocks or all")
    parser.add_argument("--models", nargs="+", default=["plain", "planted"], choices=["plain", "planted"])
    options = parser.parse_args(arguments)
    pipe = load_pipeline()
    models = {"plain": lambda: pipe.transformer, "planted": lambda: plant_salience(pipe.transformer)}
    rows: dict[str, list[float]] = {recipe: [] for recipe in options.recipes}
    for name in options.models:
        model = models[name]()
        calls = test_calls(pipe, model)
        noise, calibrated = predicted_noise(model, calls), Calibrated(pipe, model, options.layers)
        for recipe, row in rows.items():
            quantized, _ = calibrated.quantize(make_recipe(recipe, options.layers))
            sqnr = noise_sqnr(quantized, noise, calls)
            row += [sum(sqnr) / len(sqnr), min(sqnr)]
            print(f"{name} {recipe}: mean {row[-2]:.2f} dB, worst {row[-1]:.2f} dB", flush=True)
            if name == options.models[-1]:
                row.append(checkpoint_megabytes(quantized))
    headers = ["recipe", *(f"{name}: {what} dB" for name in options.models for what in ("mean", "worst")), "MB"]
    table = [[recipe, *row] for recipe, row in rows.items()]
    print(tabulate(table, headers=headers, floatfmt=".2f", tablefmt="github"))


if __name__ == "__main__":
    main()
