"""Open and run a pipeline from a command: its errors, prompts, and saving results that must not be lost."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fxquant.cli.output import no_bars
from fxquant.errors import (
    AlreadyCompiledError,
    CalibrationError,
    CheckpointError,
    ConfigurationError,
    FxquantError,
    WriteError,
)


def open_pipeline(model: str, **options: Any) -> Any:
    """Load a pipeline, without the progress bars of diffusers; options as for ``fxquant.load_pipeline``."""
    from fxquant.storage.diffusers_io import load_pipeline

    no_bars()
    pipe = load_pipeline(model, **{name: value for name, value in options.items() if value is not None})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sizes_of(height: int | None, width: int | None, num_frames: int | None) -> dict[str, int]:
    """The sizes that were given, by the names that pipelines use."""
    given = {"height": height, "width": width, "num_frames": num_frames}
    return {name: size for name, size in given.items() if size is not None}


@contextmanager
def blaming_the_pipeline(pipe: Any) -> Iterator[None]:
    """Report that the pipeline failed, not the user's callable: on the command line, the user did not write one.

    Raises:
        CalibrationError: If the pipeline failed while it ran to calibrate.
        FxquantError: If it failed otherwise.
    """
    try:
        yield
    except CalibrationError as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, FxquantError):
            raise
        raise CalibrationError(_failure(pipe, "ran to calibrate", cause)) from error
    except FxquantError:
        raise
    except Exception as error:
        raise FxquantError(_failure(pipe, "ran", error)) from error


def _failure(pipe: Any, doing: str, error: BaseException) -> str:
    reason = f"{type(error).__name__}: {error}".rstrip(".")
    return f"{type(pipe).__name__} failed while it {doing}: {reason}. The option --debug shows where"


def kept_aside(write: Callable[[Path], None]) -> Path | None:
    """Write a result to a temporary folder and return the folder; None if this fails too."""
    try:
        place = Path(tempfile.mkdtemp(prefix="fxquant-"))
    except OSError:
        return None
    try:
        write(place)
    except (CheckpointError, OSError):
        with suppress(OSError):  # Fails if a part of the result was written.
            place.rmdir()
        return None
    return place


def save_or_keep_aside(write: Callable[[Path], None], folder: Path, what: str) -> None:
    """Write a result to a folder. If that fails, write it to a temporary folder and name that, so that nothing is lost.

    Args:
        write: Writes the result to the folder that it gets.
        folder: The folder.
        what: The result in words, for the message.

    Raises:
        WriteError: If the folder cannot be written; the message names where the result is.
        CheckpointError: If it cannot be written anywhere, or what failed has kept the result itself.
    """
    try:
        write(folder)
    except CheckpointError as error:
        if getattr(error, "kept", None) is not None:
            raise
        name = folder.resolve().name
        place = kept_aside(lambda place: write(place / name))
        if place is None:
            raise
        rescued = place / name
        raise WriteError(f"{error}\nThe {what} is in {rescued}; move it where you want it", kept=rescued) from error


def is_file(text: str) -> bool:
    """Whether a prompt is the path of a file with prompts."""
    try:
        return Path(text).is_file()
    except OSError:  # A prompt may be too long for a path.
        return False


def read_prompts(path: Path) -> list[str]:
    """The lines of a prompt file that are not empty.

    Raises:
        ConfigurationError: If the file cannot be read or is empty.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--prompts {path} cannot be read: {error}") from None
    if not lines:
        raise ConfigurationError(f"--prompts {path} is empty; write one prompt per line")
    return lines


def refuse_quantized(folder: Path, names: Iterable[str]) -> None:
    """Refuse parts of a folder that are quantized, before their dtypes are compared with --dtype.

    Raises:
        AlreadyCompiledError: Names the part.
    """
    from fxquant.planning.plan import PLAN_FILE

    for name in names:
        if (folder / name / PLAN_FILE).is_file():
            raise AlreadyCompiledError(f"{folder / name} was made by fxquant; give the original float pipeline")


def check_alone(names: list[str], options: dict[str, Any]) -> None:
    """Refuse options that are about one part if there are several."""
    given = next((option for option, value in options.items() if value), None)
    if len(names) > 1 and given is not None:
        raise ConfigurationError(f"{given} is about one part; quantize {' and '.join(names)} one after the other")
