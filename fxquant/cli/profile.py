"""The command ``fxquant profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant.cli.app import Debug, Device, Folder, app
from fxquant.cli.completion import backends
from fxquant.cli.output import print_json, print_plain, quiet, status
from fxquant.cli.report import check_is_folder

_PROFILE_EXAMPLES = """[bold]Examples[/]

  fxquant profile dit-w8a8 --backend native

  fxquant profile dit-w8a8 --batch 8 --compile --top 40

  fxquant profile dit-w8a8 --json | jq '.rows[] | select(.is_slower) | .name'
"""


@app.command(epilog=_PROFILE_EXAMPLES, no_args_is_help=True)
def profile(
    folder: Folder,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend", "-b", autocompletion=backends, help="Backend; by default the one it was quantized for."
        ),
    ] = None,
    device: Device = "cpu",
    batch: Annotated[
        int | None, typer.Option(help="Samples per call; 2 by default if the model leaves it open.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured runs of each model, alternating.")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of torch threads; unchanged by default.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Time whole calls under torch.compile too, which takes a minute or more.")
    ] = False,
    against_float: Annotated[
        bool, typer.Option("--float/--no-float", help="Also run the float architecture, with random weights.")
    ] = True,
    top: Annotated[int, typer.Option(min=1, help="Number of rows to show, slowest first.")] = 20,
    every: Annotated[bool, typer.Option("--all", help="One row per layer, repeated blocks too.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Also write the time of each op as a Chrome trace.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that was measured as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Measure the time layer by layer, compared with float and with the peaks of the machine.

    Warns of layers that are slower than in float or run a fallback. No weights of the float model are needed.
    """
    with quiet(), status("reading and measuring"):
        check_is_folder(folder)
        import fxquant

        found = fxquant.profile(
            folder,
            backend=backend,
            device=device,
            batch=batch,
            rounds=rounds,
            threads=threads,
            compiled=compiled,
            against_float=against_float,
        )
    if trace is not None:
        from fxquant.inspect.trace_events import save_trace, trace_of_profile

        save_trace(trace_of_profile(found), trace)
    if as_json:
        print_json(found.to_json())
    else:
        print_plain(found.table(top=top, every=every))
