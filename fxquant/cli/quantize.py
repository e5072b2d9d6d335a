"""The command ``fxquant quantize``."""

from __future__ import annotations

import itertools
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from fxquant.cli.app import Debug, Device, Frames, Guidance, Height, Prompts, Seed, Steps, Variant, Width, app
from fxquant.cli.completion import backends, recipes
from fxquant.cli.output import err, print_json, print_plain, progress_bars, quiet, show_warning, status
from fxquant.cli.progress import PassProgress
from fxquant.cli.ranks import ranks
from fxquant.cli.running import (
    blaming_the_pipeline,
    check_alone,
    open_pipeline,
    read_prompts,
    refuse_quantized,
    save_or_keep_aside,
    sizes_of,
)  # fmt: skip
from fxquant.errors import ConfigurationError

if TYPE_CHECKING:
    from fxquant.statistics.collection import Statistics


class Layers(StrEnum):
    """Which layers are quantized."""

    default = "default"
    blocks = "blocks"
    all = "all"


class Dtype(StrEnum):
    """The dtype in which a pipeline computes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


_QUANTIZE_EXAMPLES = """[bold]Examples[/]

  fxquant quantize facebook/DiT-XL-2-256 --recipe ptq4dit-gptq-w4a8 --out dit-w4a8

  fxquant quantize ./my-pixart --recipe rtn-w8a8 --prompts prompts.txt --out pixart-w8a8

  fxquant quantize ./my-dit --recipe ptq4dit-gptq-w4a8-g64 --samples 8 --steps 10 --out quick --overwrite

  fxquant quantize ./my-wan --components transformer,transformer_2 --prompts prompts.txt --num-frames 17 --out wan
"""


@app.command(epilog=_QUANTIZE_EXAMPLES, no_args_is_help=True)
def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of a diffusers pipeline.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write the quantized pipeline to.")] = None,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            "-r",
            autocompletion=recipes,
            help="Recipe with precision, or its text; see [bold]fxquant list recipes[/].",
        ),
    ] = "ptq4dit-w8a8",
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            "-b",
            autocompletion=backends,
            help="Backend, such as native{kernels=onednn}; see [bold]fxquant list backends[/].",
        ),
    ] = "fake-quant",
    layers: Annotated[
        Layers,
        typer.Option(help="default: blocks, and 8-bit weights in embedders; blocks: only blocks; all: every layer."),
    ] = Layers.default,
    components: Annotated[
        str,
        typer.Option(
            help="Parts to quantize from one run, such as transformer,transformer_2; with recipes of their own: "
            "transformer,text_encoder_2=rtn-w8a16."
        ),
    ] = "transformer",
    variant: Variant = None,
    device: Device = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Dtype for everything that is not quantized.")] = Dtype.float32,
    samples: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Samples to calibrate with.", rich_help_panel="Sampling")
    ] = 32,
    steps: Steps = 25,
    seed: Seed = 0,
    guidance: Guidance = None,
    prompts: Prompts = None,
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    measure: Annotated[
        int, typer.Option(min=0, help="Number of calibration calls on which the output error is measured; 0 for none.")
    ] = 8,
    dump: Annotated[
        Path | None,
        typer.Option(
            "--dump",
            "--dump-graphs",
            help="Folder for the graph after every change, as text and for [bold]fxquant opt[/].",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder for finished calls, layers and blocks; the same command continues from there."),
    ] = None,
    prove: Annotated[
        bool,
        typer.Option("--prove", help="Check on calibration calls that each pass keeps what its tier promises; slow."),
    ] = False,
    keep_statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File for what calibration observed, with some of its calls.",
            rich_help_panel="Statistics",
        ),
    ] = None,
    keep_calls: Annotated[
        int, typer.Option(min=0, max=10_000, help="Calls to keep in that file.", rich_help_panel="Statistics")
    ] = 32,
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What [bold]--keep-statistics[/] wrote, in place of a calibration.",
            rich_help_panel="Statistics",
        ),
    ] = None,
    attribute: Annotated[
        bool,
        typer.Option(
            "--attribute",
            help="Find out which layers cause the output error, as [bold]fxquant attribute[/] does.",
            rich_help_panel="Statistics",
        ),
    ] = False,
    budget: Annotated[
        float, typer.Option(min=1.0, help="Seconds for --attribute.", rich_help_panel="Statistics")
    ] = 600.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only estimate sizes, memory and time, from the headers of the files.")
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Bound on the memory of the process, such as 8GB. Large tensors lie in files meanwhile; on the CPU.",
            rich_help_panel="Memory",
        ),
    ] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(
            help="Folder for these files; by default [bold]--resume[/], or the folder that holds [bold]--out[/].",
            rich_help_panel="Memory",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Quantize the transformer of a pipeline, or several of its parts, and write the whole pipeline to a folder.

    To calibrate, the command runs the pipeline as it will be used: with its classes or with your prompts.
    """
    if dry_run:
        _forecast(Path(model), _recipes_of(components, recipe), layers, dtype, (samples, steps), variant, as_json)
        return
    if out is None:
        raise ConfigurationError("--out is missing: name the folder to write the quantized pipeline to")
    out_folder = out
    lines = None if prompts is None else read_prompts(prompts)
    with quiet(), status("importing torch and diffusers"):
        import fxquant
        from fxquant.calibration.pipeline_calls import calibration_call, num_batches, steps_watched
        from fxquant.disk.claims import claimed, remove_unfinished
        from fxquant.disk.files import dtype_of_name
        from fxquant.disk.folders import prepare
        from fxquant.memory.bound import check_place, limit_memory
        from fxquant.pipeline.backend import resolve_backend
        from fxquant.pipeline.dumps import DumpGraphs
        from fxquant.pipeline.pipeline import Instrument
        from fxquant.pipeline.recipes import make_recipe
        from fxquant.pretrained.components import check_components, compile_pipeline
        from fxquant.runtime.devices import usable_device
        from fxquant.runtime.parts import has_entries, quantized_models
        from fxquant.storage.pipeline_folders import refuse_existing, refuse_input

        # Invalid options are refused before any slow step.
        refuse_input(out_folder, Path(model))
        ranks().join(_given(context.params, lines), Path(model))
        if ranks().first:
            prepare(out_folder.resolve(), lambda path: refuse_existing(path, overwrite))
            context.with_resource(claimed(out_folder.resolve()))
            for option, folder in (("--dump", dump), ("--resume", resume), ("--scratch", scratch)):
                _check_folder(option, folder, out_folder)
        ranks().clean = lambda: remove_unfinished(out_folder.resolve())
        recipes = _recipes_of(components, recipe)
        names = list(recipes)
        refuse_quantized(Path(model), names)
        check_alone(names, {"--keep-statistics": keep_statistics, "--statistics": statistics, "--attribute": attribute})
        recorded = _statistics(statistics, keep_statistics, (keep_calls, seed), attribute, out_folder)
        chosen = {name: make_recipe(text, layers.value) for name, text in recipes.items()}
        place = usable_device(device if (started := ranks().place) is None else started.device(device))
        runner = resolve_backend(backend).on(place)
        runner.check_device(place)
        check_place(max_memory, place)
    with quiet(), limit_memory(max_memory, scratch or resume or out_folder.resolve().parent):
        with status(f"reading {model}"):
            pipe = open_pipeline(model, device=place, torch_dtype=dtype_of_name(dtype.value), variant=variant)
            check_components(pipe, names)
            decode = any(has_entries(getattr(pipe, name)) for name in names)
            if decode and (recorded is not None):
                raise ConfigurationError(
                    "--keep-statistics, --statistics and --attribute are about one graph, and each part of a VAE is "
                    "one; leave them out"
                )
            calibrate = None
            if statistics is None:
                sizes = sizes_of(height, width, num_frames)
                with blaming_the_pipeline(pipe):
                    calibrate = calibration_call(
                        pipe, samples, steps, seed, guidance, lines, sizes=sizes, decode=decode, share=ranks().share
                    )
        with progress_bars() as progress:
            watches: list[PassProgress] = []

            def for_component(name: str) -> dict[str, Any]:
                """What each part has of its own: a progress bar, and folders if there are several parts."""
                watches.append(PassProgress(progress, chosen[name.partition(".")[0]]))
                several = len(names) > 1 or name not in names
                own = [path and (path / name if several else path) for path in (dump, resume)]
                instruments: list[Instrument] = [watches[-1]]
                if own[0] is not None and ranks().first:
                    instruments.append(DumpGraphs(own[0]))
                return {"instruments": instruments, "resume": own[1], "statistics": recorded}

            told = f"calibrate: {samples} samples, {steps} steps" if calibrate else "calibrated before"
            task = progress.add_task(told, total=num_batches(samples) * steps if calibrate else 0)

            own = itertools.count(1)

            def tick() -> None:
                progress.update(task, completed=ranks().count_step(next(own)))

            with steps_watched(pipe, tick), blaming_the_pipeline(pipe):
                original = getattr(pipe, names[0])
                made = compile_pipeline(
                    pipe,
                    recipe=recipes,
                    calibrate=calibrate,
                    for_component=for_component,
                    backend=runner,
                    layers=layers.value,
                    measure=measure,
                    prove=prove,
                    group=ranks().group,
                )
            for watch in watches:
                watch.done()
            if attribute and recorded is not None:
                bar = progress.add_task("attribute errors", total=None)
                fxquant.attribute(
                    made[names[0]],
                    original,
                    recorded,
                    budget=budget,
                    progress=lambda what, done, total: progress.update(
                        bar, description=f"errors: {what}", completed=done, total=total
                    ),
                )
        if keep_statistics is not None and recorded is not None and ranks().first:
            with status(f"writing {keep_statistics}"):
                recorded.save(keep_statistics)
        if ranks().first:
            with status(f"writing {out_folder}"):
                _save(pipe, out_folder, overwrite)
        ranks().wait()
        if not ranks().first:
            return
        _mention_float_transformers(pipe, names)
    found = {path: fxquant.report(model) for path, model in quantized_models(made).items()}
    if as_json:
        reports = {name: report.to_json() for name, report in found.items()}
        print_json(reports if list(reports) != names[:1] else reports[names[0]])
    else:
        for name, report in found.items():
            print_plain(f"{name}:\n{report.summary()}" if list(found) != names[:1] else report.summary())
            if report.attribution is not None:
                print_plain(f"\n{report.attribution.table()}")
        err.print(Text(f"written to {out_folder}; see fxquant report {out_folder}"))


def _given(given: dict[str, Any], prompts: list[str] | None) -> dict[str, object]:
    """The options that all processes must have in common, as they are typed; of the prompts, what they say."""
    kept = {f"--{name.replace('_', '-')}": value for name, value in given.items() if name not in ("device", "model")}
    return kept | {"MODEL": given["model"], "--prompts": prompts}


def _forecast(
    folder: Path,
    recipes: dict[str, str],
    layers: Layers,
    dtype: Dtype,
    run: tuple[int, int],
    variant: str | None,
    as_json: bool,
) -> None:
    """Print what a conversion would take."""
    with quiet(), status("importing torch"):
        from fxquant.calibration.pipeline_calls import num_batches
        from fxquant.disk.files import dtype_of_name
        from fxquant.inspect.forecast import forecast, forecast_text
        from fxquant.pipeline.recipes import make_recipe

        calls = num_batches(run[0]) * run[1]
        refuse_quantized(folder, recipes)
        chosen = {name: make_recipe(text, layers.value) for name, text in recipes.items()}
        found = forecast(folder, chosen, dtype_of_name(dtype.value), calls, variant)
    if as_json:
        print_json(found)
    else:
        print_plain(forecast_text(found))


def _statistics(
    given: Path | None, keep: Path | None, kept: tuple[int, int], attribute: bool, out_folder: Path
) -> Statistics | None:
    """The statistics to read or to record; None if they are not needed afterwards."""
    import fxquant

    calls, seed = kept
    if given is not None and keep is not None:
        raise ConfigurationError("give --statistics to use a file, or --keep-statistics to write one, not both")
    if given is not None:
        return fxquant.Statistics.load(given)
    if attribute and ranks().place is not None:
        raise ConfigurationError("--attribute runs in one process; run fxquant attribute on the result")
    if attribute and not calls:
        raise ConfigurationError("--attribute runs kept calls again, so --keep-calls cannot be 0")
    if keep is None:
        return fxquant.Statistics(keep_calls=calls, transient=True) if attribute else None
    _check_folder("--keep-statistics", keep.resolve().parent, out_folder)
    if keep.is_dir():
        raise ConfigurationError(f"--keep-statistics {keep} is a folder; give the name of a file")
    return fxquant.Statistics(keep_calls=calls, seed=seed)  # Files of other seeds can be merged.


def _recipes_of(components: str, recipe: str) -> dict[str, str]:
    """The recipe of each part, in order, from a text such as ``transformer,text_encoder_2=rtn-w8a16``."""
    found: dict[str, str] = {}
    for entry in components.split(","):
        name, _, own = entry.strip().partition("=")
        if name in found:
            raise ConfigurationError(f"--components {components}: give {name} once")
        found[name] = own or recipe
    return found


def _check_folder(option: str, folder: Path | None, out_folder: Path) -> None:
    """Refuse a folder of an option if it cannot be written, or is inside of --out, which is replaced as a whole."""
    from fxquant.disk.folders import check_writable

    if folder is None:
        return
    if folder.resolve().is_relative_to(out_folder.resolve()):
        raise ConfigurationError(
            f"{option} {folder} lies in --out {out_folder}, which holds only the pipeline; choose another folder"
        )
    check_writable(folder)


def _save(pipe: Any, folder: Path, overwrite: bool) -> None:
    from fxquant.storage.diffusers_io import save_pipeline

    save_or_keep_aside(lambda place: save_pipeline(pipe, place, overwrite=overwrite), folder, "quantized pipeline")


def _mention_float_transformers(pipe: Any, names: list[str]) -> None:
    for name, part in pipe.components.items():
        if name.startswith("transformer") and part is not None and name not in names:
            show_warning(f"{name} stays float; for both give --components {','.join([*names, name])}")
