"""The command ``fxquant inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant.cli.app import Debug, Graph, app
from fxquant.cli.output import print_json, print_plain, quiet, status
from fxquant.cli.report import check_is_folder

_INSPECT_EXAMPLES = """[bold]Examples[/]

  fxquant inspect dit-w4a8

  fxquant inspect dit-w4a8 --json | jq '.steps[] | {name, seconds, edits, ops}'
"""


@app.command(epilog=_INSPECT_EXAMPLES, no_args_is_help=True)
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a quantized pipeline or checkpoint.")],
    graph: Graph = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print every node after every pass as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show the stages and passes that made the graph: time, edits, and nodes and tensors changed.

    The passes run again, without weights, on the graph of the architecture.
    """
    with quiet(), status("tracing and running the passes again"):
        check_is_folder(folder)
        import fxquant

        found = fxquant.rewrite_history(folder, graph=graph)
    if as_json:
        print_json(found.to_json())
    else:
        print_plain(found.table())
