"""The command ``fxquant generate``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.text import Text

from fxquant.cli.app import Debug, Device, Frames, Guidance, Height, Seed, Steps, Variant, Width, app
from fxquant.cli.output import err, progress_bars, quiet, status
from fxquant.cli.running import blaming_the_pipeline, is_file, kept_aside, open_pipeline, read_prompts, sizes_of
from fxquant.errors import ConfigurationError, WriteError

_IMAGES = 10_000  # The most images that one command makes.
_MILLISECONDS = 100  # Time of one frame of a clip.

_GENERATE_EXAMPLES = """[bold]Examples[/]

  fxquant generate dit-w4a8 --labels 207,360,387 --out grid.png

  fxquant generate dit-w4a8 --labels 0-9 --steps 50 --guidance 4 --out images/

  fxquant generate pixart-w8a8 --prompts "a red fox in the snow" --prompts "a harbour at dawn" --out grid.png
"""


@app.command(epilog=_GENERATE_EXAMPLES, no_args_is_help=True)
def generate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a pipeline, quantized or not.")],
    out_path: Annotated[
        Path, typer.Option("--out", "-o", help="An image file for a grid, or a folder for single images.")
    ],
    labels: Annotated[str | None, typer.Option("--labels", "-l", help="Classes, such as 1,2,3 or 0-9.")] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompts", "-p", help="A prompt, or a text file with one per line; repeatable."),
    ] = None,
    steps: Steps = 25,
    seed: Seed = 0,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    variant: Variant = None,
    columns: Annotated[int | None, typer.Option(min=1, help="Images per row of the grid.")] = None,
    device: Device = "cpu",
    allow_packages: Annotated[
        bool,
        typer.Option("--allow-packages", help="Load packages, compiled ahead of time: programs that run here."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Generate images with a pipeline, as one grid or as a folder of files; or clips, as animated images."""
    if (labels is None) == (not prompts):
        raise ConfigurationError("give either --labels, such as --labels 1,2,3, or --prompts")
    wanted = None if labels is None else read_labels(labels)
    lines = _all_prompts(prompts) if prompts else None
    _check_image_path(out_path)
    with quiet():
        with status("importing torch and diffusers"):
            from fxquant.calibration import pipeline_calls
        with status(f"reading {folder}"):
            pipe = open_pipeline(folder, device=device, trust_packages=allow_packages, variant=variant)
        with progress_bars() as progress:
            count = len(wanted or lines or ())
            task = progress.add_task(f"generate: {count} images", total=pipeline_calls.num_batches(count) * steps)
            with pipeline_calls.steps_watched(pipe, lambda: progress.advance(task)), blaming_the_pipeline(pipe):
                images = pipeline_calls.generate(
                    pipe,
                    steps=steps,
                    seed=seed,
                    guidance=guidance,
                    prompts=lines,
                    labels=wanted,
                    sizes=sizes_of(height, width, num_frames),
                )
    try:
        _write_images(images, out_path, columns)
    except (OSError, ValueError) as error:
        _rescue_images(images, out_path, error)
    made = "clip" if images and isinstance(images[0], list) else "image"
    err.print(Text(f"{len(images)} {made}{'s' if len(images) > 1 else ''} in {out_path}"))


def _rescue_images(images: Sequence[Any], path: Path, error: Exception) -> NoReturn:
    """Write images that cannot be written to their path to a temporary folder."""
    reason = getattr(error, "strerror", None) or error
    message = f"{path} cannot be written: {reason}"
    rescued = kept_aside(lambda place: _write_images(images, place, None))
    if rescued is None:
        raise WriteError(message) from error
    raise WriteError(f"{message}\nThe images are in {rescued}", kept=rescued) from error


def _check_image_path(path: Path) -> None:
    from PIL import Image

    from fxquant.disk.folders import check_writable

    kind = Image.registered_extensions().get(path.suffix.lower())
    if path.suffix and kind is None:
        raise ConfigurationError(
            f"{path.suffix} is not an image format; write --out grid.png, or a folder without a dot in its name"
        )
    if kind is not None:
        try:
            Image.new("RGB", (8, 8)).save(io.BytesIO(), kind)
        except (KeyError, OSError, ValueError) as error:
            raise ConfigurationError(f"{path.suffix} cannot hold such images ({error}); write --out grid.png") from None
    place = path.parent if path.suffix else path
    check_writable(place)
    if path.suffix and path.is_dir():
        raise ConfigurationError(f"{path} is a folder; give another name")
    if not path.suffix and path.is_file():
        raise ConfigurationError(f"{path} is a file; give a folder, or a name such as grid.png")
    held = next((name for name in _OURS if (place / name).exists()), None)
    if held is not None:
        raise ConfigurationError(f"{place} holds a model ({held}); give another folder for the images")


def _write_images(images: Sequence[Any], path: Path, columns: int | None) -> None:
    from PIL import Image

    clips = bool(images) and isinstance(images[0], list)
    if not path.suffix:
        path.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            _write_image(image, path / f"{number:03d}.{'gif' if clips else 'png'}")
        return
    if clips:
        if len(images) > 1:
            raise ValueError("one file holds one clip; give a folder, a name without a dot in it")
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_image(images[0], path)
        return
    across = min(columns or max(1, round(len(images) ** 0.5 + 0.49)), len(images))
    width, height = images[0].size
    grid = Image.new("RGB", (across * width, -(-len(images) // across) * height))
    for number, image in enumerate(images):
        grid.paste(image, (number % across * width, number // across * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_image(grid, path)


def _write_image(image: Any, path: Path) -> None:
    """Write an image or the frames of a clip, completely or not at all."""
    scratch = path.with_name(f".{path.stem}-partial{path.suffix}")
    try:
        if isinstance(image, list):
            image[0].save(scratch, save_all=True, append_images=image[1:], duration=_MILLISECONDS, loop=0)
        else:
            image.save(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def read_labels(text: str) -> list[int]:
    """The classes that a text such as ``1,2,3`` or ``0-9`` names.

    Raises:
        ConfigurationError: If it names none, or too many.
    """
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            named = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise ConfigurationError(f"--labels {text}: {part!r} is not a class number; write 1,2,3 or 0-9") from None
        count = len(labels) + max(0, named.stop - named.start)
        if count > _IMAGES:
            raise ConfigurationError(f"--labels {text} asks for {count} images; at most {_IMAGES} are made at once")
        labels += named
    if not labels:
        raise ConfigurationError(f"--labels {text} names no class; write 1,2,3 or 0-9")
    return labels


def _all_prompts(given: Sequence[str]) -> list[str]:
    return [line for entry in given for line in (read_prompts(Path(entry)) if is_file(entry) else [entry])]


_OURS = ("model_index.json", "plan.json", "package.json")  # In folders of pipelines, checkpoints and packages.
