"""The command ``fxquant list``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from fxquant.cli.app import Debug, app
from fxquant.cli.output import print_rows, quiet, status


class Kind(StrEnum):
    """What can be listed."""

    recipes = "recipes"
    passes = "passes"
    backends = "backends"
    rules = "rules"
    stages = "stages"
    formats = "formats"


@app.command("list", no_args_is_help=True)
def list_(
    kind: Annotated[Kind, typer.Argument(metavar="KIND", help="recipes, passes, backends, rules, stages or formats.")],
    debug: Debug = False,
) -> None:
    """List recipes, passes, backends, channel rules, stages of graphs or number formats, one line each."""
    with quiet(), status("importing torch"):
        listed = {"recipes": _recipes, "passes": _passes, "backends": _backends, "rules": _rules, "stages": _stages}
        rows = _formats() if kind is Kind.formats else listed[kind]()
    print_rows(rows)


def _recipes() -> list[tuple[str, str]]:
    from fxquant.pipeline.recipes import DYNAMIC, RECIPES, ROUNDINGS

    plain = [(f"{name}-w<bits>a<bits>", _described(RECIPES, name, _summary)) for name in RECIPES]
    by_token = f"<recipe>-{DYNAMIC}-w<bits>a<bits>", "every token that a linear reads gets its range at run time"
    return [*plain, by_token, *((f"<recipe>-{name}-w<bits>a<bits>", said) for name, said in ROUNDINGS.items())]


def _passes() -> list[tuple[str, str]]:
    from fxquant.pipeline.pipeline import PASSES

    return [(name, _described(PASSES, name, lambda step: f"[{step.tier.value}] {_summary(step)}")) for name in PASSES]


def _backends() -> list[tuple[str, str]]:
    from fxquant.pipeline.backend import BACKENDS, options_of

    rows = []
    for name in BACKENDS:
        try:
            options = ", ".join(sorted(options_of(name)))
            rows.append((name, _summary(BACKENDS[name]) + (f" Options: {options}." if options else "")))
        except ImportError as error:
            rows.append((name, f"not available: {error}"))
    return rows


def _rules() -> list[tuple[str, str]]:
    from fxquant.channels.rules import RULES
    from fxquant.ir.names import op_name

    ops: dict[Any, list[str]] = {}
    for target, function in RULES.items():
        short = op_name(target).partition(".")[0]  # Rules of inputs and parameters have names as keys.
        names = ops.setdefault(function, [])
        if short not in names:
            names.append(short)
    return [(" ".join(names), _summary(function)) for function, names in ops.items()]


def _stages() -> list[tuple[str, str]]:
    from fxquant.ir.stages import SPECS, STAGES, in_order, is_own, neighbours

    failed = []
    for name in STAGES:
        try:
            STAGES[name]
        except ImportError as error:
            failed.append((name, f"not available: {error}"))
    rows = []
    for stage in in_order():
        spec = SPECS.get(stage)
        ops = "the ops of a backend" if spec is None else ", ".join(["ATen ops", *sorted({*spec.ops, *spec.others})])
        start, end = (None, None) if is_own(stage) else neighbours(stage)
        place = "" if start is None else f"after {start} and before {end}, of {stage.home}: "
        rows.append((str(stage), place + ops))
    return rows + failed


def _formats() -> list[tuple[str, str]]:
    from fxquant.numerics.formats import FORMATS, Format

    def describe(format: Format) -> str:
        scales = f"a scale per {format.block} channels" if format.block else "scales as the plan says"
        return f"{format.bits} bits, {scales}{'; weights only' if format.weights_only else ''}. {_summary(format)}"

    return [(name, _described(FORMATS, name, describe)) for name in FORMATS]


def _described(registry: Any, name: str, describe: Callable[[Any], str]) -> str:
    """What an object is; for that of a package that cannot be imported, why."""
    try:
        return describe(registry[name])
    except ImportError as error:
        return f"not available: {error}"


def _summary(item: Any) -> str:
    """First line of a docstring, including the prefixes "Barrier: ..." and "End: ..." of rules."""
    return (inspect.getdoc(item) or "").partition("\n")[0]
