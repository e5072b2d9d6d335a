"""Draws the pictures of the documentation into ``docs/pictures``: ``python -m docs.tools.pictures``, in a minute.

They show blocks of the digits model, which has the architecture of DiT, before and after the passes of a recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch import fx, nn

import fxquant
from docs.tools import block

TITLES = {
    "remove-no-ops": ("captured", "Captured: ATen ops, as the model computes them"),
    "balance-channels": ("balanced", "After balance-channels: divisions before the linears, weights multiplied"),
    "absorb-affines": ("transformed", "After absorb-affines: the divisions are in the weights of adaLN and V"),
    "quantize-linears": ("quantized", "After quantize-linears: integer products"),
}
"""Name and title of the picture that follows a pass."""


class Pictures:
    """Instrument that draws a block after each pass of :data:`TITLES`."""

    def __init__(self, folder: Path, name: str = "transformer_blocks.0") -> None:
        self.folder = folder
        self.name = name

    def before(self, step: Any, module: fx.GraphModule) -> None:
        """Nothing to draw."""

    def after(self, step: Any, module: fx.GraphModule, record: Any) -> None:
        """Draw the block."""
        if step.name in TITLES:
            picture, title = TITLES[step.name]
            block.draw(block.boxes_of(module, self.name), self.folder / f"block-{picture}.svg", title)

    def failed(self, step: Any, module: fx.GraphModule, error: Exception) -> None:
        """Nothing to draw."""


def draw_block(model: nn.Module, calibrate: Any, folder: Path) -> None:
    """Quantize a model with PTQ4DiT and draw its first block."""
    fxquant.compile(model, recipe="ptq4dit-w4a8", calibrate=calibrate, instruments=[Pictures(folder)], measure=0)


def main() -> None:
    """Draw all pictures."""
    from examples.digits import load_pipeline, plant_salience
    from examples.digits.pictures import draw_salience

    folder = Path(__file__).resolve().parents[1] / "pictures"
    folder.mkdir(exist_ok=True)
    pipe, seen = load_pipeline(), fxquant.Statistics()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = plant_salience(pipe.transformer)
    model = pipe.transformer

    def calibrate() -> None:
        pipe(class_labels=list(range(10)), num_inference_steps=25)

    draw_block(model, calibrate, folder)
    quantized = fxquant.compile(model, recipe="ptq4dit-w4a8", calibrate=calibrate, statistics=seen, measure=0)
    picture = folder / "salience.png"
    draw_salience(seen, quantized.plan, 3, picture)
    Image.open(picture).convert("RGB").resize((1028, 778)).quantize(64).save(picture, optimize=True)


if __name__ == "__main__":
    main()
