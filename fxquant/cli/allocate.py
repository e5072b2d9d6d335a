"""The commands ``fxquant sensitivity`` and ``fxquant search``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from fxquant.cli.app import Debug, Device, Guidance, Prompts, Seed, app
from fxquant.cli.completion import backends
from fxquant.cli.output import err, print_json, print_plain, progress_bars, quiet, status
from fxquant.cli.running import (
    blaming_the_pipeline,
    open_pipeline,
    read_prompts,
    refuse_quantized,
    save_or_keep_aside,
)
from fxquant.errors import ConfigurationError

_SENSITIVITY_EXAMPLES = """[bold]Examples[/]

  fxquant sensitivity facebook/DiT-XL-2-256 --candidates w4a8,w6a8,w8a8 --budget 600 --out dit.sensitivities

  fxquant sensitivity facebook/DiT-XL-2-256 --out dit.sensitivities --resume unfinished --json | jq .layers
"""

_SEARCH_EXAMPLES = """[bold]Examples[/]

  fxquant search facebook/DiT-XL-2-256 --size 0.2 --out dit-mixed

  fxquant search facebook/DiT-XL-2-256 --sqnr 35 --candidates w4a8,w6a8,w8a8 --out dit-mixed --picture pareto.svg

  fxquant search facebook/DiT-XL-2-256 --speed 1.5 --backend native --times dit.times --out dit-mixed --resume parts
"""

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of the float pipeline.")]
Candidates = Annotated[
    str, typer.Option(help="Precisions to choose from, with commas between; also w4a4-r16 with a branch of rank 16.")
]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="Recipe that balances and rounds, without precision.")]
Samples = Annotated[int, typer.Option(min=1, max=1024, help="Images per batch of calibration.")]
Steps = Annotated[int, typer.Option(min=1, max=10_000, help="Denoising steps of calibration.")]
Timesteps = Annotated[int, typer.Option(min=1, max=10_000, help="Timesteps to measure.")]
Probes = Annotated[int, typer.Option(min=1, max=10_000, help="Random gradients per timestep; more are exacter.")]
Budget = Annotated[float | None, typer.Option(min=1.0, help="Seconds for the timesteps of the measurement.")]
Resume = Annotated[
    Path | None, typer.Option(help="Folder for what is finished; the same command continues from there.")
]

_CANDIDATES = "w4a8,w5a8,w6a8,w8a8"
_RECIPE = "smoothquant-search-gptq"


class _Opened:
    """A float pipeline, and what calibrates its transformer."""

    def __init__(
        self, model: str, device: str, samples: int, steps: int, seed: int, guidance: float | None, prompts: Path | None
    ) -> None:
        from fxquant.calibration.pipeline_calls import calibration_call
        from fxquant.runtime.devices import usable_device

        lines = None if prompts is None else read_prompts(prompts)
        self.pipe = open_pipeline(model, device=usable_device(device))
        self.transformer = self.pipe.transformer
        self.calibrate = calibration_call(self.pipe, samples, steps, seed, guidance, lines)


@app.command(epilog=_SENSITIVITY_EXAMPLES, no_args_is_help=True)
def sensitivity(
    model: Model,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write, for [bold]fxquant search[/].")] = None,
    candidates: Candidates = _CANDIDATES,
    recipe: RecipeName = _RECIPE,
    samples: Samples = 4,
    steps: Steps = 25,
    timesteps: Timesteps = 10,
    probes: Probes = 8,
    measure: Annotated[int, typer.Option(min=0, help="Largest errors per timestep that are measured by a run.")] = 2,
    budget: Budget = 1200.0,
    resume: Resume = None,
    device: Device = "cpu",
    seed: Seed = 0,
    guidance: Guidance = None,
    prompts: Prompts = None,
    top: Annotated[int | None, typer.Option(min=1, help="Number of layers to show, the most sensitive first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that was measured as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Measure the error of the output from each layer, in each precision that it could have."""
    import fxquant

    with quiet(), status("reading"):
        _check_outputs(model, {"--out": out}, resume)
        opened = _Opened(model, device, samples, steps, seed, guidance, prompts)
    with quiet(), progress_bars() as bars, blaming_the_pipeline(opened.pipe):
        task = bars.add_task("measure sensitivities", total=timesteps)
        found = fxquant.sensitivity(
            opened.transformer,
            recipe=recipe,
            candidates=_listed(candidates),
            calibrate=opened.calibrate,
            timesteps=timesteps,
            probes=probes,
            measure=measure,
            budget=budget,
            resume=resume,
            seed=seed,
            progress=lambda what, done, total: bars.update(task, description=what, completed=done, total=total),
        )
    if out is not None:
        found.save(out)
    if as_json:
        print_json(found.to_json())
    else:
        print_plain(found.table(top))
    if out is not None:
        err.print(Text(f"kept in {out}; see fxquant search {model} --sensitivities {out}"))


@app.command(epilog=_SEARCH_EXAMPLES, no_args_is_help=True)
def search(
    context: typer.Context,
    model: Model,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write the quantized pipeline to.")] = None,
    size: Annotated[float | None, typer.Option(help="Share of the float model's bytes, up to 1; or bytes.")] = None,
    sqnr: Annotated[float | None, typer.Option(help="Mean SQNR of the output in dB.")] = None,
    speed: Annotated[float | None, typer.Option(help="How many times faster than float a call should be.")] = None,
    candidates: Candidates = _CANDIDATES,
    recipe: RecipeName = _RECIPE,
    sensitivities: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What [bold]fxquant sensitivity --out[/] wrote.")
    ] = None,
    backend: Annotated[str, typer.Option(autocompletion=backends, help="Backend of the result.")] = "fake-quant",
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Size against error as .png, .svg or .pdf.")
    ] = None,
    samples: Samples = 4,
    steps: Steps = 25,
    timesteps: Timesteps = 10,
    probes: Probes = 8,
    budget: Budget = 1200.0,
    resume: Resume = None,
    checks: Annotated[int, typer.Option(min=1, help="Models that are measured at most for --sqnr or --speed.")] = 4,
    times: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Times of layers for --speed: read, or kept if there is no file."),
    ] = None,
    device: Device = "cpu",
    seed: Seed = 0,
    guidance: Guidance = None,
    prompts: Prompts = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Choose the precision of each layer for a size, a quality or a speed, and quantize the model with it."""
    import fxquant
    from fxquant.allocation.targets import check_target
    from fxquant.disk.claims import claimed

    check_target(size, sqnr, speed)
    with quiet(), status("reading"):
        if picture is not None:
            from fxquant.inspect.plots import check_suffix

            check_suffix(picture)
        _check_outputs(model, {"--picture": picture, "--times": times}, resume, out)
        _check_folder(model, out, overwrite)
        if out is not None:
            context.with_resource(claimed(out.resolve()))
        _check_backend(backend, device)
        known = None if sensitivities is None else fxquant.Sensitivities.load(sensitivities)
        opened = _Opened(model, device, samples, steps, seed, guidance, prompts)
    with quiet(), progress_bars() as bars, blaming_the_pipeline(opened.pipe):
        task = bars.add_task("search", total=timesteps)
        found = fxquant.search(
            opened.transformer,
            size=size,
            sqnr=sqnr,
            speed=speed,
            sensitivities=known,
            recipe=recipe,
            candidates=_listed(candidates),
            calibrate=opened.calibrate,
            backend=backend,
            timesteps=timesteps,
            probes=probes,
            budget=budget,
            resume=resume,
            checks=checks,
            times=times,
            seed=seed,
            progress=lambda what, done, total: bars.update(task, description=what, completed=done, total=total),
        )
    if out is not None:
        opened.pipe.transformer = found.model

        def write(folder: Path) -> None:
            fxquant.save_pipeline(opened.pipe, folder, overwrite=overwrite)

        save_or_keep_aside(write, out, "quantized pipeline")
    if picture is not None:
        from fxquant.allocation.picture import pareto_figure
        from fxquant.inspect.plots import save_figure

        save_figure(pareto_figure(found), picture)
    _show(found, as_json)
    if out is not None:
        err.print(Text(f"written to {out}; see fxquant report {out}"))


def _check_outputs(model: str, files: dict[str, Path | None], resume: Path | None, out: Path | None = None) -> None:
    """Refuse a quantized model, and outputs that cannot be written, before anything that takes long.

    Args:
        model: The float pipeline.
        files: Files to write, by option.
        resume: Folder of finished timesteps.
        out: Folder that is written as a whole, so that the others have to lie elsewhere.

    Raises:
        ConfigurationError: Names the option.
        AlreadyCompiledError: If the model is quantized.
        WriteError: If a folder cannot be written.
    """
    from fxquant.disk.folders import check_writable

    refuse_quantized(Path(model), ["transformer"])
    for option, path in {**files, "--resume": resume}.items():
        if path is None:
            continue
        if option != "--resume" and path.is_dir():
            raise ConfigurationError(f"{option} {path} is a folder; give the name of a file")
        if out is not None and path.resolve().is_relative_to(out.resolve()):
            raise ConfigurationError(
                f"{option} {path} lies in --out {out}, which holds only the pipeline; choose another folder"
            )
        check_writable(path if option == "--resume" else path.resolve().parent)


def _check_folder(model: str, out: Path | None, overwrite: bool) -> None:
    from fxquant.disk.folders import prepare
    from fxquant.storage.pipeline_folders import refuse_existing, refuse_input

    if out is not None:
        refuse_input(out, Path(model))
        prepare(out.resolve(), lambda path: refuse_existing(path, overwrite))


def _check_backend(backend: str, device: str) -> None:
    from fxquant.pipeline.backend import resolve_backend
    from fxquant.runtime.devices import usable_device

    place = usable_device(device)
    resolve_backend(backend).on(place).check_device(place)


def _show(found: Any, as_json: bool) -> None:
    if as_json:
        print_json(found.to_json())
    else:
        print_plain(found.table())


def _listed(candidates: str) -> list[str]:
    return [part.strip() for part in candidates.split(",") if part.strip()]
