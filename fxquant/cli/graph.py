"""The command ``fxquant graph``."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from fxquant.cli.app import Block, Debug, Folder, Graph, Layer, app
from fxquant.cli.output import err, print_plain, quiet, status
from fxquant.cli.report import check_is_folder


class Format(StrEnum):
    """How a graph is written."""

    text = "text"
    dot = "dot"
    json = "json"
    networkx = "networkx"
    model_explorer = "model-explorer"
    svg = "svg"
    png = "png"
    pdf = "pdf"


_PICTURES = (Format.svg, Format.png, Format.pdf)


_GRAPH_EXAMPLES = """[bold]Examples[/]

  fxquant graph dit-w4a8 --layer transformer_blocks.3.attn1.to_q

  fxquant graph dit-w4a8 --block 3 --after balance-channels --format svg -o block.svg

  fxquant graph dit-w4a8 --format model-explorer -o dit.json
"""


@app.command(epilog=_GRAPH_EXAMPLES, no_args_is_help=True)
def graph(
    folder: Folder,
    block: Block = None,
    layer: Layer = None,
    after: Annotated[
        str | None, typer.Option(help="Step: captured, a pass, or lower. By default the last one.")
    ] = None,
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            "-f",
            help="dot: text for Graphviz; networkx: node-link JSON; model-explorer: JSON for Model Explorer; svg, png, "
            "pdf: a picture that Graphviz draws.",
        ),
    ] = Format.text,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write, in place of the terminal.")] = None,
    number: Graph = 0,
    debug: Debug = False,
) -> None:
    """Print a graph or a part of it after any pass: as text, for Graphviz, networkx or Model Explorer, or draw it."""
    with quiet(), status("tracing and running the passes again"):
        check_is_folder(folder)
        import fxquant
        from fxquant.disk.whole_file import whole_file
        from fxquant.inspect.graph_formats import FORMATS, part_of
        from fxquant.inspect.plots import draw_graph

        picture = _picture(form, out)
        history = fxquant.rewrite_history(folder, graph=number, lower=after in (None, "lower"))
        nodes = part_of(history, after, block, layer)
        if picture is not None:
            draw_graph(nodes, picture)
        text = "" if picture is not None else FORMATS[form.value](nodes)
    if out is not None:
        if picture is None:
            with whole_file(out) as written:
                written.write_text(text, encoding="utf-8")
        err.print(Text(f"written to {out}"))
    elif form is Format.text:
        print_plain(text.removesuffix("\n"))
    else:
        sys.stdout.write(text)


def _picture(form: Format, out: Path | None) -> Path | None:
    """The file of a picture; None if the format is text.

    Raises:
        ConfigurationError: If there is no file for the picture, or its suffix is that of another format.
    """
    from fxquant.errors import ConfigurationError

    if form not in _PICTURES:
        return None
    if out is None:
        raise ConfigurationError(f"a picture is written to a file; name it: --out graph.{form.value}")
    if out.suffix.lower() != f".{form.value}":
        raise ConfigurationError(f"{out} does not end in .{form.value}; name a file that does, or change --format")
    return out
