"""The trained pipelines on this backend: noise and images of the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from torch import Tensor

import fxquant
from examples.digits import compare, generate, load_classifier, load_pipeline
from fxquant.backends.native import Native, machine
from fxquant.numerics.sqnr import sqnr_db
from fxquant.runtime.model import GraphModel

LABELS = [3, 1, 4, 1, 5, 9, 2, 6]
MISSING = machine.missing_kernels()
OWN = pytest.mark.skipif(MISSING is not None, reason=f"no compiled kernels: {MISSING}")
RUNNERS = {
    "float": (Native("compiled", attention="float"), 45.0),
    "bf16": (Native("compiled"), 38.0),
    "onednn": (Native("onednn"), 45.0),
}
"""Kernels, each with the least SQNR in dB of the noise against the oracle's."""

RECIPES = [("ptq4dit-w8a8", "default"), ("htg-w8a8", "all"), ("ptq4dit-w4a8", "default")]
"""Recipes and layers."""

SAMPLE = {"bf16": RECIPES[1]}
"""Kernels that `make test` runs, with recipe and layers."""


def cases() -> list[object]:
    """Every recipe on all kernels; exhaustive outside of the sample."""
    found = []
    for recipe in RECIPES:
        for runner in RUNNERS:
            marks = [] if runner == "onednn" else [OWN]
            marks += [] if SAMPLE.get(runner) == recipe else [pytest.mark.exhaustive]
            found.append(pytest.param(recipe, runner, marks=marks, id=f"{recipe[0]}-{runner}"))
    return found


@pytest.fixture(scope="module")
def pipe() -> DiTPipeline:
    return load_pipeline()


@pytest.fixture(scope="module")
def checkpoint(pipe: DiTPipeline, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe, layers = request.param
    folder = tmp_path_factory.mktemp("digits") / "made"
    made = fxquant.compile(
        pipe.transformer,
        recipe=fxquant.make_recipe(recipe, layers),
        calibrate=lambda: generate(pipe, LABELS, seed=1, steps=4),
        measure=0,
    )
    fxquant.save(made, folder)
    return folder


def made_by(model: GraphModel, pipe: DiTPipeline) -> tuple[Tensor, Tensor]:
    """The predicted noise of a call, and images."""
    call = {
        "hidden_states": torch.randn(8, *_sample_shape(model), generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([999, 900, 700, 500, 300, 200, 100, 0]),
        "class_labels": torch.tensor(LABELS),
    }
    with torch.no_grad():
        noise = model(**call).sample
    with compare.transformer_of(pipe, model):
        return noise, generate(pipe, LABELS, seed=5, steps=4)


@pytest.fixture(scope="module")
def oracle(checkpoint: Path, pipe: DiTPipeline) -> tuple[Tensor, Tensor]:
    return made_by(fxquant.load(checkpoint, backend="fake-quant"), pipe)


@pytest.mark.slow
@pytest.mark.parametrize(("checkpoint", "runner"), cases(), indirect=["checkpoint"])
def test_noise_and_images_are_those_of_the_oracle(
    checkpoint: Path, oracle: tuple[Tensor, Tensor], pipe: DiTPipeline, runner: str
) -> None:
    backend, floor = RUNNERS[runner]
    mine = made_by(fxquant.load(checkpoint, backend=backend), pipe)
    assert sqnr_db(oracle[0], mine[0]) > floor
    classifier = load_classifier()
    assert torch.equal(*(classifier(images * 2 - 1).argmax(1) for _, images in (oracle, mine)))


def _sample_shape(model: GraphModel) -> tuple[int, int, int]:
    config = model.config
    return config.in_channels, config.sample_size, config.sample_size
