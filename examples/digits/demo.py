"""The demo: quantize the digits pipeline with several recipes and measure the error of each.

``python -m examples.digits.demo --out out`` from the root of the repository writes ``samples.png``, ``salience.png``
and ``results.json``, and prints one table. It evaluates one of the quantized models as ``fxquant eval`` does, into
``evaluation.json`` and ``evaluation.png``. Two models are quantized: the trained one, and one that computes the same
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

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .compare import Result
from .pictures import draw_samples
from .rows import MODELS, QUICK, Job, Measured, measure_all

PRECISIONS = ("w8a8", "w4a8")
PLAIN = ("rtn", "smoothquant", "htg", "ptq4dit")
METHODS = {"w8a8": PLAIN, "w4a8": ("rtn", "smoothquant", "ptq4dit", "ptq4dit-gptq")}
"""Compared methods for each precision. 8 bits do not need GPTQ; HTG at 4 bits is in `--all`."""

EVERY_METHOD = (
    *("rtn", "dynamic", "single-step", "smoothquant", "smoothquant-search", "repq", "q-diffusion"),
    *("htg", "ptq4dit", "ptq4dit-dynamic", "ptq4dit-gptq", "ptq4dit-dynamic-gptq"),
)
"""Methods that ``--all`` compares."""

GROUPED = ("single-step",)
"""Methods whose weights are quantized in groups of 64 input channels, as in their paper."""

IMAGES = 70
SHOWN_WITH_ALL_LAYERS = ("w4a8",)
"""Precisions at which ``ptq4dit`` is also shown with the papers' choice of layers; ``--all`` shows it at each."""

PICTURED = ("rtn", "smoothquant-w", "htg", "ptq4dit")


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
    methods, all_layers = METHODS, SHOWN_WITH_ALL_LAYERS
    if options.all or options.methods:
        all_layers = PRECISIONS
        methods = dict.fromkeys(PRECISIONS, EVERY_METHOD if options.all else tuple(options.methods.split(",")))
    console = Console()
    console.print(HEADER, highlight=False, soft_wrap=True)
    run(options.out, options.images, methods, all_layers, console)
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


def jobs_of(model: str, methods: Mapping[str, Sequence[str]], all_layers: Sequence[str]) -> list[Job]:
    """What is measured of a model: the float model, each method at each precision, and the papers' choice of layers.

    Args:
        model: ``plain`` or ``planted``.
        methods: Methods to compare, by precision.
        all_layers: Precisions at which ``ptq4dit`` also quantizes all layers; of the plain model only.
    """
    jobs = [Job(model, "float", "")]
    jobs += [
        Job(model, recipe_name(name, precision), "default") for precision in methods for name in methods[precision]
    ]
    if model == "plain":  # One model is enough to show the effect of the choice of layers.
        jobs += [Job(model, f"ptq4dit-{precision}", "all") for precision in all_layers]
    return jobs


def run(
    out: Path,
    count: int,
    methods: Mapping[str, Sequence[str]] = METHODS,
    all_layers: Sequence[str] = SHOWN_WITH_ALL_LAYERS,
    console: Console | None = None,
) -> list[Result]:
    """Quantize both models with all recipes, each model in a process; write pictures and figures into ``out``.

    Args:
        out: Folder for pictures and figures.
        count: Digits to generate with each model.
        methods: Methods to compare, by precision.
        all_layers: As for :func:`jobs_of`.
        console: Prints each row of the table as soon as it and those above it are measured; nothing if None.
    """
    jobs = {model: jobs_of(model, methods, all_layers) for model in MODELS}
    order = sorted((job for each in jobs.values() for job in each), key=lambda job: jobs[job.model].index(job))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = console or Console(quiet=True)
    measured: dict[Job, Measured] = {}
    waiting = list(order)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(order))
        for job, found in measure_all(jobs, count, out):
            measured[job] = found
            while waiting and waiting[0] in measured:
                console.print(row(measured[waiting.pop(0)].result), highlight=False, soft_wrap=True)
            progress.advance(task)
    shown = {
        model: {job.title: measured[job].images for job in each if job.recipe.startswith(("float", *PICTURED))}
        for model, each in jobs.items()
    }
    draw_samples(shown, out / "samples.png")
    results = [measured[job].result for job in order]
    for job, found in measured.items():
        if found.evaluation is not None:
            console.print(
                f"\nfxquant eval of {job.recipe} ({job.model}); the digit classifier takes the place of Inception:\n"
                f"{found.evaluation.table()}",
                highlight=False,
                soft_wrap=True,
            )
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
