"""Precision and recall equal their definition and those of a library on equal features."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor

from fxquant.errors import ConfigurationError
from fxquant.evaluation import precision_recall as module
from fxquant.evaluation.precision_recall import precision_recall


def by_definition(made: Tensor, real: Tensor, k: int) -> tuple[float, float]:
    def inside(points: np.ndarray, manifold: np.ndarray) -> float:
        within = np.linalg.norm(manifold[:, None] - manifold[None], axis=2)
        radii = np.sort(within, axis=1)[:, k]
        return float((np.linalg.norm(points[:, None] - manifold[None], axis=2) <= radii).any(axis=1).mean())

    a, b = made.double().numpy(), real.double().numpy()
    return inside(a, b), inside(b, a)


@pytest.mark.parametrize("k", [1, 3])
def test_both_equal_their_definition(two_sets: tuple[Tensor, Tensor], k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 77)
    made, real = two_sets[0][:, :4], 1.3 * two_sets[1][:, :4] - 9
    expected = by_definition(made, real, k)
    assert precision_recall(made, real, k) == pytest.approx(expected, abs=1e-12)
    assert 0.05 < expected[1] < expected[0] < 1  # The two differ, so that they cannot be mixed up.


def test_both_equal_those_of_torch_fidelity(two_sets: tuple[Tensor, Tensor]) -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    made, real = two_sets[0][:, :4].double(), two_sets[1][:, :4].double()
    assert precision_recall(made, real) == pytest.approx(fidelity.calculate_precision_recall_full(made, real, 3))


def test_extremes(two_sets: tuple[Tensor, Tensor]) -> None:
    assert precision_recall(two_sets[0], two_sets[0]) == (1, 1)
    assert precision_recall(two_sets[0], two_sets[1] + 1000) == (0, 0)


def test_wrong_features_are_refused(two_sets: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ConfigurationError, match="more than 3"):
        precision_recall(two_sets[0][:3], two_sets[1])
    with pytest.raises(ConfigurationError, match="one extractor"):
        precision_recall(two_sets[0], two_sets[1][:, :5])
