"""The command ``fxquant export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant.cli.app import Debug, Folder, app
from fxquant.cli.output import err, print_plain, quiet, status
from fxquant.errors import ConfigurationError

_EXPORT_EXAMPLES = """[bold]Examples[/]

  fxquant export dit-w8a8 dit-w8a8-compiled --aot --backend native

  fxquant generate dit-w8a8-compiled --labels 207,360,387 --allow-packages --out grid.png
"""


@app.command(epilog=_EXPORT_EXAMPLES, no_args_is_help=True)
def export(
    folder: Folder,
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the compiled model to.")],
    aot: Annotated[
        bool,
        typer.Option("--aot", help="Compile ahead of time, with AOTInductor. Required: no other form exists."),
    ] = False,
    backend: Annotated[
        str | None, typer.Option("--backend", "-b", help="Backend; by default the one it was quantized for.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")] = False,
    debug: Debug = False,
) -> None:
    """Compile a quantized model for this machine; it then loads in a second and runs without tracing.

    The result is a program, which runs when loaded: load only programs from people you trust. Needs a C++ compiler.
    """
    if not aot:
        raise ConfigurationError("export can only compile ahead of time; pass --aot")
    with quiet(), status("importing torch"):
        from fxquant.storage.aot.export import export_folder

        def progress(number: int, total: int, seconds: float | None) -> None:
            if seconds is not None:
                err.print(f"graph {number + 1} of {total}: compiled in {seconds:.0f} s", highlight=False)

    with quiet(), status("compiling, which takes minutes"):
        found = export_folder(folder, out_folder, backend=backend, overwrite=overwrite, progress=progress)
    print_plain(f"compiled in {sum(found.seconds):.0f} s, {found.bytes / 1e6:.1f} MB, written to {out_folder}")
