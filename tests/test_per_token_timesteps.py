"""Timesteps ``[batch, tokens]``: Wan 2.2 makes a video from its first frame, whose tokens have timestep 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.errors import QualityWarning
from tests.zoo.models import ENTRIES
from tests.zoo.test_zoo import run, sqnr

WAN = next(entry for entry in ENTRIES if entry.name == "WanTransformer3DModel")
LAYER = "blocks.1.attn1.to_q"
STEPS = (900.0, 500.0, 100.0)


def call(step: float, batch: int = 2, size: int = 8, seed: int = 0) -> dict[str, Any]:
    """Two frames, the first of them given."""
    times = torch.full((batch, 2, size // 2, size // 2), step)
    times[:, 0] = 0
    return WAN.call(batch, seed=seed, size=size) | {"timestep": times.flatten(1)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_token_is_calibrated_at_its_own_timestep(tmp_path: Path) -> None:
    model, statistics, seen = WAN.model(), fxquant.Statistics(), []
    hook = model.get_submodule(LAYER).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for seed, step in enumerate(STEPS):
        run(model, call(step, seed=seed))
    hook.remove()
    with pytest.warns(QualityWarning, match=r"timestep has shape \[batch, 32\].*share one shift and one range"):
        quantized = fxquant.compile(
            model,
            recipe="htg-w8a8",
            calibrate=lambda: [run(model, call(step, seed=seed)) for seed, step in enumerate(STEPS)],
            statistics=statistics,
            measure=0,
        )

    def extremes(values: list[Tensor]) -> tuple[Tensor, Tensor]:
        rows = torch.cat([value.flatten(0, 1) for value in values])
        return rows.amin(0), rows.amax(0)

    found = statistics[LAYER]
    assert found.timesteps.tolist() == [0.0, *sorted(STEPS)]
    expected = [extremes([value[:, :16] for value in seen]), *(extremes([value[:, 16:]]) for value in seen[::-1])]
    for place, (low, high) in enumerate(expected):
        torch.testing.assert_close(found.minimum[place], low, rtol=1e-4, atol=1e-5, check_dtype=False)
        torch.testing.assert_close(found.maximum[place], high, rtol=1e-4, atol=1e-5, check_dtype=False)

    groups = quantized.plan.layers[LAYER].timesteps
    assert groups is not None and groups.boundaries == []
    assert "the timestep has shape [batch, 32], not one number a sample" in str(fxquant.report(quantized))
    # The same model with one timestep for all tokens, at another batch size and at another height.
    others = [call(500.0, batch=3, seed=7), call(500.0, size=4, seed=7), WAN.call(2, seed=7, step=500.0)]
    outputs = [run(quantized, other) for other in others]
    for other, output in zip(others, outputs, strict=True):
        assert sqnr(output, run(model, other)) > 30
    assert len(quantized.graphs) == 3
    fxquant.save(quantized, tmp_path / "wan")
    loaded = fxquant.load(tmp_path / "wan")
    for other, output in zip(others, outputs, strict=True):
        assert torch.equal(run(loaded, other), output)
