"""The command ``fxquant diff``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant.cli.app import AsJson, Block, Debug, Graph, Layer, app
from fxquant.cli.completion import passes
from fxquant.cli.output import print_json, print_plain, quiet, status

_DIFF_EXAMPLES = """[bold]Examples[/]

  fxquant diff dit-w4a8 dit-w8a8

  fxquant diff dit-w4a8 --pass absorb-affines --block 3

  fxquant diff ptq4dit-w4a8 htg-w4a8
"""


@app.command(epilog=_DIFF_EXAMPLES, no_args_is_help=True)
def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="Folder of a quantized model or plan; or a recipe.")],
    right: Annotated[
        str | None, typer.Argument(metavar="B", help="The same; left out to compare a graph before and after a pass.")
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(
            "--pass",
            autocompletion=passes,
            help="Compare the graph before and after this pass, or both graphs after it.",
        ),
    ] = None,
    block: Block = None,
    layer: Layer = None,
    graph: Graph = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare two quantized models, plans or recipes; or a graph before and after a pass.

    Layers are aligned by name, nodes by what they do. Shows nodes added, removed and rewired, and which pass scaled
    which tensor by how much.
    """
    with quiet(), status("tracing and running the passes again"):
        import fxquant

        sides = [Path(side) if Path(side).is_dir() else side for side in (left, right) if side is not None]
        found = fxquant.diff(sides[0], *sides[1:], step=step, block=block, layer=layer, graph=graph)
    if as_json:
        print_json(found.to_json())
    else:
        print_plain(str(found))
