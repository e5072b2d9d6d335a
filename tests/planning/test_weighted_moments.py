"""Second moments in which timesteps have weights."""

from __future__ import annotations

import pytest
import torch

from fxquant.planning.weighted_moments import interpolated, weighted_moments


def rows(seed: int, count: int = 2000) -> list[torch.Tensor]:
    """Rows of 4 channels at three timesteps: each has its own large channel."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(count, 4, generator=generator) * torch.tensor([9.0 if c == t else 1.0 for c in range(4)])
        for t in range(3)
    ]


def moments(of: list[torch.Tensor], shares: list[float]) -> torch.Tensor:
    parts = [share * own.double().T @ own.double() / len(own) for share, own in zip(shares, of, strict=True)]
    return torch.stack(parts).sum(0) / sum(shares)


def test_equal_weights_give_what_was_recorded() -> None:
    recorded = moments(rows(0), [1, 1, 1])
    found = weighted_moments(recorded, rows(1, 50), [1.0, 2.0, 3.0], dict.fromkeys((1.0, 3.0), 0.25))
    assert torch.allclose(found, recorded, rtol=1e-9, atol=1e-9)


def test_weights_move_the_moments_to_those_of_their_timesteps() -> None:
    shares = [4.0, 2.0, 0.5]
    recorded, exact = moments(rows(0), [1, 1, 1]), moments(rows(0), shares)
    found = weighted_moments(recorded, rows(1), [1.0, 2.0, 3.0], dict(zip((1.0, 2.0, 3.0), shares, strict=True)))
    assert (found - exact).norm() < 0.05 * exact.norm() < 0.2 * (recorded - exact).norm()


def test_few_rows_are_corrected_by_the_recorded_moments() -> None:
    shares, steps = [1.5, 1.0, 0.8], [1.0, 2.0, 3.0]
    recorded, exact = moments(rows(0), [1, 1, 1]), moments(rows(0), shares)
    few = rows(2, 20)
    found = weighted_moments(recorded, few, steps, dict(zip(steps, shares, strict=True)))
    assert (found - exact).norm() < 0.5 * (moments(few, shares) - exact).norm()


def test_weights_between_timesteps_are_interpolated_and_zeros_left_out() -> None:
    found = interpolated({0.0: 1.0, 100.0: 100.0, 50.0: 0.0}, [-5.0, 0.0, 50.0, 200.0])
    assert found.tolist() == pytest.approx([1, 1, 10, 100])
    assert interpolated({0.0: 0.0}, [0.0, 1.0]).tolist() == [0, 0]
    recorded = moments(rows(0), [1, 1, 1])
    assert weighted_moments(recorded, rows(1), [1.0, 2.0, 3.0], {1.0: 0.0}) is recorded
