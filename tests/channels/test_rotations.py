"""Rules for rotations: each rotates what a linear reads offline, proved in float64, or refuses by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.channels.rules.rotations import apart, block_codes, whole
from fxquant.channels.wants import Want
from fxquant.pipeline.pipeline import Pipeline
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from fxquant.planning.rotations import Rotation
from tests.support import captured, outputs, relative_error

C, T = 16, 6
ROLES = "roles=block+adaln+embedder+patch+final"


class Behind(nn.Module):
    """A linear, an op behind it, and the linear whose input is rotated."""

    def __init__(self, body: Callable[..., Tensor], width: int = C, inner: int = C) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.other = nn.Linear(C, inner), nn.Linear(C, inner)
        self.last = nn.Linear(width, 8)
        self.table = nn.Parameter(torch.randn(T, C))
        self.gain = nn.Parameter(torch.rand(C) + 0.5)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self, x))


def found(model: nn.Module, block: int = 4) -> tuple[Rotation, float]:
    """What was decided for the last linear, and how far the result is off."""
    torch.manual_seed(1)
    x = torch.randn(3, T, C, dtype=torch.float64)
    graph, context = captured(model.double(), x).module, PassContext(Plan("", "", None))
    expected = outputs(graph, x)
    passes = f"assign-precision{{layers=all}},rotate-channels{{block={block} {ROLES} layers=last}}"
    *_, record = Pipeline.parse(passes).run(graph, context)
    assert record.edits
    return context.plan.decisions_of(Rotation)["last"], relative_error(outputs(graph, x), expected)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def attended(m: Behind, x: Tensor) -> Tensor:
    q = heads(x)
    return F.scaled_dot_product_attention(q, q, heads(m.first(x))).transpose(1, 2).flatten(2)


PASSES = {
    "linear": lambda m, x: m.first(x),
    "layout": lambda m, x: m.first(x).transpose(1, 2).contiguous().transpose(1, 2).reshape(-1, T, C)[:, 1:],
    "add": lambda m, x: m.first(x) + m.other(x),
    "subtract": lambda m, x: m.first(x) - m.other(x),
    "parameter": lambda m, x: m.first(x) + m.table,
    "scaled": lambda m, x: -m.first(x) * 3.0 / 2,
    "per token": lambda m, x: m.first(x) * x.mean(-1, keepdim=True),
    "dropout": lambda m, x: F.dropout(m.first(x), 0.5, False),
    "attention": attended,
    "softmax": lambda m, x: torch.softmax(x @ x.transpose(1, 2), -1) @ m.first(x),
    "rows": lambda m, x: (m.first(x).transpose(1, 2) @ torch.tanh(x @ x.transpose(1, 2))).transpose(1, 2),
    "rms norm": lambda m, x: F.rms_norm(m.first(x), (C,)),
    "parts": lambda m, x: torch.cat([m.first(x)[..., :8], m.other(x)[..., 8:]], -1),
    "tokens": lambda m, x: torch.cat([m.first(x), m.other(x)], 1),
    "chunks": lambda m, x: torch.cat(m.first(x).chunk(2, -1)[::-1], -1),
}


@pytest.mark.parametrize("name", PASSES)
def test_ops_that_pass_a_rotation(name: str) -> None:
    rotation, error = found(Behind(PASSES[name]))
    assert (rotation.cost, rotation.block) == ("free", 4)
    assert "first" in rotation.into
    assert error < 1e-12


REFUSES = {
    "nonlinear": (lambda m, x: F.gelu(m.first(x)), "gelu is nonlinear"),
    "scaled by channel": (lambda m, x: m.first(x) * m.gain, "scales the channels of a block differently"),
    "layer norm": (lambda m, x: F.layer_norm(m.first(x), (C,)), "subtracts the mean over channels"),
    "rms norm with a weight": (lambda m, x: F.rms_norm(m.first(x), (C,), m.gain), "scales the channels"),
    "input": (lambda m, x: x, "straight from the model's input x"),
    "a number": (lambda m, x: m.first(x) + 1, ""),
    "one for all channels": (lambda m, x: m.first(x) + x[..., :1], "is the same for several channels"),
}


@pytest.mark.parametrize("name", REFUSES)
def test_ops_that_refuse_a_rotation(name: str) -> None:
    body, reason = REFUSES[name]
    rotation, error = found(Behind(body))
    assert rotation.cost == "tokens"
    assert reason in (rotation.reason or "")
    assert error < 1e-12


def test_a_block_within_a_head_only() -> None:
    assert found(Behind(attended), 8)[0].cost == "free"
    rotation, _ = found(Behind(attended), 16)
    assert rotation.cost == "tokens"
    assert rotation.reason == "a block of channels extends over several heads, whose attention differs"


def test_heads_that_share_a_value_are_refused() -> None:
    def body(m: Behind, x: Tensor) -> Tensor:
        q, v = heads(x), m.first(x)[:, None, :, :8]
        return F.scaled_dot_product_attention(q, v, v, enable_gqa=True).transpose(1, 2).flatten(2)

    rotation, error = found(Behind(body))
    assert rotation.cost == "tokens" and error < 1e-12


@pytest.mark.parametrize("cut", [4, 6])
def test_a_block_whose_parts_take_two_ways(cut: int) -> None:
    """A norm over each half keeps blocks that lie within one half, and no other."""

    def body(m: Behind, x: Tensor) -> Tensor:
        return torch.cat([F.rms_norm(part, part.shape[-1:]) for part in m.first(x).split([cut, C - cut], -1)], -1)

    rotation, error = found(Behind(body))
    assert error < 1e-12
    assert rotation.cost == ("free" if cut == 4 else "tokens")
    if cut == 6:
        assert "part of a block of channels goes another way" in (rotation.reason or "")


def test_a_value_that_something_else_reads_is_refused() -> None:
    rotation, _ = found(Behind(lambda m, x: (y := m.first(x)) + F.gelu(y).flip(1) * 0))
    assert rotation.cost == "tokens"
    rotation, error = found(Behind(lambda m, x: m.first(x) + torch.tanh(m.first(x))))
    assert rotation.cost == "tokens" and error < 1e-12


def test_blocks_of_a_want() -> None:
    want = Want.of(np.arange(1, 9).reshape(2, 4), block_codes(8, 4).reshape(2, 4))
    assert whole(want) and apart(want, [0]) and not apart(want, [1])
    crossed = Want.of(np.arange(1, 9).reshape(4, 2), block_codes(8, 4).reshape(4, 2))
    assert not apart(crossed, [0])
    part = want.map(lambda array: array[:1, :3])
    assert not whole(part)
