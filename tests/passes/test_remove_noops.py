from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import golden, rewritten


class NoOps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(x[:, :], 0.1, self.training) / 1.0 * 1
        return y.to(x.dtype).tanh()


class NotQuite(nn.Module):
    """Part of a value, a cast that rounds, a product that casts, a copy, and a sum that turns -0 into 0."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x[:, :2], x.double().to(torch.float16), x.int() * 1.0, x.clone(), x + 0, x * 2


def test_before_and_after() -> None:
    before, after = rewritten(NoOps(), "remove-no-ops", x=torch.randn(2, 3))
    assert before == golden(
        """
        x: float32[B, 3]
        slice_1: float32[B, 3] = slice.Tensor(x, 0, 0, 9223372036854775807)
        dropout: float32[B, 3] = dropout(slice_1, 0.1, False)
        div: float32[B, 3] = div.Tensor(dropout, 1.0)
        mul: float32[B, 3] = mul.Tensor(div, 1)
        to: float32[B, 3] = to.dtype(mul, float32)
        tanh: float32[B, 3] = tanh(to)
        return tanh
        """
    )
    assert after == golden(
        """
        x: float32[B, 3]
        tanh: float32[B, 3] = tanh(x)
        return tanh
        """
    )


def test_what_changes_bits_or_memory_stays() -> None:
    _, after = rewritten(NotQuite(), "remove-no-ops", x=torch.randn(2, 3))
    assert after == golden(
        """
        x: float32[B, 3]
        slice_2: float32[B, 2] = slice.Tensor(x, 1, 0, 2)
        to: float64[B, 3] = to.dtype(x, float64)
        to_1: float16[B, 3] = to.dtype(to, float16)
        to_2: int32[B, 3] = to.dtype(x, int32)
        mul: float32[B, 3] = mul.Tensor(to_2, 1.0)
        clone: float32[B, 3] = clone(x)
        add: float32[B, 3] = add.Tensor(x, 0)
        mul_1: float32[B, 3] = mul.Tensor(x, 2)
        return slice_2, to_1, mul, clone, add, mul_1
        """
    )
