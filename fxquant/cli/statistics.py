"""The commands ``fxquant statistics`` and ``fxquant merge-statistics``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxquant.cli.app import AsJson, Debug, app
from fxquant.cli.output import err, print_json, print_plain, quiet, status
from fxquant.errors import ConfigurationError, FxquantError

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


_MERGE_EXAMPLES = """[bold]Example[/]

  fxquant quantize ./my-dit --out first --seed 0 --keep-statistics 0.statistics

  fxquant quantize ./my-dit --out second --seed 1 --keep-statistics 1.statistics

  fxquant merge-statistics 0.statistics 1.statistics --out both.statistics
"""


@app.command("merge-statistics", epilog=_MERGE_EXAMPLES, no_args_is_help=True)
def merge_statistics(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What [bold]--keep-statistics[/] wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    debug: Debug = False,
) -> None:
    """Merge statistics of one model that were recorded separately, each with a seed of its own.

    The result serves [bold]fxquant quantize --statistics[/] as if one process had made all calls.
    """
    if len(files) < 2:
        raise ConfigurationError("one file has nothing to be merged with; name two or more")
    if out.is_dir():
        raise ConfigurationError(f"--out {out} is a folder; give the name of a file")
    if out.exists() and not overwrite:
        raise ConfigurationError(f"--out {out} exists; choose another name, or give --overwrite")
    with quiet(), status("merging"):
        import fxquant

        merged = fxquant.Statistics.load(files[0])
        for file in files[1:]:
            other = fxquant.Statistics.load(file)
            try:
                merged.merge(other)
            except FxquantError as error:
                error.add_note(f"while {file} was merged with {', '.join(map(str, files[: files.index(file)]))}")
                raise
        merged.save(out)
    err.print(f"{len(files)} files merged to {out}; see fxquant statistics {out}", highlight=False, markup=False)
