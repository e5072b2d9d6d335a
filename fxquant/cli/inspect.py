"""The command ``fxquant inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant.cli.app import Debug, Folder, Graph, app
from fxquant.cli.output import print_json, print_plain, quiet, status
from fxquant.cli.report import check_is_folder
from fxquant.errors import ConfigurationError

_INSPECT_EXAMPLES = """[bold]Examples[/]

  fxquant inspect dit-w4a8

  fxquant inspect dit-w4a8 --json | jq '.steps[] | {name, seconds, edits, ops}'

  fxquant inspect dit-w4a8 --statistics dit.statistics -o dit-w4a8.html

  fxquant inspect dit-w4a8 --against dit-w8a8 -o both.html
"""


@app.command(epilog=_INSPECT_EXAMPLES, no_args_is_help=True)
def inspect(
    folder: Folder,
    graph: Graph = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write an HTML page instead, one file that loads nothing.", metavar="FILE"),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="For the page: a second checkpoint, shown beside the first.", metavar="DIR")
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="For the page: what [bold]--keep-statistics[/] wrote, for the salience of channels.", metavar="FILE"
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write the times of the passes as a Chrome trace instead.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every node after every pass as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show the stages and passes that made the graph: time, edits, and nodes and tensors changed.

    The passes run again, without weights, on the graph of the architecture. With --out, the page shows the same node by
    node, and what was decided about each layer.
    """
    if out is None and (against is not None or statistics is not None):
        raise ConfigurationError("--against and --statistics are for the page; name its file too: --out page.html")
    if (out is not None or trace is not None) and (as_json or graph):
        raise ConfigurationError(
            "--json and --graph are for the table on the terminal; a page shows the graphs of the first kinds of call. "
            "Leave them out, or leave out --out and --trace"
        )
    if out is not None or trace is not None:
        written = [path for path in (out, trace) if path is not None]
        _write(folder, out, against, statistics, trace)
        print_plain("\n".join(f"wrote {path}" for path in written))
        return
    with quiet(), status("tracing and running the passes again"):
        check_is_folder(folder)
        import fxquant

        found = fxquant.rewrite_history(folder, graph=graph)
    if as_json:
        print_json(found.to_json())
    else:
        print_plain(found.table())


def _write(folder: Path, out: Path | None, against: Path | None, statistics: Path | None, trace: Path | None) -> None:
    """Write the page and the trace, as far as they are wanted."""
    with quiet(), status("tracing and running the passes again"):
        for path in (folder, against):
            if path is not None:
                check_is_folder(path)
        import fxquant
        from fxquant.inspect.trace_events import save_trace, trace_of_passes

        if out is not None:
            recorded = None if statistics is None else fxquant.Statistics.load(statistics)
            fxquant.inspect_page(folder, out, against=against, statistics=recorded)
        if trace is not None:
            save_trace(trace_of_passes(fxquant.report(folder).passes), trace)
