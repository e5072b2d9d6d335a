"""The demo: quantize the digits pipeline with several recipes and measure the error of each.

``python -m examples.digits.demo --out out`` from the root of the repository writes ``samples.png``, ``salience.png``
and ``results.json``, and prints one table. Two models are quantized: the trained one, and one that computes the same
function with planted salient channels, which large diffusion transformers have. ``--all`` compares every method;
``--methods rtn,ptq4dit-gptq`` compares the named methods.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from fxquant.pipeline.recipes import Recipe, make_recipe

from .compare import (
    Calibrated,
    Result,
    checkpoint_megabytes,
    judge,
    noise_sqnr,
    predicted_noise,
    test_calls,
    transformer_of,
)
from .data import digits
from .generator import generate, load_pipeline
from .judge import load_classifier
from .pictures import draw_salience, draw_samples
from .salience import plant_salience

PRECISIONS = ("w8a8", "w4a8")
PLAIN = ("rtn", "smoothquant", "htg", "ptq4dit")
METHODS = {"w8a8": PLAIN, "w4a8": (*PLAIN, "ptq4dit-gptq")}
"""Compared methods for each precision. 8 bits do not need GPTQ."""

EVERY_METHOD = (
    *("rtn", "dynamic", "single-step", "smoothquant", "smoothquant-search", "repq", "q-diffusion"),
    *("htg", "ptq4dit", "ptq4dit-dynamic", "ptq4dit-gptq", "ptq4dit-dynamic-gptq"),
)
"""Methods that ``--all`` compares."""

GROUPED = ("single-step",)
"""Methods whose weights are quantized in groups of 64 input channels, as in their paper."""

QUICK = {"iterations": 100, "rounding_rate": 0.05, "step_rate": 1e-3, "samples": 128}
"""Settings with which block reconstruction takes seconds; the papers use 20,000 iterations."""

IMAGES = 70
SHOWN = 10
PICTURED = ("rtn", "smoothquant-w", "htg", "ptq4dit")
SEED = 0
BLOCK = 4
"""The block whose activations ``salience.png`` shows."""


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for pictures and figures")
    parser.add_argument("--images", type=int, default=IMAGES, help="digits to generate with each model")
    parser.add_argument("--methods", help="recipes without precision, joined by commas, instead of the default ones")
    parser.add_argument("--all", action="store_true", help="compare every available method")
    options = parser.parse_args()
    began = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    methods = METHODS
    if options.all or options.methods:
        methods = dict.fromkeys(PRECISIONS, EVERY_METHOD if options.all else tuple(options.methods.split(",")))
    console = Console()
    console.print(HEADER, highlight=False, soft_wrap=True)
    run(options.out, options.images, methods, console)
    console.print(
        f"\nSQNR: predicted noise against float, over test timesteps. PSNR: final images against float. "
        f"{options.images} digits per row.\nlayers=default keeps the patch convolution and the final layer in float "
        f"and the embedders in float arithmetic; layers=all is the papers' setting. s: seconds of conversion.\n"
        f"Calibration runs once per model and choice of layers.{_learned(methods)}\n"
        f"Pictures and figures in {options.out}/. {time.perf_counter() - began:.0f} s.",
        highlight=False,
        soft_wrap=True,
    )


def _learned(methods: Mapping[str, Sequence[str]]) -> str:
    if not any("q-diffusion" in names for names in methods.values()):
        return " Run make compare for more methods."
    return f" q-diffusion learns for {QUICK['iterations']} iterations per block here; the paper uses 20,000."


def recipe_name(method: str, precision: str) -> str:
    """Name of the recipe of a method at a precision."""
    return f"{method}-{precision}-g64" if method in GROUPED else f"{method}-{precision}"


def quick(recipe: Recipe) -> Recipe:
    """The recipe with a short block reconstruction if it has one; the full one takes hours."""
    learns = any(step.name == "reconstruct-blocks" for step in recipe.convert)
    return recipe.with_options("reconstruct-blocks", **QUICK) if learns else recipe


def run(
    out: Path, count: int, methods: Mapping[str, Sequence[str]] = METHODS, console: Console | None = None
) -> list[Result]:
    """Quantize both models with all recipes; write pictures and figures into ``out``.

    Args:
        out: Folder for pictures and figures.
        count: Digits to generate with each model.
        methods: Methods to compare, by precision.
        console: Prints each row of the table as soon as it is measured, above the progress bar; none if None.
    """
    pipe, classifier = load_pipeline(), load_classifier()
    real, _ = digits("held_back")
    real = (real + 1) / 2
    labels = torch.arange(count) % 10
    models: dict[str, nn.Module] = {"plain": pipe.transformer, "planted": plant_salience(pipe.transformer)}
    jobs = [(recipe_name(method, precision), "default") for precision, names in methods.items() for method in names]
    papers_setting = [(f"ptq4dit-{precision}", "all") for precision in PRECISIONS]
    results: list[Result] = []
    shown: dict[str, dict[str, Tensor]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = console or Console(quiet=True)

    def add(result: Result) -> None:
        results.append(result)
        console.print(row(result), highlight=False, soft_wrap=True)

    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("float", total=len(models) * (len(jobs) + 1) + len(papers_setting))
        for name, model in models.items():
            progress.update(task, description=f"{name}: float")
            with transformer_of(pipe, model):
                reference = generate(pipe, labels, seed=SEED)
            calls = test_calls(pipe, model)
            noise = predicted_noise(model, calls)
            calibrated: dict[str, Calibrated] = {}
            shown[name] = {"float": reference[:SHOWN]}
            figures = judge(reference, reference, labels, real, classifier)
            add(Result(name, "float", "", math.inf, math.inf, megabytes=checkpoint_megabytes(model), **figures))
            progress.advance(task)
            # One model is enough to show the effect of the choice of layers.
            for recipe, layers in [*jobs, *(papers_setting if name == "plain" else [])]:
                if layers not in calibrated:
                    progress.update(task, description=f"{name}: calibration")
                    calibrated[layers] = Calibrated(pipe, model, layers)
                progress.update(task, description=f"{name}: {recipe}" + (" (all layers)" if layers == "all" else ""))
                quantized, seconds = calibrated[layers].quantize(quick(make_recipe(recipe, layers)))
                with transformer_of(pipe, quantized):
                    images = generate(pipe, labels, seed=SEED)
                sqnr = noise_sqnr(quantized, noise, calls)
                add(
                    Result(
                        name,
                        recipe,
                        layers,
                        sum(sqnr) / len(sqnr),
                        min(sqnr),
                        megabytes=checkpoint_megabytes(quantized),
                        seconds=seconds,
                        **judge(images, reference, labels, real, classifier),
                    )
                )
                if recipe.startswith(PICTURED):
                    shown[name][recipe if layers == "default" else f"{recipe}, all layers"] = images[:SHOWN]
                if name == "planted" and recipe == "ptq4dit-w8a8" and layers == "default":
                    draw_salience(calibrated[layers].statistics, quantized.plan, BLOCK, out / "salience.png")
                progress.advance(task)
    draw_samples(shown, out / "samples.png")
    (out / "results.json").write_text(json.dumps([result.to_json() for result in results], indent=1) + "\n")
    return results


_COLUMNS: tuple[tuple[str, str, Callable[[Result], str]], ...] = (
    ("model", "<7", lambda result: result.model),
    ("recipe", "<24", lambda result: result.recipe),
    ("layers", "<7", lambda result: result.layers),
    ("SQNR mean dB", ">12", lambda result: _decibels(result.sqnr_db)),
    ("worst step dB", ">13", lambda result: _decibels(result.worst_db)),
    ("PSNR dB", ">7", lambda result: _decibels(result.psnr_db)),
    ("Fréchet", ">7", lambda result: f"{result.frechet:.3f}"),
    ("read as asked", ">13", lambda result: f"{100 * result.accuracy:.1f}%"),
    ("MB", ">5", lambda result: f"{result.megabytes:.2f}"),
    ("s", ">4", lambda result: f"{result.seconds:.0f}" if result.seconds else ""),
)
"""Title, alignment with width, and content of each column of the table."""

HEADER = "  ".join(f"{title:{form}}" for title, form, _ in _COLUMNS)


def row(result: Result) -> str:
    """One result as a line of the table."""
    return "  ".join(f"{content(result):{form}}" for _, form, content in _COLUMNS).rstrip()


def _decibels(value: float) -> str:
    """A dash where float is compared with itself."""
    return "-" if math.isinf(value) else f"{value:.1f}"


if __name__ == "__main__":
    main()
