"""Recipes in every number format, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from benchmarks.low_bit.measure import Measured, Results
from fxquant.pipeline.recipes import Recipe, make_recipe

RECIPES = (
    "rtn", "smoothquant", "ptq4dit-gptq", "quarot-gptq", "svdquant-gptq", "svdquant-rotated-gptq", "auto",
)  # fmt: skip

INTEGERS = {"W8A8": "w8a8", "W4A8": "w4a8", "W4A4": "w4a4"}
FORMATS = {
    "fp8": "wfp8afp8", "mxfp8": "wmxfp8amxfp8", "mxfp4": "wmxfp4amxfp4", "nvfp4": "wnvfp4anvfp4",
    "int4, 32": "w4a4-g32", "int4, 16": "w4a4-g16",
}  # fmt: skip
"""Columns and their precisions. Integers in groups have groups of weights; a range per token as formats of blocks."""


def recipe_of(name: str, precision: str) -> Recipe:
    """The recipe of a row and a column. Integers in groups find the ranges of inputs at run time, token by token.

    Formats with blocks find their scales at run time, so static ranges would be no match for them.
    """
    if "-g" not in precision or name == "auto":
        return make_recipe(f"{name}-{precision}")
    method, gptq, _ = name.partition("-gptq")
    return make_recipe(f"{method}-dynamic{gptq}-{precision}")


def jobs(subjects: Sequence[str]) -> list[tuple[str, Recipe]]:
    """All measurements of the tables."""
    columns = (*INTEGERS.values(), *FORMATS.values())
    return [(subject, recipe_of(name, column)) for subject in subjects for name in RECIPES for column in columns]


def text(results: Results, subjects: Sequence[str]) -> str:
    """The tables as Markdown: integers, formats, and sizes."""
    parts = []
    for columns in (INTEGERS, FORMATS):
        rows = []
        for subject in subjects:
            for number, name in enumerate(RECIPES):
                cells = [_cell(results.of(subject, recipe_of(name, column))) for column in columns.values()]
                rows.append([subject if not number else "", f"`{name}`", *cells])
        parts.append(_table(rows, ["model", "recipe", *columns]))
    rows = []
    for name in RECIPES:
        every = [results.of(subjects[0], recipe_of(name, column)) for column in (*INTEGERS.values(), *FORMATS.values())]
        rows.append([f"`{name}`", *(f"{one.megabytes:.2f}" if one and one.steps else "" for one in every)])
    parts.append(_table(rows, ["MB", *INTEGERS, *FORMATS]))
    return "\n\n".join(parts)


def _cell(found: Measured | None) -> str:
    """Mean and worst step; empty if it was not measured, a dash if the recipe refuses the model."""
    if found is None:
        return ""
    return f"{found.mean:.1f} / {found.worst:.1f}" if found.steps else "-"


def _table(rows: list[list[str]], headers: list[str]) -> str:
    align = ["left" if title in ("model", "recipe", "MB") else "right" for title in headers]
    return str(tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align))
