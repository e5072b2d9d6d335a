from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.errors import ConfigurationError
from fxquant.numerics.hadamard import check_block, hadamard_matrix, largest_block, rotate, rotate_back
from fxquant.numerics.low_rank import low_rank_factors


@pytest.mark.parametrize("block", [1, 2, 16, 128])
def test_the_matrix_is_symmetric_and_orthogonal(block: int) -> None:
    matrix = hadamard_matrix(block, torch.float64, torch.device("cpu"))
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(block, dtype=torch.float64), atol=1e-14, rtol=0)


def test_a_rotation_keeps_products_and_is_undone() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(3, 5, 24, dtype=torch.float64), torch.randn(7, 24, dtype=torch.float64)
    signs = (torch.randint(0, 2, (24,)) * 2 - 1).to(torch.int8)
    torch.testing.assert_close(rotate(x, signs, 8) @ rotate(w, signs, 8).T, x @ w.T, atol=1e-13, rtol=0)
    torch.testing.assert_close(rotate_back(rotate(x, signs, 8), signs, 8), x, atol=1e-14, rtol=0)


def test_blocks() -> None:
    assert [largest_block(channels) for channels in (1152, 72, 64, 7)] == [128, 8, 64, 1]
    with pytest.raises(ConfigurationError, match="blocks of 256 channels do not divide 1152; choose at most 128"):
        check_block(256, 1152)
    for block in (0, 12):
        with pytest.raises(ConfigurationError, match="power of two"):
            check_block(block, 1152)


def test_a_matrix_that_is_first_needed_among_fake_tensors_is_real() -> None:
    hadamard_matrix.cache_clear()
    with FakeTensorMode():
        made = hadamard_matrix(4, torch.float32, torch.device("cpu"))
    assert type(made) is torch.Tensor


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_factors_are_the_best_approximation(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    left, right = low_rank_factors(weight, 5)
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(left @ right, (u[:, :5] * s[:5]) @ v[:5], atol=1e-12, rtol=0)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_factors_of_important_columns(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, importance = torch.randn(shape, dtype=torch.float64), torch.rand(shape[1], dtype=torch.float64)
    importance[0] = 0

    def error(factors: tuple[torch.Tensor, torch.Tensor]) -> float:
        return float(((weight - factors[0] @ factors[1]).square() * importance).sum())

    found = low_rank_factors(weight, 5, importance)
    assert all(bool(part.isfinite().all()) for part in found)
    assert error(found) < error(low_rank_factors(weight, 5))


def test_factors_of_zeros_are_zeros() -> None:
    left, right = low_rank_factors(torch.zeros(6, 4), 2)
    assert bool((left @ right == 0).all())
