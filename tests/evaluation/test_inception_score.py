"""The inception score equals its definition and that of a library on equal scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.errors import ConfigurationError
from fxquant.evaluation.inception_score import InceptionScore

LOGITS = 4 * torch.randn(503, 12, generator=torch.Generator().manual_seed(0))


def score(logits: Tensor, splits: int, batch: int) -> tuple[float, float]:
    found = InceptionScore(len(logits), splits)
    for part in logits.split(batch):
        found.add(part)
    return found.compute()


@pytest.mark.parametrize(("splits", "batch"), [(1, 503), (10, 7), (4, 200)])
def test_score_equals_its_definition(splits: int, batch: int) -> None:
    p = LOGITS.double().softmax(dim=1).numpy()
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        kl = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(kl.sum(axis=1).mean()))
    assert score(LOGITS, splits, batch) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


def test_score_equals_that_of_torch_fidelity() -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_isc")
    known = fidelity.isc_features_to_metric(LOGITS, splits=10, shuffle=False)
    assert score(LOGITS, 10, 32) == pytest.approx(tuple(known.values()), rel=1e-6)


def test_bounds() -> None:
    assert score(torch.zeros(40, 5), 4, 8) == pytest.approx((1, 0))
    sure = 1000 * torch.nn.functional.one_hot(torch.arange(40) % 5, 5).double()
    assert score(sure, 4, 8) == pytest.approx((5, 0))


def test_wrong_numbers_of_images_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 10 images"):
        InceptionScore(9)
    found = InceptionScore(20)
    found.add(LOGITS[:19])
    with pytest.raises(ConfigurationError, match="19 of 20"):
        found.compute()
    with pytest.raises(ConfigurationError, match="more than 20"):
        found.add(LOGITS[:2])
