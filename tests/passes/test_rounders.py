"""What GPTQ reads of a layer's input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.numerics.rounding.feedback import FEW
from fxquant.passes import _rounders
from fxquant.planning.context import PassContext
from fxquant.planning.layer_inputs import moments
from tests.tiny import calibrate, make_dit


@pytest.mark.parametrize("recipe", ["htg-gptq-w4a8", "ptq4dit-gptq-w4a8", "quarot-gptq-w4a4"])
def test_few_rows_have_the_moments_of_the_input(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after shifts, balancing and rotations."""
    seen: dict[str, float] = {}
    inputs = _rounders.GPTQ.inputs

    def compared(self: _rounders.GPTQ, name: str, context: PassContext) -> Tensor:
        found, expected = inputs(self, name, context), moments(context, name)
        assert expected is not None
        if found.shape != expected.shape:
            assert FEW * len(found) <= found.shape[1] and found.dtype == torch.float64
            seen[name] = float((found.T @ found - expected).abs().max() / expected.abs().max())
        return found

    monkeypatch.setattr(_rounders.GPTQ, "inputs", compared)
    model = make_dit(attention_head_dim=384)
    statistics = fxquant.Statistics()  # Kept, so that matrices are not rounded to 16 bits.
    fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), statistics=statistics, measure=0)
    assert "transformer_blocks.0.attn1.to_q" in seen  # Its input is shifted, balanced or rotated.
    assert max(seen.values()) < 1e-5, seen
