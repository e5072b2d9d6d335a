"""Blocks of other transformers: two streams, frames folded into the batch, a fixed batch, writes in place."""

from __future__ import annotations

import pytest

import fxquant
from fxquant.pipeline.recipes import make_recipe
from tests.zoo.audit import STEPS
from tests.zoo.models import CAPTURED, Entry
from tests.zoo.test_zoo import run, sqnr

NAMES = ("PixArt2D-Sigma", "SD32D", "Wan3D", "Latte3D", "Mochi3D")
SAMPLE = ("SD32D", "Wan3D")
ENTRIES = [
    pytest.param(entry, id=entry.id, marks=[] if entry.id in SAMPLE else [pytest.mark.exhaustive])
    for entry in CAPTURED
    if entry.id in NAMES
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", ENTRIES)
def test_blocks_are_learned_one_after_the_other(entry: Entry) -> None:
    options = {"iterations": 20, "rounding_rate": 0.05, "samples": 32}
    recipe = make_recipe("rtn-reconstruct-w4a8").with_options("reconstruct-blocks", **options)
    model = entry.model()
    quantized = fxquant.compile(
        model,
        recipe=recipe,
        calibrate=lambda: [run(model, entry.call(step=step, seed=seed)) for seed, step in enumerate(STEPS[:2])],
        timestep=entry.timestep,
        measure=0,
    )
    learned = quantized.plan.reconstruction
    blocks = {name.partition("@")[0] for name in learned if ".0" in name or ".1" in name}
    assert len(blocks) >= 2
    assert all(after >= before for before, after in learned.values())
    assert any(after > before + 0.1 for before, after in learned.values())
    call = entry.call(seed=7, step=500.0)
    assert sqnr(run(quantized, call), run(model, call)) > 3
    assert len(ENTRIES) == len(NAMES)
