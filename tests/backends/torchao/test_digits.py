"""The trained pipeline on this backend: the images of the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxquant
from examples.digits import compare, generate, load_classifier, load_pipeline
from fxquant.quantizer import sqnr_db

LABELS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.slow
def test_images_are_those_of_the_oracle(tmp_path: Path) -> None:
    pipe, classifier = load_pipeline(), load_classifier()
    oracle = fxquant.compile(
        pipe.transformer,
        recipe="ptq4dit-w8a8",
        calibrate=lambda: generate(pipe, LABELS, seed=1, steps=5),
        measure=0,
    )
    fxquant.save(oracle, tmp_path / "made")
    mine = fxquant.load(tmp_path / "made", backend="torchao")
    images = []
    for model in (oracle, mine):
        with compare.transformer_of(pipe, model):
            images.append(generate(pipe, LABELS, seed=5, steps=6))
    assert sqnr_db(*images) > 45.0
    read = [classifier(made * 2 - 1).argmax(1) for made in images]
    assert torch.equal(*read)
