"""What the commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from fxquant.errors import PortabilityWarning, QualityWarning, ResumeWarning, SpeedWarning

if TYPE_CHECKING:
    from rich.progress import Progress


LINE = 4000  # The most characters of a line that are printed.
out = Console()
err = Console(stderr=True)


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Print names with their descriptions: as a table on a terminal, else as one line per name."""
    if not out.is_terminal:  # One line per name, for grep.
        width = max((len(name) for name, _ in rows), default=0)
        print_plain("\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows))
        return
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", overflow="fold", max_width=44)
    table.add_column()
    for name, text in rows:
        table.add_row(Text(name), Text(text))
    out.print(table)


def print_json(data: Any) -> None:
    """Print data as JSON; infinity and NaN are not JSON and raise ValueError."""
    sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")


def print_plain(text: str) -> None:
    """Print text without folding lines: in a narrow terminal, a wide table is easier to read scrolled or piped."""
    from fxquant.text import printable

    sys.stdout.write(printable(text, LINE) + "\n")


def print_error(message: str) -> None:
    """Print an error on stderr."""
    from fxquant.text import printable

    err.print(Text.assemble(("error: ", "bold red"), (printable(message, LINE), "red")), soft_wrap=True)


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show what the command is doing, if stderr is a terminal."""
    if err.is_terminal:
        with err.status(Text(text)):
            yield
    else:
        yield


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Show progress bars, if stderr is a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        yield progress


def quiet_imports() -> None:
    """Hide what torchao, diffusers and transformers log when they are imported; call it before they are."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torchao", "diffusers", "torch.utils._pytree", "torch.utils.pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide messages of libraries that are meant for developers; fxquant's own warnings stay visible."""
    quiet_imports()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"fxquant(\.|$)")
        for category in (
            PortabilityWarning,
            QualityWarning,
            ResumeWarning,
            SpeedWarning,
        ):  # Located in the code of the caller.
            warnings.filterwarnings("default", category=category)
        warnings.showwarning = show_warning
        yield


def no_bars() -> None:
    """Disable the progress bars of diffusers and transformers, so that only those of fxquant are shown."""
    from diffusers.utils import is_transformers_available, logging

    logging.disable_progress_bar()
    if is_transformers_available():
        from transformers.utils import logging as of_transformers

        of_transformers.disable_progress_bar()


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning on stderr; replaces ``warnings.showwarning``."""
    from fxquant.text import printable

    err.print(Text.assemble(("warning: ", "bold yellow"), printable(str(message), LINE)), soft_wrap=True)
