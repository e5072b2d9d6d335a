"""Train the digits models: `python -m examples.digits.train` from the root of the repository.

The run can be killed at any time; the same command continues from the last snapshot in the output folder.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .data import digits
from .generator import build_pipeline, build_scheduler, build_transformer, build_vae
from .judge import DigitClassifier, save_classifier
from .stages import classifier_stage, encode_copies, sampled_deviation, transformer_stage, vae_stage
from .trainer import OnStep, fit, save_atomically

RUNS = Path(__file__).parent / "runs"


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths of a run; steps are optimiser steps."""

    vae_steps: int = 1000
    classifier_steps: int = 800
    dit_steps: int = 4000
    snapshot_every: int = 200
    copies: int = 24
    blocks: int = 8
    heads: int = 4
    head_dim: int = 32
    vae_widths: tuple[int, ...] = (16, 32, 64)


SMOKE = Recipe(4, 4, 6, snapshot_every=2, copies=1, blocks=2, heads=2, head_dim=16, vae_widths=(8, 8, 8))


def train(recipe: Recipe, out: Path, seed: int = 0, progress: OnStep | None = None) -> None:
    """Train all three models and write `out/pipeline` and `out/classifier`; snapshots go to `out/snapshots`.

    Weights are stored in half precision, and loading casts them to float32. Figures are measured on the loaded model.

    Raises:
        ValueError: if snapshots in `out` belong to another seed or another number of steps.
    """
    torch.manual_seed(seed)  # the initial weights; every later draw has its own generator
    images, labels = digits("train")
    snapshots = out / "snapshots"
    fit_stage = partial(fit, seed=seed, folder=snapshots, snapshot_every=recipe.snapshot_every, progress=progress)
    vae = build_vae(recipe.vae_widths)
    classifier = DigitClassifier()
    transformer = build_transformer(recipe.blocks, recipe.heads, recipe.head_dim)

    fit_stage(vae_stage(vae, images, recipe.vae_steps))
    fit_stage(classifier_stage(classifier, images, labels, recipe.classifier_steps))

    cache = snapshots / "latents.pt"
    if not cache.is_file():
        save_atomically(encode_copies(vae, images, recipe.copies, seed), cache)
    moments = torch.load(cache, weights_only=True)
    vae.register_to_config(scaling_factor=round(1 / sampled_deviation(moments), 5))
    stage = transformer_stage(
        transformer, moments, labels, vae.config.scaling_factor, build_scheduler(), recipe.dit_steps
    )
    fit_stage(stage)

    build_pipeline(transformer.half(), vae.half()).save_pretrained(out / "pipeline")
    save_classifier(classifier.half(), out / "classifier")


def show_on(display: Progress) -> OnStep:
    """One bar per stage on `display`, with a running mean of the loss."""
    bars: dict[str, TaskID] = {}
    means: dict[str, float] = {}

    def show(name: str, done: int, total: int, loss: float) -> None:
        if name not in bars:
            bars[name] = display.add_task(name, total=total, loss="")
        means[name] = 0.98 * means.get(name, loss) + 0.02 * loss
        display.update(bars[name], completed=done, loss=f"loss {means[name]:.4f}")

    return show


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    defaults = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RUNS / "default", help="output folder, also holds the snapshots")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=defaults.vae_steps)
    parser.add_argument("--classifier-steps", type=int, default=defaults.classifier_steps)
    parser.add_argument("--dit-steps", type=int, default=defaults.dit_steps)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; other counts round differently")
    parser.add_argument("--smoke", action="store_true", help="a tiny model for a few steps, to test the training code")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    recipe = Recipe(options.vae_steps, options.classifier_steps, options.dit_steps)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as display:
        train(SMOKE if options.smoke else recipe, options.out, options.seed, show_on(display))


if __name__ == "__main__":
    main()
