"""The command ``fxquant balance``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from fxquant.cli.app import Debug, Device, Frames, Guidance, Height, Prompts, Seed, Steps, Variant, Width, app
from fxquant.cli.completion import recipes
from fxquant.cli.output import err, print_json, print_plain, progress_bars, quiet, status
from fxquant.cli.quantize import Dtype, Layers
from fxquant.cli.running import blaming_the_pipeline, open_pipeline, read_prompts, save_or_keep_aside, sizes_of

_BALANCE_EXAMPLES = """[bold]Examples[/]

  fxquant balance facebook/DiT-XL-2-256 --out dit-balanced

  fxquant balance ./my-pixart --prompts prompts.txt --dtype bfloat16 --out pixart-balanced
"""


@app.command(epilog=_BALANCE_EXAMPLES, no_args_is_help=True)
def balance(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of a float diffusers pipeline.")],
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="New folder to write the balanced pipeline to.")],
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            "-r",
            autocompletion=recipes,
            help="Recipe whose balancing is used, with precision; [bold]fxquant list recipes[/].",
        ),
    ] = "smoothquant-w8a8",
    layers: Annotated[Layers, typer.Option(help="As for [bold]fxquant quantize[/].")] = Layers.default,
    device: Device = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Dtype in which the model is read and written.")] = Dtype.float32,
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
    variant: Variant = None,
    measure: Annotated[
        int, typer.Option(min=1, help="Number of calibration calls on which the result is compared with the original.")
    ] = 4,
    prove: Annotated[bool, typer.Option("--prove", help="Also compare each pass in float64; slow.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Balance the float transformers of a pipeline, so that any quantizer handles them better.

    The result is an ordinary float pipeline: the same classes, the same keys, the same images up to rounding.
    """
    lines = None if prompts is None else read_prompts(prompts)
    with quiet(), status("importing torch and diffusers"):
        import fxquant
        from fxquant.calibration.pipeline_calls import calibration_call, num_batches, steps_watched
        from fxquant.disk.files import dtype_of_name
        from fxquant.disk.folders import prepare
        from fxquant.export.float_pipeline import save_float_pipeline
        from fxquant.pipeline.recipes import make_recipe
        from fxquant.runtime.devices import usable_device
        from fxquant.storage.pipeline_folders import refuse_existing, refuse_input

        # Invalid options are refused before any slow step.
        refuse_input(out_folder, Path(model))
        prepare(out_folder.resolve(), lambda path: refuse_existing(path, False))
        chosen = make_recipe(recipe, layers.value)
        place = usable_device(device)
    with quiet():
        with status(f"reading {model}"):
            pipe = open_pipeline(model, device=place, torch_dtype=dtype_of_name(dtype.value), variant=variant)
            sizes = sizes_of(height, width, num_frames)
            calibrate = calibration_call(pipe, samples, steps, seed, guidance, lines, sizes=sizes)
        with progress_bars() as progress:
            task = progress.add_task(f"calibrate: {samples} samples, {steps} steps", total=num_batches(samples) * steps)
            with steps_watched(pipe, lambda: progress.advance(task)), blaming_the_pipeline(pipe):
                balanced = fxquant.balance_pipeline(
                    pipe, calibrate=calibrate, recipe=chosen, layers=layers.value, measure=measure, prove=prove
                )
        reports: dict[str, Any] = {name: part.balance_report for name, part in balanced.items()}
        for name, part in balanced.items():
            setattr(pipe, name, part)
        with status(f"writing {out_folder}"):
            save_or_keep_aside(lambda folder: save_float_pipeline(pipe, folder), out_folder, "balanced pipeline")
    if as_json:
        print_json({name: found.to_json() for name, found in reports.items()})
        return
    for name, found in reports.items():
        print_plain(f"{name}\n{found}")
    err.print(Text(f"written to {out_folder}, a float pipeline that diffusers reads"))
