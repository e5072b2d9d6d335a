"""The command ``fxquant opt``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from fxquant.cli.app import Debug, app
from fxquant.cli.completion import passes as completed_passes
from fxquant.cli.output import err, print_json, print_plain, quiet, status
from fxquant.errors import ConfigurationError

_OPT_EXAMPLES = """[bold]Examples[/]

  fxquant quantize ./my-dit --out dit-w8a8 --dump dumps

  fxquant opt dumps/02-balance-channels.json --passes absorb-affines

  fxquant opt dumps/00-captured --passes 'remove-no-ops,assign-precision{precision=w4a8}' --notes
"""


@app.command(epilog=_OPT_EXAMPLES, no_args_is_help=True)
def opt(
    dump: Annotated[Path, typer.Argument(metavar="DUMP", help="A graph that --dump or a reproducer wrote.")],
    passes: Annotated[
        str,
        typer.Option("--passes", "-p", autocompletion=completed_passes, help="The passes to run, separated by commas."),
    ],
    plan: Annotated[
        Path | None, typer.Option(help="Folder of the plan; by default the one beside the dump, or an empty plan.")
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="File of calibration statistics; by default the one beside the dump.")
    ] = None,
    imports: Annotated[
        list[str] | None, typer.Option("--import", help="Module to import first, which registers passes or ops.")
    ] = None,
    notes: Annotated[bool, typer.Option("--notes", help="Show layers and passes behind each node.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the result as a dump of this path.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what each pass did, and the graph, as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Run passes on a graph in a file, and print the result: for reproducers and golden cases."""
    with quiet(), status("importing torch"):
        from fxquant.ir.dumps import Dump, dump_of, load_dump
        from fxquant.ir.printing import graph_text
        from fxquant.ir.stages import Stage, stage_named
        from fxquant.pipeline.backend import resolve_backend
        from fxquant.pipeline.dumps import write_dump
        from fxquant.pipeline.pipeline import Pipeline

        for module_name in imports or ():
            _import(module_name)
        if backend := Dump.read(dump).facts.get("backend"):
            resolve_backend(str(backend))  # Registers the ops of a lowered graph.
        pipeline = Pipeline.parse(passes)
        found, module = load_dump(dump)
        stage = stage_named(found.stage)
        context = _context(dump, plan, statistics)
        if stage is Stage.LOWERED and pipeline.passes:
            raise ConfigurationError(
                f"{dump} holds a lowered graph, on which passes do not work; take a dump from before the backend"
            )
        records = pipeline.run(module, context, stage) if pipeline.passes else []
        for record in records:
            err.print(Text(str(record)))
        text, stage = graph_text(module, notes=notes), pipeline.stage_after(stage)
        result = dump_of(module, stage, largest=None)
        if out is not None:
            write_dump(out, result, graph_text(module, notes=True), context.plan)
    if as_json:
        log = [{"pass": r.text, "seconds": r.seconds, "edits": r.edits, "ops": r.ops} for r in records]
        print_json({"stage": str(stage), "passes": log, "nodes": result.nodes})
    elif out is None:
        print_plain(text)
    else:
        err.print(Text(f"written to {out}.json"))


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:  # The module runs its own code, which may raise anything.
        raise ConfigurationError(
            f"--import {name}: it cannot be imported: {type(error).__name__}: {error}. Give the name of a module as "
            "import statements have it, such as my_package.my_pass"
        ) from error


def _context(dump: Path, plan: Path | None, statistics: Path | None) -> Any:
    """What the passes decide from: given files, those beside the dump, or nothing."""
    from fxquant.pipeline.dumps import PLAN_ENDING, STATISTICS_ENDING
    from fxquant.planning.context import PassContext
    from fxquant.planning.plan import Plan
    from fxquant.statistics.collection import Statistics

    stem = dump.name.removesuffix(".json").removesuffix(".txt").removesuffix(".safetensors")
    beside = dump.with_name(f"{stem}{PLAN_ENDING}"), dump.with_name(f"{stem}{STATISTICS_ENDING}")
    plan = plan or (beside[0] if beside[0].is_dir() else None)
    statistics = statistics or (beside[1] if beside[1].is_file() else None)
    made = Plan("", "", "timestep") if plan is None else Plan.load(plan)
    return PassContext(made, None if statistics is None else Statistics.load(statistics))
