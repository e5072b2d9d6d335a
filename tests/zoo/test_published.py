"""Models as their authors published them, sampled by their own code: quantized in place, saved, and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.errors import CheckpointError
from tests.zoo.models import CAPTURED
from tests.zoo.own_published import PublishedDiT, PublishedMMDiT
from tests.zoo.test_zoo import sqnr

pytestmark = pytest.mark.filterwarnings("ignore::fxquant.errors.QualityWarning")
STEPS = (900, 500, 100)


def made(name: str) -> Any:
    return next(entry for entry in CAPTURED if entry.name == name).model()


def sample(model: Callable[..., Tensor], channels: int, size: int = 8, images: int = 2, **arguments: Any) -> Tensor:
    """Images of a few Euler steps, by positional arguments as samplers of diffusion give them."""
    x = torch.randn(images, channels, size, size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for step in STEPS:
            x = x - 0.1 * model(x, torch.full((images,), step), **arguments)[:, :channels]
    return x


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["rtn-w8a8", pytest.param("ptq4dit-w4a8", marks=pytest.mark.exhaustive)])
def test_a_dit_with_guidance_in_a_method(recipe: str, tmp_path: Path) -> None:
    model = made("PublishedDiT")
    labels = {"y": torch.tensor([1, 2, 10, 10]), "cfg_scale": 4.0}
    expected = sample(model.forward_with_cfg, 4, images=4, **labels)
    quantized = fxquant.compile(
        model,
        recipe=recipe,
        calibrate=lambda: sample(model.forward_with_cfg, 4, images=4, **labels),
        timestep="t",
    )
    found = sample(quantized.forward_with_cfg, 4, images=4, **labels)
    assert sqnr(found, expected) > (30 if recipe.endswith("w8a8") else 12)
    assert (quantized.in_channels, quantized.patch_size) == (4, 2)  # As their samplers read them.
    fxquant.save(quantized, tmp_path / "dit")
    with pytest.raises(CheckpointError, match="PublishedDiT"):
        fxquant.load(tmp_path / "dit")
    for given in (PublishedDiT, made("PublishedDiT")):
        loaded = fxquant.load(tmp_path / "dit", model=given)
        assert torch.equal(sample(loaded.forward_with_cfg, 4, images=4, **labels), found)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        fxquant.load(tmp_path / "dit", model=PublishedMMDiT().eval())


@pytest.mark.exhaustive
def test_an_mmdit_at_other_sizes_and_without_a_vector(tmp_path: Path) -> None:
    model = made("PublishedMMDiT")
    prompt = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    usual = {"y": torch.randn(2, 10, generator=torch.Generator().manual_seed(1)), "context": prompt}
    quantized = fxquant.compile(
        model, recipe="ptq4dit-w8a8", calibrate=lambda: sample(model, 4, **usual), timestep="t", measure=0
    )
    fxquant.save(quantized, tmp_path / "mmdit", needs_model=True)
    loaded = fxquant.load(tmp_path / "mmdit", model=made("PublishedMMDiT"))
    for size, arguments in ((8, usual), (12, usual), (8, {"context": prompt}), (4, usual | {"context": prompt[:, :3]})):
        found = sample(quantized, 4, size, **arguments)
        assert sqnr(found, sample(model, 4, size, **arguments)) > 25
        assert torch.equal(sample(loaded, 4, size, **arguments), found)
