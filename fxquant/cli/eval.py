"""The command ``fxquant eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from fxquant.cli.app import AsJson, Debug, Device, Frames, Guidance, Height, Prompts, Seed, Steps, Width, app
from fxquant.cli.generate import read_labels
from fxquant.cli.output import err, print_error, print_json, print_plain, progress_bars, quiet, status
from fxquant.cli.running import open_pipeline, read_prompts, sizes_of
from fxquant.errors import ConfigurationError, GateError
from fxquant.text import json_values

if TYPE_CHECKING:
    from fxquant.evaluation.result import Evaluation

_FAILED = 1  # The exit status of a limit that is not kept; errors have 2.

_EVAL_EXAMPLES = """[bold]Examples[/]

  fxquant eval dit-w4a8 --reference facebook/DiT-XL-2-256 --images 64 --picture grid.png --max-lpips 0.1

  fxquant eval dit-w4a8 --against VIRTUAL_imagenet256_labeled.npz --images 50000 --steps 250 --guidance 1.5 --work w4a8

  fxquant eval pixart-w8a8 --reference ./my-pixart --prompts prompts.txt --clip ./clip-vit-base-patch16 --json
"""


def _limit(name: str, text: str) -> Any:
    return typer.Option(f"--{name}", help=text, rich_help_panel="Limits: exit status 1 beyond them")


def _network(name: str, text: str) -> Any:
    return typer.Option(f"--{name}", help=text, rich_help_panel="Networks of metrics")


@app.command("eval", epilog=_EVAL_EXAMPLES, no_args_is_help=True)
def evaluate(
    quantized: Annotated[str, typer.Argument(metavar="QUANTIZED", help="Folder of the quantized pipeline.")],
    reference: Annotated[
        str | None, typer.Option("--reference", "-r", metavar="FLOAT", help="Folder or hub name of the float pipeline.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Real images: an npz of ADM's evaluation with mu, sigma, mu_s, sigma_s, or a folder."),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Metrics, with commas between, such as fid,lpips; by default all that can run.")
    ] = None,
    images: Annotated[int, typer.Option("--images", "-n", min=1, max=10_000_000, help="Images to make.")] = 1000,
    sfid_images: Annotated[int, typer.Option(min=1, help="Images that sFID uses, the first ones.")] = 10_000,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Images at once.", rich_help_panel="Sampling")] = 32,
    labels: Annotated[
        str,
        typer.Option(
            help="balanced: every class equally often; uniform: drawn; or classes such as 1,2,3 or 0-9.",
            rich_help_panel="Sampling",
        ),
    ] = "balanced",
    steps: Steps = 25,
    seed: Seed = 0,
    guidance: Guidance = None,
    prompts: Prompts = None,
    height: Height = None,
    width: Width = None,
    num_frames: Frames = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder that keeps images; the same command again continues from there.")
    ] = None,
    float_work: Annotated[
        Path | None, typer.Option(help="Folder for images of the float pipeline, to share them between evaluations.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove images of other settings in --work, and make them anew.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Make only share I of N, such as 0/4; then run without it.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Picture: float above quantized, their difference below.")
    ] = None,
    features: Annotated[
        str | None, _network("features", "Feature extractor in place of Inception, as module:attribute.")
    ] = None,
    features_input: Annotated[
        str, _network("features-input", "What --features is called on: unit for floats in 0 to 1, or uint8.")
    ] = "unit",
    inception: Annotated[
        Path | None, _network("inception", "Weights of the Inception network; or FXQUANT_INCEPTION.")
    ] = None,
    lpips: Annotated[Path | None, _network("lpips", "Weights of AlexNet for LPIPS; or FXQUANT_LPIPS.")] = None,
    clip: Annotated[Path | None, _network("clip", "Folder of a CLIP model; or FXQUANT_CLIP.")] = None,
    max_fid: Annotated[float | None, _limit("max-fid", "Highest FID.")] = None,
    max_sfid: Annotated[float | None, _limit("max-sfid", "Highest sFID.")] = None,
    max_fid_to_float: Annotated[float | None, _limit("max-fid-to-float", "Highest FID to the float images.")] = None,
    max_lpips: Annotated[float | None, _limit("max-lpips", "Highest LPIPS.")] = None,
    min_psnr: Annotated[float | None, _limit("min-psnr", "Lowest PSNR in dB.")] = None,
    min_ssim: Annotated[float | None, _limit("min-ssim", "Lowest SSIM.")] = None,
    min_inception_score: Annotated[float | None, _limit("min-inception-score", "Lowest inception score.")] = None,
    min_precision: Annotated[float | None, _limit("min-precision", "Lowest precision.")] = None,
    min_recall: Annotated[float | None, _limit("min-recall", "Lowest recall.")] = None,
    min_clip_score: Annotated[float | None, _limit("min-clip-score", "Lowest CLIP score.")] = None,
    allow_packages: Annotated[
        bool, typer.Option("--allow-packages", help="Load packages, compiled ahead of time: programs that run here.")
    ] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure the images of a quantized pipeline: FID, sFID, IS, precision, recall, CLIP score, LPIPS, PSNR, SSIM."""
    limits = {
        "fid": max_fid,
        "sfid": max_sfid,
        "fid_to_float": max_fid_to_float,
        "lpips": max_lpips,
        "psnr": min_psnr,
        "ssim": min_ssim,
        "inception_score": min_inception_score,
        "precision": min_precision,
        "recall": min_recall,
        "clip_score": min_clip_score,
    }
    given = {name: limit for name, limit in limits.items() if limit is not None}
    with quiet(), status("importing torch and diffusers"):
        import fxquant
        from fxquant.evaluation.sources import check_pipeline, device_of_rank

        place = device_of_rank(device)
        for source in (quantized, *([] if reference is None else [reference])):
            check_pipeline(source)
    with quiet(), progress_bars() as bars:
        task = bars.add_task("evaluate", total=None)
        found = fxquant.evaluate(
            lambda: open_pipeline(quantized, device=place, trust_packages=allow_packages),
            None if reference is None else lambda: open_pipeline(reference, device=place),
            images=images,
            batch=batch,
            steps=steps,
            seed=seed,
            guidance=guidance,
            labels=labels if labels in ("balanced", "uniform") else read_labels(labels),  # type: ignore[arg-type]
            prompts=None if prompts is None else read_prompts(prompts),
            sizes=sizes_of(height, width, num_frames),
            against=against,
            metrics=None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()],
            limits=given,
            features=features,
            takes=features_input,  # type: ignore[arg-type]
            inception=inception,
            lpips=lpips,
            clip=clip,
            sfid_images=sfid_images,
            work=work,
            float_work=float_work,
            overwrite=overwrite,
            shard=None if shard is None else _shard(shard),
            picture=picture,
            device=place,
            progress=lambda what, done, total: bars.update(task, description=what, completed=done, total=total),
        )
    if found is None:
        rest = f"; when all are, the same command without --shard measures{' and checks the limits' if given else ''}"
        err.print(Text(f"share {shard} is made{rest}" if shard else "this rank's share is made"), soft_wrap=True)
        return
    _show(found, given, as_json)


def _show(found: Evaluation, limits: dict[str, float], as_json: bool) -> None:
    for note in found.notes:
        err.print(Text(note), soft_wrap=True)
    failures: dict[str, str] = {}
    try:
        found.check(limits)
    except GateError as error:
        failures = error.failures
    if as_json:
        print_json(found.to_json() | {"limits": json_values(limits), "failures": failures})
    else:
        print_plain(found.table())
    for failure in failures.values():
        print_error(failure)
    if failures:
        raise typer.Exit(_FAILED)


def _shard(text: str) -> tuple[int, int]:
    first, _, last = text.partition("/")
    try:
        return int(first), int(last)
    except ValueError:
        raise ConfigurationError(f"--shard {text}: write it as I/N, such as 0/4 for the first of four shares") from None
