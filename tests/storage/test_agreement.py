"""Balance factors and shifts of a checkpoint have to be those of its plan: a LoRA that is loaded later needs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import fxquant
from fxquant.errors import CheckpointError
from tests.mutations.damage import sign
from tests.tiny import calibrate, make_dit

LAYER = "transformer_blocks.0.attn1.to_out.0"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tensors, name: tensors.pop(name), f"the balance factors of layer '{LAYER}' are missing"),
        (
            lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()}),
            rf"the balance factors of layer '{LAYER}' have shape \(15,\), not \(16,\)",
        ),
        (
            lambda tensors, name: tensors.update({f"{name}.shift": tensors[name][None].clone()}),
            f"there are shifts of layer '{LAYER}', which the plan does not shift",
        ),
    ],
)
def test_factors_and_shifts_that_do_not_fit_are_refused(damage: Callable[..., Any], words: str, tmp_path: Path) -> None:
    model = make_dit()
    made = fxquant.compile(model, recipe="smoothquant-w4a16-g4", calibrate=calibrate(model), measure=0)
    fxquant.save(made, tmp_path / "q")
    path = tmp_path / "q" / "plan.safetensors"
    tensors = load_file(path)
    damage(tensors, LAYER)
    save_file(tensors, path)
    sign(tmp_path / "q")
    with pytest.raises(CheckpointError, match=words):
        fxquant.load(tmp_path / "q")
