"""The command ``fxquant statistics``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant.cli.app import AsJson, Debug, app
from fxquant.cli.output import print_json, print_plain, quiet, status

_STATISTICS_EXAMPLES = """[bold]Examples[/]

  fxquant statistics dit.statistics

  fxquant statistics dit.statistics transformer_blocks.3.attn1.to_q
"""


@app.command(epilog=_STATISTICS_EXAMPLES, no_args_is_help=True)
def statistics(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What [bold]--keep-statistics[/] wrote.")],
    layer: Annotated[str | None, typer.Argument(metavar="[LAYER]", help="One observed value, by timestep.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what the observers recorded in calibration: ranges by layer and timestep."""
    with quiet(), status("reading"):
        import fxquant

        found = fxquant.Statistics.load(file)
    if as_json:
        print_json([row.to_json() for row in found.rows(layer)])
    else:
        print_plain(found.table(layer))
