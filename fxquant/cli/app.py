"""The command line application: error handling, and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fxquant import __version__
from fxquant.cli.output import err, out, print_error
from fxquant.cli.ranks import Terminated, on_ranks, ranks
from fxquant.errors import FxquantError, RankError

_ERROR = 2
_UsageError: Any = typer.BadParameter.__base__  # Typer has a copy of click, or uses click, by its version.
_INTERRUPTED = 130  # The exit code that shells report after Ctrl-C.


class _Group(TyperGroup):
    """Prints errors that fxquant raises on purpose as one message, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        with on_ranks() as ranks:
            try:
                return self._run(ctx)
            except Terminated:
                error = ranks.terminated()
                if not ranks.separate and ranks.failed(error):
                    print_error(str(error))
                raise
            except (typer.Exit, typer.Abort):
                raise
            except _UsageError:
                if ranks.first or ranks.separate:
                    raise
                raise typer.Exit(_ERROR) from None  # The first process prints it.
            except BaseException as error:  # Printed by Python, or by click.
                ranks.failed(error)
                raise

    def _run(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FxquantError as error:
            if _debugging(ctx):
                raise
            notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
            if ranks().failed(error):
                print_error(f"{ranks().named(error)}{notes}")
            raise typer.Exit(_ERROR) from None
        except BrokenPipeError:  # For example from `fxquant report | head`; click handles it.
            raise
        except OSError as error:
            if _debugging(ctx) or error.filename is None:
                raise
            if ranks().failed(error):
                print_error(f"{error.filename} cannot be read or written: {error.strerror}")
            raise typer.Exit(_ERROR) from None
        except KeyboardInterrupt:
            ranks().failed(RankError("the processes were interrupted"))
            err.print("interrupted; no folder or file was partly written", style="red")
            raise typer.Exit(_INTERRUPTED) from None


def _debugging(ctx: Any) -> bool:
    return bool(ctx.find_root().meta.get("fxquant.debug"))


app = typer.Typer(
    cls=_Group,
    name="fxquant",
    help="Quantize diffusion transformers: a graph-rewriting compiler over torch.fx.",
    epilog="Begin with:  [bold]fxquant quantize facebook/DiT-XL-2-256 --out dit-w8a8[/]",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _remember_debug(ctx: typer.Context, value: bool) -> bool:
    if value:
        ctx.find_root().meta["fxquant.debug"] = True
    return value


def _show_version(value: bool) -> None:
    if value:
        out.print(f"fxquant {__version__}", highlight=False)
        raise typer.Exit


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a quantized pipeline or checkpoint.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_remember_debug, is_eager=True, help="Show the traceback of an error.")
]
Steps = Annotated[int, typer.Option(min=1, max=100_000, help="Denoising steps.", rich_help_panel="Sampling")]
Seed = Annotated[int, typer.Option(help="Seed of the initial noise.", rich_help_panel="Sampling")]
Guidance = Annotated[
    float | None,
    typer.Option(help="Guidance scale; by default that of the pipeline.", rich_help_panel="Sampling"),
]
Prompts = Annotated[
    Path | None,
    typer.Option(help="Text file with one prompt per line, for text pipelines.", rich_help_panel="Sampling"),
]
Height = Annotated[int | None, typer.Option(min=1, max=65_536, help="Height in pixels.", rich_help_panel="Sampling")]
Width = Annotated[int | None, typer.Option(min=1, max=65_536, help="Width in pixels.", rich_help_panel="Sampling")]
Frames = Annotated[
    int | None,
    typer.Option("--num-frames", min=1, max=65_536, help="Frames of a clip.", rich_help_panel="Sampling"),
]
Variant = Annotated[
    str | None, typer.Option(help="Variant of the files of weights, such as fp16, if the folder has no others.")
]
Graph = Annotated[
    int, typer.Option("--graph", min=0, help="Number of the graph, if calibration captured several kinds of call.")
]
Block = Annotated[str | None, typer.Option("--block", help="Only this block: its number, or its path.")]
Layer = Annotated[str | None, typer.Option("--layer", help="Only this layer, or the module of this path.")]
Device = Annotated[str, typer.Option("--device", "-d", help="Device to run on, such as cpu, cuda or cuda:1.")]


@app.callback()
def _main(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Debug = False,
) -> None:
    if not ranks().admit(ctx.invoked_subcommand):
        raise typer.Exit
