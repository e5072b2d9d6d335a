"""Measure the passes on the digits model: ``python -m examples.passes.measure``, from the root of the repository.

Prints the mean SQNR of the noise prediction in dB, without and with each pass. The package must be installed, or its
folder on ``PYTHONPATH``. One calibration serves all rows but those that observe something else, or that run calibration
calls again.
"""

from __future__ import annotations

import argparse
import functools

import example_passes.choose_bits
import example_passes.float8
import example_passes.low_rank_branch
import example_passes.rotate_inputs  # noqa: F401  (each registers its pass)

from examples.digits import load_pipeline, plant_salience
from examples.digits.compare import Calibrated, noise_sqnr, predicted_noise, test_calls
from fxquant import Recipe, make_recipe

ROWS = (
    ("ptq4dit-w4a4", "low-rank-branch", "before rounding"),
    ("ptq4dit-w4a8", "low-rank-branch", "before rounding"),
    ("ptq4dit-w5a8", "choose-bits", "before rounding"),
    ("rtn-w4a4", "rotate-inputs", "before rounding"),
    ("rtn-w4a4", "rotate-inputs", "before calibration"),
    ("rtn-w8a8", "quantize-e4m3", "before rounding"),
)
"""Recipe, pass, and where the pass is inserted."""


def with_pass(recipe: Recipe, name: str, place: str) -> Recipe:
    """The recipe with one of the passes ``before calibration`` or ``before rounding``."""
    text = str(recipe)
    if place == "before calibration":
        return Recipe.parse(text.replace(" ; ", f",{name} ; ", 1))
    return Recipe.parse(text.replace("quantize-linears", f"{name},quantize-linears", 1))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planted", action="store_true", help="the model with planted salient channels")
    planted = parser.parse_args().planted
    pipe = load_pipeline()
    model = plant_salience(pipe.transformer) if planted else pipe.transformer
    calls = test_calls(pipe, model)
    noise = predicted_noise(model, calls)
    calibrated = Calibrated(pipe, model, "default")

    @functools.cache
    def mean_sqnr(recipe: Recipe) -> float:
        quantized, _ = calibrated.quantize(recipe)
        found = noise_sqnr(quantized, noise, calls)
        return sum(found) / len(found)

    for base, name, place in ROWS:
        plain = make_recipe(base)
        before, after = mean_sqnr(plain), mean_sqnr(with_pass(plain, name, place))
        print(f"{base:14} {name:16} {place:19} {before:5.1f} dB -> {after:5.1f} dB", flush=True)


if __name__ == "__main__":
    main()
