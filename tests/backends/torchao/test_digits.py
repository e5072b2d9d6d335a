"""The trained pipeline on this backend: noise and images of the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxquant
from examples.digits import compare, generate, load_classifier, load_pipeline
from fxquant.numerics.sqnr import sqnr_db

LABELS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.slow
@pytest.mark.exhaustive  # ``make test`` runs small models on this backend, and this model on native.
def test_noise_and_images_are_those_of_the_oracle(tmp_path: Path) -> None:
    """The noise of single calls is compared in dB: over a whole generation differences of rounding grow."""
    pipe, classifier = load_pipeline(), load_classifier()
    oracle = fxquant.compile(
        pipe.transformer,
        recipe="ptq4dit-w8a8",
        calibrate=lambda: generate(pipe, LABELS, seed=1, steps=5),
        measure=0,
    )
    fxquant.save(oracle, tmp_path / "made")
    mine = fxquant.load(tmp_path / "made", backend="torchao")
    size = oracle.config.sample_size
    call = {
        "hidden_states": torch.randn(
            8, oracle.config.in_channels, size, size, generator=torch.Generator().manual_seed(0)
        ),
        "timestep": torch.tensor([999, 900, 700, 500, 300, 200, 100, 0]),
        "class_labels": torch.tensor(LABELS),
    }
    with torch.no_grad():
        noise = [model(**call).sample for model in (oracle, mine)]
    assert sqnr_db(*noise) > 45.0
    read = []
    for model in (oracle, mine):
        with compare.transformer_of(pipe, model):
            read.append(classifier(generate(pipe, LABELS, seed=5, steps=6) * 2 - 1).argmax(1))
    assert torch.equal(*read)
