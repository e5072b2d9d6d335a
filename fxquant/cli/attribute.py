"""The command ``fxquant attribute``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from fxquant.cli.app import Debug, Device, Folder, Guidance, Prompts, Seed, app
from fxquant.cli.output import err, print_json, print_plain, progress_bars, quiet, status
from fxquant.cli.report import check_is_folder
from fxquant.cli.running import blaming_the_pipeline, open_pipeline, read_prompts

_ATTRIBUTE_EXAMPLES = """[bold]Examples[/]

  fxquant attribute dit-w4a8 facebook/DiT-XL-2-256 --budget 600

  fxquant attribute dit-w4a8 facebook/DiT-XL-2-256 --statistics dit.statistics --resume unfinished

  fxquant attribute dit-w4a8 facebook/DiT-XL-2-256 --steps 5 --json | jq .worst[0]
"""

Budget = Annotated[float, typer.Option(min=1.0, help="Seconds; what does not fit is listed as not measured.")]


@app.command(epilog=_ATTRIBUTE_EXAMPLES, no_args_is_help=True)
def attribute(
    folder: Folder,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of the float pipeline.")],
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What [bold]quantize --keep-statistics[/] wrote; its calls are used as inputs."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Timesteps to measure.")] = 10,
    samples: Annotated[int, typer.Option(min=1, max=16, help="Samples per timestep.")] = 1,
    probes: Annotated[
        int, typer.Option(min=0, max=10_000, help="Random gradients per timestep; more are exacter.")
    ] = 8,
    measure: Annotated[int, typer.Option(min=0, help="Worst layers whose contribution is measured by a run.")] = 3,
    budget: Budget = 1200.0,
    resume: Annotated[Path | None, typer.Option(help="Folder in which finished timesteps are kept.")] = None,
    device: Device = "cpu",
    seed: Seed = 0,
    guidance: Guidance = None,
    prompts: Prompts = None,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Keep the result in DIR, for the report.")] = True,
    top: Annotated[int, typer.Option(min=1, help="Number of layers to show, the worst first.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that was measured as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Find out which layers, at which timesteps, cause the error of the output.

    Needs the float model. Without --statistics the command runs the float pipeline for its inputs.
    """
    lines = None if prompts is None else read_prompts(prompts)
    with quiet(), status("reading"):
        check_is_folder(folder)
        import fxquant
        from fxquant.calibration.pipeline_calls import calibration_call
        from fxquant.inspect.plans import checkpoint_folder
        from fxquant.runtime.devices import usable_device

        place = usable_device(device)
        checkpoint = checkpoint_folder(folder)
        inputs: Any = None if statistics is None else fxquant.Statistics.load(statistics)
        plan = fxquant.Plan.load(checkpoint)
        active = [adapter.name for adapter in fxquant.report(checkpoint).adapters if adapter.active]
        quantized = fxquant.load(checkpoint, device=place, backend="fake-quant")
        pipe = open_pipeline(model, device=place)
        part = getattr(pipe, checkpoint.name, None) if checkpoint != folder else None
        original = pipe.transformer if part is None else part
        original = original.to(quantized.dtype)
        if inputs is None:
            inputs = calibration_call(pipe, samples, steps, seed, guidance, lines)
    with quiet(), progress_bars() as bars:
        task = bars.add_task("attribute errors", total=steps)
        with blaming_the_pipeline(pipe):
            found = fxquant.attribute(
                quantized,
                original,
                inputs,
                timesteps=steps,
                samples=samples,
                probes=probes,
                measure=measure,
                budget=budget,
                resume=resume,
                progress=lambda what, done, total: bars.update(task, description=what, completed=done, total=total),
            )
    if save:
        found.save(checkpoint, plan.fingerprint())
    if active:
        err.print(Text(f"measured without the LoRAs of the checkpoint ({', '.join(active)})"))
    if as_json:
        print_json({**found.to_json(), "worst": found.rows()})
    else:
        print_plain(found.table(top))
        if save:
            err.print(Text(f"kept in {checkpoint}; see fxquant report {folder}"))
