"""The command ``fxquant plot``."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxquant.cli.app import Debug, Folder, app
from fxquant.cli.output import print_plain, quiet, status
from fxquant.cli.report import check_is_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PLOT_EXAMPLES = """[bold]Examples[/]

  fxquant plot dit-w4a8 output -o output.svg

  fxquant plot dit-w4a8 salience --layer transformer_blocks.3.attn1.to_q --statistics dit.statistics -o salience.pdf

  fxquant plot dit-w4a8 block --layer transformer_blocks.3 --step quantize-linears -o block.png
"""


class Kind(enum.Enum):
    """What is drawn."""

    OUTPUT = "output"
    ERRORS = "errors"
    SALIENCE = "salience"
    TIMESTEPS = "timesteps"
    BLOCK = "block"


@app.command(epilog=_PLOT_EXAMPLES, no_args_is_help=True)
def plot(
    folder: Folder,
    kind: Annotated[
        Kind,
        typer.Argument(
            help="The picture: output error by timestep, errors by layer and timestep, salience of channels, groups of "
            "timesteps, or the nodes of a block before and after a pass."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file; its suffix is .png, .svg or .pdf.")],
    layer: Annotated[
        str | None, typer.Option("--layer", "-l", help="The layer, or for a block the path of its module.")
    ] = None,
    step: Annotated[str, typer.Option(help="For a block: the pass.")] = "quantize-linears",
    statistics: Annotated[
        Path | None, typer.Option(help="For salience: what [bold]--keep-statistics[/] wrote.", metavar="FILE")
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw a picture for a paper."""
    with quiet(), status("drawing"):
        check_is_folder(folder)
        from fxquant.inspect.plots import check_suffix, save_figure

        check_suffix(out)
        save_figure(_figure(folder, kind, layer, step, statistics), out)
    print_plain(f"wrote {out}")


def _figure(folder: Path, kind: Kind, layer: str | None, step: str, statistics: Path | None) -> Figure:
    from fxquant.errors import ConfigurationError
    from fxquant.inspect import plots
    from fxquant.inspect.history import rewrite_history
    from fxquant.inspect.page.errors import errors_data
    from fxquant.inspect.plans import checkpoint_folder
    from fxquant.inspect.salience import weight_salience
    from fxquant.planning.plan import Plan
    from fxquant.statistics.collection import Statistics

    if kind is Kind.BLOCK:
        return plots.block_figure(rewrite_history(folder), layer or "", step)
    plan = Plan.load(checkpoint_folder(folder))
    if kind is Kind.OUTPUT:
        return plots.output_figure({folder.resolve().name: plan})
    if kind is Kind.ERRORS:
        if plan.attribution is None:
            raise ConfigurationError(f"the errors of the layers of {folder} were not measured; see fxquant attribute")
        found = errors_data(plan.attribution.to_json())
        return plots.errors_figure(found["layers"], found["timesteps"], found["tables"][0]["values"])
    if layer is None:
        raise ConfigurationError(f"a picture of {kind.value} shows one layer; name it with --layer")
    if kind is Kind.TIMESTEPS:
        return plots.timesteps_figure(plan, layer)
    if statistics is None:
        raise ConfigurationError("salience is seen in the statistics of the calibration; name their file: --statistics")
    return plots.salience_figure(plan, Statistics.load(statistics), layer, weight_salience(folder, plan))
