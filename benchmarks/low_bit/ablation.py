"""Each part of the recipes that choose, switched off alone: what it is worth, and on which timesteps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from benchmarks.low_bit.measure import Measured, Results
from fxquant.inspect.plots import for_papers, new_figure
from fxquant.pipeline.recipes import Recipe, make_recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRECISIONS = ("w8a8", "w4a8", "w4a4")
WHOLE = "all parts"

_CHOOSE = "choose-variants"
_NEVER = 1e6  # dB that a range per token would have to gain.


def _without(*passes: str) -> Callable[[Recipe], Recipe]:
    def change(recipe: Recipe) -> Recipe:
        return Recipe(recipe.prepare, tuple(step for step in recipe.convert if step.name not in passes))

    return change


def _nearest(recipe: Recipe) -> Recipe:
    return recipe.with_options(_CHOOSE, rounding="nearest").with_options("quantize-linears", rounding="nearest")


PARTS: dict[str, Callable[[Recipe], Recipe]] = {
    "balancing": _without("balance-channels", "absorb-affines"),
    "rotation": _without("rotate-channels"),
    "branch": _without("split-low-rank"),
    "bins": lambda recipe: recipe.with_options(_CHOOSE, bins=1),
    "clipping": lambda recipe: recipe.with_options(_CHOOSE, clip=False),
    "range per token": lambda recipe: recipe.with_options(_CHOOSE, gain=_NEVER),
    "timestep weights": _without("weigh-timesteps"),
    "bits per bin": _without("bin-bits"),
    "GPTQ": _nearest,
}
"""Parts that recipes may have, and how a recipe is changed to have all but one."""


def variants(precision: str) -> dict[str, Recipe]:
    """The recipe that chooses at a precision, and it without each part that it has."""
    whole = make_recipe(f"auto-{precision}")
    found = {WHOLE: whole}
    for part, change in PARTS.items():
        if (changed := change(whole)) != whole:
            found[f"without {part}"] = changed
    return found


def jobs(subjects: Sequence[str]) -> list[tuple[str, Recipe]]:
    """All measurements of the ablation."""
    return [(name, recipe) for name in subjects for one in PRECISIONS for recipe in variants(one).values()]


def text(results: Results, subjects: Sequence[str]) -> str:
    """One table per model as Markdown: mean and worst step, and the mean over thirds of the timesteps."""
    return "\n\n".join(_table(results, name) for name in subjects)


def _table(results: Results, subject: str) -> str:
    rows = []
    for precision in PRECISIONS:
        for number, (name, recipe) in enumerate(variants(precision).items()):
            found = results.of(subject, recipe)
            cells = [""] * 5 if found is None else [f"{x:.1f}" for x in (found.mean, found.worst, *found.thirds)]
            rows.append([precision.upper() if not number else "", name, *cells])
    headers = [subject, "", "mean dB", "worst step", "first third", "middle", "last third"]
    return str(tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=["left"] * 2 + ["right"] * 5))


def draw(results: Results, subject: str, path: Path) -> None:
    """Draw the SQNR over the timesteps, with all parts and without each one.

    Raises:
        ConfigurationError: The suffix of the path is not that of a picture.
        WriteError: The picture cannot be written.
    """
    from fxquant.inspect.plots import save_figure

    found = {one: {name: results.of(subject, recipe) for name, recipe in variants(one).items()} for one in PRECISIONS}
    save_figure(_figure(found, subject), path)


@for_papers
def _figure(found: dict[str, dict[str, Measured | None]], subject: str) -> Figure:
    figure, axes = new_figure(8.4, 3.0, 1, len(PRECISIONS))
    colours = {f"without {part}": f"C{number}" for number, part in enumerate(PARTS)} | {WHOLE: "black"}
    seen = {}
    for axis, (precision, curves) in zip(axes[0], found.items(), strict=True):
        for name, one in curves.items():
            if one is not None:
                width = 1.6 if name == WHOLE else 0.9
                (seen[name],) = axis.plot(range(1, len(one.steps) + 1), one.steps, color=colours[name], linewidth=width)
        axis.set(title=f"auto-{precision}, {subject}", xlabel="step of the sampler: from noise to image")
    axes[0][0].set_ylabel("SQNR in dB")
    order = [name for name in (WHOLE, *(f"without {part}" for part in PARTS)) if name in seen]
    figure.legend([seen[name] for name in order], order, loc="outside lower center", ncols=4, frameon=False)
    return figure
