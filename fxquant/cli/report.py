"""The command ``fxquant report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant.cli.app import AsJson, Debug, Folder, app
from fxquant.cli.output import print_json, print_plain, quiet, status

_REPORT_EXAMPLES = """[bold]Examples[/]

  fxquant report dit-w4a8

  fxquant report dit-w4a8 --json | jq .totals
"""


@app.command(epilog=_REPORT_EXAMPLES, no_args_is_help=True)
def report(
    folder: Folder,
    every: Annotated[bool, typer.Option("--all", help="One row per layer, repeated blocks too.")] = False,
    device: Annotated[
        str | None, typer.Option("--device", "-d", help="Device whose kernels are named, such as cuda.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what was done to every layer, what it costs and how much the output changed."""
    with quiet(), status("reading"):
        check_is_folder(folder)
        import fxquant

        found = fxquant.report(folder, device=device)
    if as_json:
        print_json(found.to_json())
    else:
        print_plain(found.table(every=every))


def check_is_folder(folder: Path) -> None:
    """Raise a CheckpointError if there is no such folder."""
    from fxquant.disk.folders import no_folder

    if not folder.is_dir():
        raise no_folder(folder)
