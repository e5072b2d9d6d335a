"""A shift passes attention where its probabilities sum to 1, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.sampling import covering
from tests.support import Absorbed, absorb, absorb_shift

B, T, S, C = 3, 4, 5, 8
MIN = torch.finfo(torch.float64).min

BOOL = torch.ones(B, S, dtype=torch.bool)
BOOL[1], BOOL[2, 3:] = False, False


class Masked(nn.Module):
    """``last(attention)``, or that plus a number, which asks attention for a shift when ``last`` is balanced."""

    def __init__(self, attend: Callable[..., Tensor], plus: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.last = (nn.Linear(C, C) for _ in range(4))
        self.row = nn.Parameter(torch.zeros(S))
        self.attend, self.plus = attend, plus

    def forward(self, x: Tensor, text: Tensor, timestep: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            layer(value).unflatten(-1, (2, -1)).transpose(1, 2)
            for layer, value in ((self.q, x), (self.k, text), (self.v, text))
        )
        y = self.attend(self, q, k, v, mask).transpose(1, 2).flatten(2)
        return self.last(y + self.plus if self.plus else y) + timestep[:, None, None]


def attention(mask: Callable[[Any, Any], Any] = lambda m, mask: None, **options: Any) -> Callable[..., Tensor]:
    return lambda m, q, k, v, given: F.scaled_dot_product_attention(
        q, k, v, None if mask is None else mask(m, given), **options
    )


def additive(mask: Tensor, hidden: float) -> Tensor:
    """As diffusers makes it of a mask of integers."""
    return ((1 - mask.to(torch.float64)) * hidden)[:, None, None]


def by_hand(change: Callable[[Tensor], Tensor] = lambda p: p, axis: int = -1) -> Callable[..., Tensor]:
    return lambda m, q, k, v, mask: change((q @ k.mT).softmax(axis)) @ v


def tried(attend: Callable[..., Tensor], mask: Tensor | None, request: str) -> Absorbed:
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(B, size, C, generator=generator, dtype=torch.float64) for size in (T, S))
    inputs = {"x": x, "text": text, "timestep": torch.arange(B).double()} | ({} if mask is None else {"mask": mask})
    if request == "shift":
        return absorb_shift(Masked(attend, 0.0), **inputs)
    return absorb(Masked(attend, 1.0 if request == "factor with shift" else 0.0), force=True, **inputs)


REQUESTS = ["factor with shift", "shift"]

# Name: (attention, mask of the call).
PASSES: dict[str, tuple[Callable[..., Tensor], Tensor | None]] = {
    "no mask": (attention(), None),
    "causal": (attention(is_causal=True), None),
    "causal, fewer keys than queries": (
        lambda m, q, k, v, mask: F.scaled_dot_product_attention(q, k[:, :, :2], v[:, :, :2], is_causal=True),
        None,
    ),
    "no probability is dropped": (attention(dropout_p=0.0), None),
    "numbers that are finite": (attention(lambda m, mask: additive(mask, -10000.0)), BOOL),
    "numbers that are finite, of integers": (attention(lambda m, mask: additive(mask, -10000.0)), BOOL.long()),
    "the least number": (attention(lambda m, mask: additive(mask, MIN)), BOOL),
    "filled with a number": (
        attention(lambda m, mask: torch.zeros(B, 1, T, S, dtype=torch.float64).masked_fill(~mask[:, None, None], -9e9)),
        BOOL,
    ),
    "where, of numbers": (
        attention(lambda m, mask: torch.where(mask[:, None, None], 0.0, -1e5).to(torch.float64).expand(-1, 2, T, -1)),
        BOOL,
    ),
    "a key that all see": (
        attention(
            lambda m, mask: torch.cat([mask[:, 1:], torch.ones(mask.shape[0], 1, dtype=torch.bool)], 1)[:, None, None]
        ),
        BOOL,
    ),
    "by hand": (by_hand(), None),
    "by hand, dropout in evaluation": (by_hand(lambda p: F.dropout(p, 0.3, False)), None),
}

REFUSED: dict[str, tuple[Callable[..., Tensor], Tensor | None, str]] = {
    "a mask of the call": (attention(lambda m, mask: mask[:, None, None]), BOOL, "a row whose keys are all masked"),
    "numbers of the call": (
        attention(lambda m, mask: mask[:, None, None]),
        torch.where(BOOL, 0.0, -torch.inf).double(),
        "a row whose keys are all masked",
    ),
    "numbers made of numbers of the call": (
        attention(lambda m, mask: (mask * 2 + 1)[:, None, None]),
        torch.where(BOOL, 0.0, -torch.inf).double(),
        "a row whose keys are all masked",
    ),
    "filled with -inf": (
        attention(
            lambda m, mask: torch.zeros(B, 1, T, S, dtype=torch.float64).masked_fill(
                ~mask[:, None, None], float("-inf")
            )
        ),
        BOOL,
        "a row whose keys are all masked",
    ),
    "larger than the least number": (
        attention(lambda m, mask: additive(mask, MIN) + additive(mask, MIN)),
        BOOL,
        "a row whose keys are all masked",
    ),
    "a query that all see": (
        attention(
            lambda m, mask: torch.cat(
                [mask[:, None, None].expand(-1, 2, T - 1, -1), torch.ones(mask.shape[0], 2, 1, S, dtype=torch.bool)], 2
            )
        ),
        BOOL,
        "a row whose keys are all masked",
    ),
    "a parameter": (attention(lambda m, mask: m.row.expand(T, S)), None, "which the mask expand allows"),
    "dropout in attention": (attention(dropout_p=0.3), None, "drops out some of its probabilities"),
    "by hand, dropout": (by_hand(lambda p: F.dropout(p, 0.3, True)), None, "drops out some of its probabilities"),
    "by hand, over the queries": (by_hand(axis=-2), None, "matrix product"),
    "by hand, rounded": (by_hand(lambda p: (p * 4).to(torch.int64).to(torch.float64)), None, "matrix product"),
    "by hand, rounded to 8 bits": (by_hand(lambda p: p.to(torch.float8_e4m3fn).to(p.dtype)), None, "matrix product"),
    "one probability for several keys": (
        lambda m, q, k, v, mask: torch.einsum("bhij,bhjd->bhid", (q @ k[:, :, :1].mT).softmax(-1), v),
        None,
        "matrix product",
    ),
    "no key that all see": (
        attention(lambda m, mask: torch.cat([mask, torch.ones(mask.shape[0], 0, dtype=torch.bool)], 1)[:, None, None]),
        BOOL,
        "a row whose keys are all masked",
    ),
    "numbers that integers round to 0": (
        attention(lambda m, mask: torch.full((T, S), 0.5).to(torch.int64).to(torch.bool)),
        None,
        "a row whose keys are all masked",
    ),
    "by hand, masked afterwards": (by_hand(lambda p: p.masked_fill(p < 0.2, 0.0)), None, "matrix product"),
    "by hand, not divided by the sum": (by_hand(lambda p: p.exp()), None, "matrix product"),
    "dropout behind": (
        lambda m, q, k, v, mask: F.dropout(F.scaled_dot_product_attention(q, k, v), 0.3, True),
        None,
        "dropout in training mode",
    ),
}


@pytest.mark.parametrize(("name", "request_for"), covering([*PASSES], REQUESTS, together=1))
def test_a_shift_passes(name: str, request_for: str) -> None:
    result = tried(*PASSES[name], request_for)
    assert result.error < 1e-12
    assert result.left == 0
    assert set(result.grant.into) == {"v"}


@pytest.mark.parametrize(("name", "request_for"), covering([*REFUSED], REQUESTS, together=1))
def test_a_shift_stops(name: str, request_for: str) -> None:
    attend, mask, reason = REFUSED[name]
    result = tried(attend, mask, request_for)
    assert result.error < 1e-12
    assert result.record.edits == 0
    assert result.left == 1
    assert result.grant.reason is not None
    assert reason in result.grant.reason


def test_a_factor_passes_where_a_shift_stops() -> None:
    attend, mask, _ = REFUSED["a mask of the call"]
    result = tried(attend, mask, "factor alone")
    assert result.error < 1e-12
    assert result.left == 0
    assert result.grant.into == ("v",)
