"""The command line: quantize a pipeline, generate with it, report on it, profile it, list what there is.

Only what help needs is imported at the top; torch and diffusers wait until a command runs.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from fxquant import __version__
from fxquant.errors import (
    CalibrationError,
    CheckpointError,
    ConfigurationError,
    FxquantError,
    PortabilityWarning,
    QualityWarning,
    SpeedWarning,
    WriteError,
)

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import fx

    from fxquant.pipeline.pipeline import Pass, PassRecord
    from fxquant.pipeline.recipes import Recipe

_ERROR = 2
_INTERRUPTED = 130  # What shells report after Ctrl-C.
_LINE = 4000  # Characters of a line that reach the terminal.
_IMAGES = 10_000  # At most, of one command.
_OURS = ("model_index.json", "plan.json", "package.json")  # Folders of pipelines, checkpoints and packages have these.

out = Console()
err = Console(stderr=True)


class _Group(TyperGroup):
    """Prints the errors that fxquant raises on purpose as one message, without traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FxquantError as error:
            if _debugging(ctx):
                raise
            notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
            _print_error(f"{error}{notes}")
            raise typer.Exit(_ERROR) from None
        except BrokenPipeError:  # Of `fxquant report | head`; click deals with it.
            raise
        except OSError as error:
            if _debugging(ctx) or error.filename is None:
                raise
            _print_error(f"{error.filename} cannot be read or written: {error.strerror}")
            raise typer.Exit(_ERROR) from None
        except KeyboardInterrupt:
            err.print("interrupted; no folder and no file is half written", style="red")
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


class Layers(StrEnum):
    """Which layers are quantized."""

    default = "default"
    blocks = "blocks"
    all = "all"


class Dtype(StrEnum):
    """What a pipeline computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Kind(StrEnum):
    """What can be listed."""

    recipes = "recipes"
    passes = "passes"
    backends = "backends"
    rules = "rules"


def _remember_debug(ctx: typer.Context, value: bool) -> bool:
    if value:
        ctx.find_root().meta["fxquant.debug"] = True
    return value


def _show_version(value: bool) -> None:
    if value:
        out.print(f"fxquant {__version__}", highlight=False)
        raise typer.Exit


Debug = Annotated[
    bool, typer.Option("--debug", callback=_remember_debug, is_eager=True, help="Show the traceback of an error.")
]
Steps = Annotated[int, typer.Option(min=1, max=100_000, help="Denoising steps.", rich_help_panel="Sampling")]
Seed = Annotated[int, typer.Option(help="Seed of the initial noise.", rich_help_panel="Sampling")]
Guidance = Annotated[
    float | None,
    typer.Option(help="Guidance scale; the pipeline's own if not given.", rich_help_panel="Sampling"),
]


Device = Annotated[str, typer.Option("--device", "-d", help="Where it runs, such as cpu, cuda or cuda:1.")]


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Debug = False,
) -> None:
    pass


# --- quantize -------------------------------------------------------------------------------------------------------

_QUANTIZE_EXAMPLES = """[bold]Examples[/]

  fxquant quantize facebook/DiT-XL-2-256 --recipe ptq4dit-gptq-w4a8 --out dit-w4a8

  fxquant quantize ./my-pixart --recipe rtn-w8a8 --prompts prompts.txt --out pixart-w8a8

  fxquant quantize ./my-dit --recipe ptq4dit-gptq-w4a8-g64 --samples 8 --steps 10 --out quick --overwrite
"""


@app.command(epilog=_QUANTIZE_EXAMPLES, no_args_is_help=True)
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of a diffusers pipeline.")],
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder that the quantized pipeline goes to.")],
    recipe: Annotated[
        str,
        typer.Option("--recipe", "-r", help="Recipe with precision, or its text; see [bold]fxquant list recipes[/]."),
    ] = "ptq4dit-w8a8",
    backend: Annotated[
        str,
        typer.Option(
            "--backend", "-b", help="What runs it, such as native{products=fp8}; see [bold]fxquant list backends[/]."
        ),
    ] = "fake-quant",
    layers: Annotated[
        Layers,
        typer.Option(help="default: blocks, and 8-bit weights in embedders; blocks: blocks alone; all: every layer."),
    ] = Layers.default,
    device: Device = "cpu",
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype in which everything computes that is not quantized.")
    ] = Dtype.float32,
    samples: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Samples to calibrate with.", rich_help_panel="Sampling")
    ] = 32,
    steps: Steps = 25,
    seed: Seed = 0,
    guidance: Guidance = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file with one prompt per line, for text pipelines.", rich_help_panel="Sampling"),
    ] = None,
    measure: Annotated[
        int, typer.Option(min=0, help="Calibration calls on which the output error is measured; 0 for none.")
    ] = 8,
    dump_graphs: Annotated[
        Path | None, typer.Option(help="Folder for the graph after every pass, as readable code.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder in which block reconstruction keeps finished blocks, to go on from after a stop."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Quantize the transformer of a pipeline and write the whole pipeline to a folder.

    The pipeline is run the way it is used, to calibrate: with its classes or with your prompts.
    """
    lines = None if prompts is None else _read_prompts(prompts)
    with _quiet(), _status("importing torch and diffusers"):
        import fxquant
        from fxquant.calibration.pipeline_calls import calibration_call, num_batches, steps_watched
        from fxquant.disk.files import dtype_of_name
        from fxquant.disk.folders import prepare
        from fxquant.pipeline.backend import resolve_backend
        from fxquant.pipeline.pipeline import DumpGraphs, Instrument
        from fxquant.pipeline.recipes import make_recipe
        from fxquant.runtime.devices import usable_device
        from fxquant.storage.diffusers_io import load_pipeline, refuse_existing, refuse_input

        # What can be refused is refused before anything takes time.
        refuse_input(out_folder, Path(model))
        prepare(out_folder.resolve(), lambda path: refuse_existing(path, overwrite))
        for option, folder in (("--dump-graphs", dump_graphs), ("--resume", resume)):
            _check_folder(option, folder, out_folder)
        chosen = make_recipe(recipe, layers.value)
        place = usable_device(device)
        runner = resolve_backend(backend).on(place)
        runner.check_device(place)
    with _quiet():
        with _status(f"reading {model}"):
            _no_bars()
            pipe = load_pipeline(model, device=place, torch_dtype=dtype_of_name(dtype.value))
            if not hasattr(pipe, "transformer"):
                raise ConfigurationError(f"{type(pipe).__name__} has no transformer; fxquant quantizes transformers")
            pipe.set_progress_bar_config(disable=True)
            calibrate = calibration_call(pipe, samples, steps, seed, guidance, lines)
        with _progress() as progress:
            watch = _PassProgress(progress, chosen)
            instruments: list[Instrument] = [watch]
            if dump_graphs is not None:
                instruments.append(DumpGraphs(dump_graphs))
            task = progress.add_task(f"calibrate: {samples} samples, {steps} steps", total=num_batches(samples) * steps)
            with steps_watched(pipe, lambda: progress.advance(task)), _blaming_the_pipeline(pipe):
                pipe.transformer = fxquant.compile(
                    pipe.transformer,
                    recipe=chosen,
                    backend=runner,
                    calibrate=calibrate,
                    layers=layers.value,
                    measure=measure,
                    instruments=instruments,
                    resume=resume,
                )
            watch.done()
        with _status(f"writing {out_folder}"):
            _save(pipe, out_folder, overwrite)
        _mention_float_transformers(pipe)
    found = fxquant.report(pipe.transformer)
    if as_json:
        _print_json(found.to_json())
    else:
        _print_plain(found.summary())
        err.print(Text(f"written to {out_folder}; see fxquant report {out_folder}"))


@contextmanager
def _blaming_the_pipeline(pipe: Any) -> Iterator[None]:
    """Say that the pipeline failed where it did; on the command line nobody wrote a callable that could be mended.

    Raises:
        CalibrationError: If it failed while it ran to calibrate.
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


def _check_folder(option: str, folder: Path | None, out_folder: Path) -> None:
    """Refuse a folder for other files that cannot be written, or that lies in what is replaced as a whole."""
    from fxquant.disk.folders import check_writable

    if folder is None:
        return
    if folder.resolve().is_relative_to(out_folder.resolve()):
        raise ConfigurationError(
            f"{option} {folder} lies in --out {out_folder}, which holds nothing but the pipeline; choose another folder"
        )
    check_writable(folder)


def _save(pipe: Any, folder: Path, overwrite: bool) -> None:
    """Write the pipeline; if that fails after all the work, write it to a temporary folder and say where."""
    from fxquant.storage.diffusers_io import save_pipeline

    try:
        save_pipeline(pipe, folder, overwrite=overwrite)
    except CheckpointError as error:
        if getattr(error, "kept", None) is not None:
            raise
        rescued = _kept_aside(lambda place: save_pipeline(pipe, place / folder.resolve().name))
        if rescued is None:
            raise
        rescued /= folder.resolve().name
        raise WriteError(
            f"{error}\nThe quantized pipeline is in {rescued}; move it where you want it", kept=rescued
        ) from error


def _kept_aside(write: Callable[[Path], None]) -> Path | None:
    """Write a result to a temporary folder, and return that; None if this fails too."""
    try:
        place = Path(tempfile.mkdtemp(prefix="fxquant-"))
    except OSError:
        return None
    try:
        write(place)
    except (CheckpointError, OSError):
        with suppress(OSError):  # A part of it was written.
            place.rmdir()
        return None
    return place


def _mention_float_transformers(pipe: Any) -> None:
    others = [name for name, part in pipe.components.items() if name.startswith("transformer_") and part is not None]
    for name in others:
        _show_warning(f"{name} stays float: the command quantizes one transformer; for both see fxquant.compile")


class _PassProgress:
    """Instrument that shows the passes as a progress bar."""

    def __init__(self, progress: Progress, recipe: Recipe) -> None:
        self.progress_bar = progress
        self.prepare, self.convert = len(recipe.prepare), len(recipe.convert)
        self.first = recipe.prepare[0] if recipe.prepare else None
        self.task: Any = None
        self.inner: Any = None
        self.seen = self.graphs = 0

    def before(self, step: Pass, module: fx.GraphModule) -> None:
        """Show the name of the pass."""
        self.graphs += step == self.first
        total = max(self.graphs, 1) * (self.prepare + self.convert)
        if self.task is None:
            self.task = self.progress_bar.add_task("", total=total)
        self.progress_bar.update(self.task, total=total, description=f"pass: {step.name}")

    def after(self, step: Pass, module: fx.GraphModule, record: PassRecord) -> None:
        """Advance by one; behind the last pass the output error is measured."""
        self.seen += 1
        last = self.seen >= max(self.graphs, 1) * (self.prepare + self.convert)
        self.progress_bar.update(self.task, advance=1, description="measure the output" if last else None)

    def progress(self, step: Pass, what: str, done: int, total: int) -> None:
        """Show how far a pass is that takes long."""
        if self.inner is None:
            self.inner = self.progress_bar.add_task("", total=total)
        self.progress_bar.update(self.inner, description=f"{step.name}: {what}", completed=done, total=total)

    def failed(self, step: Pass, module: fx.GraphModule, error: Exception) -> None:
        """Say which pass it was."""
        self.progress_bar.update(self.task, description=f"failed: {step.name}")

    def done(self) -> None:
        """Say that all is over."""
        if self.task is not None:
            self.progress_bar.update(self.task, description=f"passes: {self.seen} done")


# --- generate -------------------------------------------------------------------------------------------------------

_GENERATE_EXAMPLES = """[bold]Examples[/]

  fxquant generate dit-w4a8 --labels 207,360,387 --out grid.png

  fxquant generate dit-w4a8 --labels 0-9 --steps 50 --guidance 4 --out images/

  fxquant generate pixart-w8a8 --prompts "a red fox in the snow" --prompts "a harbour at dawn" --out grid.png
"""


@app.command(epilog=_GENERATE_EXAMPLES, no_args_is_help=True)
def generate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a pipeline, quantized or not.")],
    out_path: Annotated[Path, typer.Option("--out", "-o", help="An image file for a grid, or a folder for files.")],
    labels: Annotated[str | None, typer.Option("--labels", "-l", help="Classes, such as 1,2,3 or 0-9.")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompts", "-p", help="A prompt, or a text file with one a line; repeatable.")
    ] = None,
    steps: Steps = 25,
    seed: Seed = 0,
    guidance: Guidance = None,
    columns: Annotated[int | None, typer.Option(min=1, help="Images per row of the grid.")] = None,
    device: Device = "cpu",
    allow_packages: Annotated[
        bool,
        typer.Option("--allow-packages", help="Load what was compiled ahead of time: a program, which runs here."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Generate images with a pipeline: one grid, or a folder of files."""
    if (labels is None) == (not prompts):
        raise ConfigurationError("give either --labels, such as --labels 1,2,3, or --prompts")
    wanted = None if labels is None else _read_labels(labels)
    lines = _all_prompts(prompts) if prompts else None
    _check_image_path(out_path)
    with _quiet():
        with _status("importing torch and diffusers"):
            from fxquant.storage import diffusers_io
        with _status(f"reading {folder}"):
            _no_bars()
            pipe = diffusers_io.load_pipeline(folder, device=device, trust_packages=allow_packages)
            pipe.set_progress_bar_config(disable=True)
        with _progress() as progress:
            count = len(wanted or lines or ())
            task = progress.add_task(f"generate: {count} images", total=diffusers_io.num_batches(count) * steps)
            with diffusers_io.steps_watched(pipe, lambda: progress.advance(task)), _blaming_the_pipeline(pipe):
                images = diffusers_io.generate(
                    pipe, steps=steps, seed=seed, guidance=guidance, prompts=lines, labels=wanted
                )
    try:
        _write_images(images, out_path, columns)
    except (OSError, ValueError) as error:
        _rescue_images(images, out_path, error)
    err.print(Text(f"{len(images)} image{'s' if len(images) > 1 else ''} in {out_path}"))


def _rescue_images(images: Sequence[Any], path: Path, error: Exception) -> NoReturn:
    """Write images that were made, and cannot go where they should, to a temporary folder."""
    reason = getattr(error, "strerror", None) or error
    message = f"{path} cannot be written: {reason}"
    rescued = _kept_aside(lambda place: _write_images(images, place, None))
    if rescued is None:
        raise WriteError(message) from error
    raise WriteError(f"{message}\nThe images are in {rescued}", kept=rescued) from error


def _check_image_path(path: Path) -> None:
    from PIL import Image

    from fxquant.disk.folders import check_writable

    kind = Image.registered_extensions().get(path.suffix.lower())
    if path.suffix and kind is None:
        raise ConfigurationError(
            f"{path.suffix} is no image format; write --out grid.png, or a folder without a dot in its name"
        )
    if kind is not None:
        try:
            Image.new("RGB", (8, 8)).save(io.BytesIO(), kind)
        except (KeyError, OSError, ValueError) as error:
            raise ConfigurationError(f"{path.suffix} holds no such images ({error}); write --out grid.png") from None
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

    if not path.suffix:
        path.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            _write_image(image, path / f"{number:03d}.png")
        return
    across = min(columns or max(1, round(len(images) ** 0.5 + 0.49)), len(images))
    width, height = images[0].size
    grid = Image.new("RGB", (across * width, -(-len(images) // across) * height))
    for number, image in enumerate(images):
        grid.paste(image, (number % across * width, number // across * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_image(grid, path)


def _write_image(image: Any, path: Path) -> None:
    """Write an image whole or not at all."""
    scratch = path.with_name(f".{path.stem}-partial{path.suffix}")
    try:
        image.save(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _read_labels(text: str) -> list[int]:
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            named = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise ConfigurationError(f"--labels {text}: {part!r} is no class number; write 1,2,3 or 0-9") from None
        count = len(labels) + max(0, named.stop - named.start)
        if count > _IMAGES:
            raise ConfigurationError(f"--labels {text} asks for {count} images; at most {_IMAGES} are made at once")
        labels += named
    if not labels:
        raise ConfigurationError(f"--labels {text} names no class; write 1,2,3 or 0-9")
    return labels


def _all_prompts(given: Sequence[str]) -> list[str]:
    return [line for entry in given for line in (_read_prompts(Path(entry)) if _is_file(entry) else [entry])]


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # A prompt may be longer than a path can be.
        return False


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--prompts {path} cannot be read: {error}") from None
    if not lines:
        raise ConfigurationError(f"--prompts {path} is empty; write one prompt per line")
    return lines


# --- export -----------------------------------------------------------------------------------------------------------

_EXPORT_EXAMPLES = """[bold]Examples[/]

  fxquant export dit-w8a8 dit-w8a8-compiled --aot --backend native

  fxquant generate dit-w8a8-compiled --labels 207,360,387 --allow-packages --out grid.png
"""


@app.command(epilog=_EXPORT_EXAMPLES, no_args_is_help=True)
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a quantized pipeline or checkpoint.")],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that what is compiled goes to.")],
    aot: Annotated[
        bool,
        typer.Option("--aot", help="Compile ahead of time, with AOTInductor. Required, for there is no other form."),
    ] = False,
    backend: Annotated[
        str | None, typer.Option("--backend", "-b", help="What runs it, if not what it was quantized for.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")] = False,
    debug: Debug = False,
) -> None:
    """Compile a quantized model for this machine, to load in a second and run without tracing anything.

    The result is a program, which runs when it is loaded: load only those from people you trust. Needs a C++ compiler.
    """
    if not aot:
        raise ConfigurationError("what export writes is compiled ahead of time; say so with --aot")
    with _quiet(), _status("importing torch"):
        from fxquant.storage.aot.export import export_folder

        def progress(number: int, total: int, seconds: float | None) -> None:
            if seconds is not None:
                err.print(f"graph {number + 1} of {total}: compiled in {seconds:.0f} s", highlight=False)

    with _quiet(), _status("compiling, which takes minutes"):
        found = export_folder(folder, out_folder, backend=backend, overwrite=overwrite, progress=progress)
    _print_plain(f"compiled in {sum(found.seconds):.0f} s, {found.bytes / 1e6:.1f} MB, written to {out_folder}")


# --- report, profile, list --------------------------------------------------------------------------------------------

_REPORT_EXAMPLES = """[bold]Examples[/]

  fxquant report dit-w4a8

  fxquant report dit-w4a8 --json | jq .totals
"""


@app.command(epilog=_REPORT_EXAMPLES, no_args_is_help=True)
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a quantized pipeline or checkpoint.")],
    every: Annotated[bool, typer.Option("--all", help="One row per layer, repeated blocks too.")] = False,
    device: Annotated[
        str | None, typer.Option("--device", "-d", help="Name the kernels of this device, such as cuda.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show what was done to every layer, what it costs and how far the output moved."""
    with _quiet(), _status("reading"):
        _check_is_folder(folder)
        import fxquant

        found = fxquant.report(folder, device=device)
    if as_json:
        _print_json(found.to_json())
    else:
        _print_plain(found.table(every=every))


_PROFILE_EXAMPLES = """[bold]Examples[/]

  fxquant profile dit-w8a8 --backend native

  fxquant profile dit-w8a8 --batch 8 --compile --top 40

  fxquant profile dit-w8a8 --json | jq '.rows[] | select(.is_slower) | .name'
"""


@app.command(epilog=_PROFILE_EXAMPLES, no_args_is_help=True)
def profile(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a quantized pipeline or checkpoint.")],
    backend: Annotated[
        str | None, typer.Option("--backend", "-b", help="What runs it; the one it was quantized for if not given.")
    ] = None,
    device: Device = "cpu",
    batch: Annotated[int | None, typer.Option(help="Samples of a call; 2 if the model leaves it open.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured runs of each model, by turns.")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; left as they are if not given.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Time whole calls under torch.compile too, which takes a minute or more.")
    ] = False,
    against_float: Annotated[
        bool, typer.Option("--float/--no-float", help="Run the float architecture beside it, with random weights.")
    ] = True,
    top: Annotated[int, typer.Option(min=1, help="Rows to show, the heaviest.")] = 20,
    every: Annotated[bool, typer.Option("--all", help="One row per layer, repeated blocks too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that was measured as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Measure where the time goes, layer by layer, beside float and what the machine can do.

    Warns of layers that are slower than in float or run a fallback. No weights of the float model are needed.
    """
    with _quiet(), _status("reading and measuring"):
        _check_is_folder(folder)
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
    if as_json:
        _print_json(found.to_json())
    else:
        _print_plain(found.table(top=top, every=every))


def _check_is_folder(folder: Path) -> None:
    from fxquant.disk.folders import no_folder

    if not folder.is_dir():
        raise no_folder(folder)


@app.command("list", no_args_is_help=True)
def list_(
    kind: Annotated[Kind, typer.Argument(metavar="KIND", help="recipes, passes, backends or rules.")],
    debug: Debug = False,
) -> None:
    """List recipes, passes, backends or channel rules, one line each."""
    with _quiet(), _status("importing torch"):
        rows = {Kind.recipes: _recipes, Kind.passes: _passes, Kind.backends: _backends, Kind.rules: _rules}[kind]()
    _print_rows(rows)


def _recipes() -> list[tuple[str, str]]:
    from fxquant.pipeline.recipes import DYNAMIC, RECIPES, ROUNDINGS

    plain = [(f"{name}-w<bits>a<bits>", _summary(RECIPES[name])) for name in RECIPES]
    by_token = f"<recipe>-{DYNAMIC}-w<bits>a<bits>", "every token that a linear reads gets its range at run time"
    return [*plain, by_token, *((f"<recipe>-{name}-w<bits>a<bits>", said) for name, said in ROUNDINGS.items())]


def _passes() -> list[tuple[str, str]]:
    from fxquant.pipeline.pipeline import PASSES

    return [(name, f"[{PASSES[name].tier.value}] {_summary(PASSES[name])}") for name in PASSES]


def _backends() -> list[tuple[str, str]]:
    from fxquant.pipeline.backend import BACKENDS, options_of

    rows = []
    for name in BACKENDS:
        try:
            options = ", ".join(sorted(options_of(name)))
            rows.append((name, _summary(BACKENDS[name]) + (f" Options: {options}." if options else "")))
        except ImportError as error:
            rows.append((name, f"not available: {error}"))
    return rows


def _rules() -> list[tuple[str, str]]:
    from fxquant.channels.rules import RULES

    ops: dict[Any, list[str]] = {}
    for target, function in RULES.items():
        name = str(getattr(target, "_name", None) or getattr(target, "__name__", target)).removeprefix("aten::")
        short = name.partition(".")[0]
        names = ops.setdefault(function, [])
        if short not in names:
            names.append(short)
    return [(" ".join(names), _summary(function)) for function, names in ops.items()]


def _summary(item: Any) -> str:
    """First line of a docstring; "Barrier: ..." and "End: ..." of rules included."""
    return (inspect.getdoc(item) or "").partition("\n")[0]


# --- output ---------------------------------------------------------------------------------------------------------


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    if not out.is_terminal:  # One line each, for grep.
        width = max((len(name) for name, _ in rows), default=0)
        _print_plain("\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows))
        return
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", overflow="fold", max_width=44)
    table.add_column()
    for name, text in rows:
        table.add_row(Text(name), Text(text))
    out.print(table)


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")


def _print_plain(text: str) -> None:
    """As it is: a table that a narrow terminal would fold is easier to read scrolled or piped."""
    from fxquant.text import printable

    sys.stdout.write(printable(text, _LINE) + "\n")


def _print_error(message: str) -> None:
    from fxquant.text import printable

    err.print(Text.assemble(("error: ", "bold red"), (printable(message, _LINE), "red")), soft_wrap=True)


@contextmanager
def _status(text: str) -> Iterator[None]:
    if err.is_terminal:
        with err.status(Text(text)):
            yield
    else:
        yield


@contextmanager
def _progress() -> Iterator[Progress]:
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what libraries say to their developers off the screen; fxquant's own warnings stay."""
    import logging

    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torchao", "diffusers", "torch.utils._pytree", "torch.utils.pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"fxquant(\.|$)")
        for category in (PortabilityWarning, QualityWarning, SpeedWarning):  # They name whoever called the model.
            warnings.filterwarnings("default", category=category)
        warnings.showwarning = _show_warning
        yield


def _no_bars() -> None:
    """No bars but our own."""
    from diffusers.utils import logging

    logging.disable_progress_bar()


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    from fxquant.text import printable

    err.print(Text.assemble(("warning: ", "bold yellow"), printable(str(message), _LINE)), soft_wrap=True)


def main() -> None:
    """Run the command line: the console entry point."""
    app()


if __name__ == "__main__":
    main()
