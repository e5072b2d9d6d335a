"""Draws the pictures of the demo."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics

matplotlib.use("Agg")
from matplotlib import pyplot


def draw_samples(shown: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """Draw a grid for each model: float in the first row, one row per recipe, the same seed in each column.

    Args:
        shown: Images [n, 3, H, W] in [0, 1], by model and recipe.
        path: The PNG to write.
    """
    rows = max(len(recipes) for recipes in shown.values())
    figure, axes = pyplot.subplots(1, len(shown), figsize=(7.2 * len(shown), 0.62 * rows + 0.7), squeeze=False)
    for axis, (model, recipes) in zip(axes[0], shown.items(), strict=True):
        strips = [torch.cat(list(images), dim=2) for images in recipes.values()]
        height = strips[0].shape[1]
        axis.imshow(torch.cat(strips, dim=1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(f"{model} model")
        axis.set_anchor("N")  # Aligns rows of the same recipe, even if one model has more rows.
        axis.set_yticks([height * (number + 0.5) for number in range(len(strips))], list(recipes))
        axis.set_xticks([])
        axis.tick_params(length=0)
        for number in range(1, len(strips)):
            axis.axhline(height * number - 0.5, color="white", linewidth=1.5)
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def draw_salience(statistics: Statistics, plan: Plan, block: int, path: Path) -> None:
    """Draw max |activation| by channel and timestep, before and after balancing, for the balanced inputs of a block.

    Args:
        statistics: Statistics of the calibration.
        plan: The plan decided from these statistics, with the balance factors.
        block: Number of the transformer block.
        path: The PNG to write.
    """
    places = {"attn1.to_q": "q, k, v", "attn1.to_out.0": "attention output", "ff.net.0.proj": "first feed-forward"}
    figure, axes = pyplot.subplots(len(places), 2, figsize=(12, 3.1 * len(places)), sharex=True, squeeze=False)
    colours = pyplot.get_cmap("viridis")
    for row, (suffix, title) in zip(axes, places.items(), strict=True):
        name = f"transformer_blocks.{block}.{suffix}"
        seen = statistics[plan.layers[name].observed or name]
        before = seen.absmax
        after = (before.double() / plan.vectors[name]).float()
        last = len(seen.timesteps) - 1
        for axis, values, when in zip(row, (before, after), ("before", "after"), strict=True):
            for number in range(last, -1, -1):
                axis.plot(values[number], color=colours(number / max(last, 1)), linewidth=0.8)
            axis.set_title(f"input of {title}, {when} balancing")
            axis.set_ylim(0, 1.05 * float(before.max()) if when == "before" else 1.05 * float(after.max()))
            axis.set_ylabel("max |activation|")
    for axis in axes[-1]:
        axis.set_xlabel("channel")
    scale = pyplot.cm.ScalarMappable(pyplot.Normalize(0, float(seen.timesteps.max())), colours)
    figure.tight_layout()
    figure.colorbar(scale, ax=axes, label="timestep", fraction=0.02, pad=0.01)
    figure.suptitle(f"Block {block}: one line per timestep (note the scales)", y=1.01)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
