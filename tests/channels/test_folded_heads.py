"""Heads folded into the batch, ``(b h) n d``: what is asked of them repeats from sample to sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.channels.layouts import reshape_back
from fxquant.channels.wants import Want
from tests.channels.test_layouts import Symbol, want
from tests.support import absorb, absorb_shift, proved, refused

B, T, C, HEADS = 3, 5, 8, 2


def fold(x: Tensor) -> Tensor:
    """As diffusers' ``head_to_batch_dim`` does."""
    return x.reshape(x.shape[0], x.shape[1], HEADS, -1).permute(0, 2, 1, 3).reshape(x.shape[0] * HEADS, x.shape[1], -1)


def unfold(x: Tensor) -> Tensor:
    """As ``batch_to_head_dim``."""
    batch = x.shape[0] // HEADS
    return x.reshape(batch, HEADS, x.shape[1], -1).permute(0, 2, 1, 3).reshape(batch, x.shape[1], -1)


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    empty = torch.empty(1, 1, 1, dtype=q.dtype)
    scores = torch.baddbmm(empty.expand(q.shape[0], q.shape[1], k.shape[1]), q, k.transpose(1, 2), beta=0, alpha=0.5)
    return torch.bmm(scores.softmax(-1), v)


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("b i j, b j d -> b i d", (torch.einsum("b i d, b j d -> b i j", q, k) * 0.5).softmax(-1), v)


def comfy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fold, attend and unfold as ComfyUI does on processors."""
    batch = q.shape[0]
    q, k, v = (
        t.unsqueeze(3).reshape(batch, -1, HEADS, C // HEADS).permute(0, 2, 1, 3).reshape(batch * HEADS, -1, C // HEADS)
        for t in (q, k, v)
    )
    y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
    return y.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(start_dim=2)


def by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(2, (HEADS, -1)) for t in (q, k, v))
    return torch.einsum("bhij,bjhd->bihd", torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1), v).flatten(2)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bmm": lambda q, k, v: unfold(by_bmm(fold(q), fold(k), fold(v))),
    "einsum": lambda q, k, v: unfold(by_einsum(fold(q), fold(k), fold(v))),
    "scaled_dot_product_attention": lambda q, k, v: unfold(F.scaled_dot_product_attention(fold(q), fold(k), fold(v))),
    "ComfyUI": comfy,
    "einsum of four axes": by_head,
}


class Folded(nn.Module):
    """``last(attention)``."""

    def __init__(self, way: str, plus: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.last = (nn.Linear(C, C) for _ in range(4))
        self.attend, self.plus = WAYS[way], plus

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.last(self.attend(self.q(x), self.k(x), self.v(x)) + self.plus) + timestep[:, None, None]


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(B, T, C, dtype=torch.float64), torch.arange(B).double()


@pytest.mark.parametrize("plus", [0.0, 1.0])
@pytest.mark.parametrize("way", WAYS)
def test_factors_reach_the_value(way: str, plus: float) -> None:
    result = absorb(Folded(way, plus), *inputs())
    proved(result, into=["v"])
    assert len(set(result.grant.classes.tolist())) == C


@pytest.mark.parametrize("way", WAYS)
def test_shifts_reach_the_value(way: str) -> None:
    result = absorb_shift(Folded(way), *inputs())
    assert result.error < 1e-12
    assert result.left == 0
    assert result.grant.into == ("v",)
    assert len(set(result.grant.classes.tolist())) == C


def test_another_batch_size() -> None:
    result = absorb(model := Folded("bmm"), *inputs())
    x, timestep = torch.randn(7, T, C, dtype=torch.float64), torch.arange(7).double()
    torch.testing.assert_close(result.module(x, timestep)[0], model(x, timestep), rtol=1e-12, atol=1e-12)


def test_samples_folded_behind_the_heads_do_not_repeat() -> None:
    class Odd(Folded):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            v = self.v(x).unflatten(2, (HEADS, -1)).permute(2, 0, 1, 3).flatten(0, 1).tanh()
            return self.last(v.unflatten(0, (HEADS, -1)).permute(1, 2, 0, 3).flatten(2)) + timestep[:, None, None]

    refused(absorb(Odd("bmm"), *inputs(), force=True), "mixes the channels with the batch")


def test_no_tensor_of_one_size_is_multiplied_onto_a_folded_value() -> None:
    class Stopped(Folded):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.last(unfold(fold(self.v(x[:, :1])).tanh())) + timestep[:, None, None]

    result = absorb(Stopped("bmm"), *inputs())
    assert result.error < 1e-12


# --- layouts ---


def test_a_folded_axis_repeats() -> None:
    batch = Symbol()
    folded = reshape_back(want(1, 2, 1, 4), [batch, 2, 5, 4], [batch * 2, 5, 4])
    assert folded is not None
    assert folded.scale.shape == (2, 1, 4)
    back = reshape_back(folded, [batch * 2, 5, 4], [batch, 2, 5, 4])
    assert back is not None
    assert back.scale.tolist() == want(1, 2, 1, 4).scale.tolist()


def test_channels_that_come_from_the_batch() -> None:
    batch = Symbol()
    moved = reshape_back(want(1, 8), [batch, 8], [batch * 2, 4])
    assert moved is not None
    assert moved.scale.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_periods_of_two_folds_meet_in_their_least_common_multiple() -> None:
    batch = Symbol()
    halves = reshape_back(want(2, 1), [batch * 6, 4], [batch * 2, 3, 4])
    assert halves is not None
    assert halves.scale.shape == (2, 3, 1)
    assert [[halves.scale[i % 2, j, 0] for j in range(3)] for i in range(2)] == [[1, 2, 1], [2, 1, 2]]


@pytest.mark.parametrize("period", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("inner", [1, 2, 3, 6])
@pytest.mark.parametrize("outer", [1, 2, 3])
def test_what_repeats_before_a_fold_repeats_behind_it(period: int, inner: int, outer: int) -> None:
    batch = Symbol(hint=12)
    asked = Want.of(torch.arange(1, period + 1).numpy()[:, None])
    moved = reshape_back(asked, [batch * (inner * outer), 4], [batch * outer, inner, 4])
    assert moved is not None
    length = 12 * outer * inner
    expected = [asked.scale[i % period, 0] for i in range(length)]
    rows, columns, _ = moved.scale.shape
    found = [moved.scale[(i // inner) % rows, (i % inner) % columns, 0] for i in range(length)]
    assert found == expected


def test_what_stands_in_front_of_an_open_axis_must_not_be_told_apart() -> None:
    batch = Symbol()
    assert reshape_back(want(2, 1, 1), [2, batch, 4], [batch * 2, 4]) is None
    assert reshape_back(want(2, 1), [batch * 2, 4], [2, batch, 4]) is None
