"""The command ``fxquant explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant.cli.app import AsJson, Debug, Graph, app
from fxquant.cli.output import print_json, print_plain, quiet, status
from fxquant.cli.report import check_is_folder

_EXPLAIN_EXAMPLES = """[bold]Examples[/]

  fxquant explain dit-w4a8 transformer_blocks.3.attn1.to_out.0

  fxquant explain dit-htg-w8a8 transformer_blocks.3.attn1.to_q --timestep 500
"""


@app.command(epilog=_EXPLAIN_EXAMPLES, no_args_is_help=True)
def explain(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a quantized pipeline, checkpoint or plan.")],
    layer: Annotated[str, typer.Argument(metavar="LAYER", help="Name of a layer or attention, as reports show it.")],
    timestep: Annotated[float | None, typer.Option("--timestep", "-t", help="Show the range at this timestep.")] = None,
    graph: Graph = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tell the whole story of one layer: every decision with its pass and reason, and what passes made of it."""
    with quiet(), status("tracing and running the passes again"):
        check_is_folder(folder)
        import fxquant

        found = fxquant.explain(folder, layer, timestep=timestep, graph=graph)
    if as_json:
        print_json(found.to_json())
    else:
        print_plain(str(found))
