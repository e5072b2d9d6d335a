"""Writes in place become values: the same bits as the model, whatever is read before, after and through views."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxquant.capture import functionalize as in_place
from fxquant.capture.functionalize import functionalize, writes
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.trace import Architecture
from fxquant.errors import CaptureError
from fxquant.ir.tensors import bind, weights_of
from tests.support import golden, text

Body = Callable[[Tensor, Tensor], Tensor]


class Writes(nn.Module):
    """A linear, and a body that writes into tensors of its own."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.body = body

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.body(self.linear(x), timestep)


def rotary(x: Tensor, timestep: Tensor) -> Tensor:
    """Wan's rotary embedding."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = first * 2 - second
    out[..., 1::2] = first + second
    return out.type_as(x)


def views(x: Tensor, timestep: Tensor) -> Tensor:
    """Views made before a write are read after it, and views of those; one is read on both sides."""
    y = x * 2
    half, (low, high) = y[:, 1:], y.chunk(2, dim=-1)
    before = low + high
    column = half.transpose(1, 2)[:, 0]
    y[:, 1] = timestep[:, None]
    return torch.cat([y, half, torch.cat([before, low + high], dim=2)], dim=1) + column.sum(dim=1)[:, None, None]


def through_views(x: Tensor, timestep: Tensor) -> Tensor:
    """Writes into a part of a part, seen by the whole and by a sibling."""
    y = x + 1
    sibling, part = y[:, 0], y[:, 0][:, 1:3]
    part *= 3
    part.add_(timestep[:, None])
    return y * sibling[:, None]


def results(x: Tensor, timestep: Tensor) -> Tensor:
    """What a write returns is what it wrote into."""
    y = torch.zeros_like(x)
    z = y.copy_(x).mul_(2)
    y[0] = 1
    return z + y


def casts(x: Tensor, timestep: Tensor) -> Tensor:
    """A copy into another dtype, and a cast that is none."""
    counts = torch.zeros(3, dtype=torch.int64)
    counts[:2] = timestep[:2]
    same = x.clone().to(x.dtype)
    same[:, :1] = 0
    return same * counts.sum()


def itself(x: Tensor, timestep: Tensor) -> Tensor:
    """A part is copied from another part of the same tensor, which changes afterwards."""
    y = x.clone()
    y[:, 0] = y[:, 1]
    y[:, 1] = 0
    return y


BODIES = [rotary, views, through_views, results, casts, itself]


def captured(model: nn.Module) -> CapturedGraph:
    architecture = Architecture.of(model, "timestep")
    call = {"x": torch.randn(2, 3, 4), "timestep": torch.arange(2.0)}
    found = architecture.capture(architecture.canonical((), call))
    bind(found.module, weights_of(model))
    return found


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_the_graph_computes_the_same_bits_without_writes(body: Body, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[bool] = []
    monkeypatch.setattr(in_place, "functionalize", lambda *a: done.append(functionalize(*a)) or done[-1])
    model = Writes(body).eval().requires_grad_(False)
    found = captured(model)
    assert done == [True]
    assert not any(map(writes, found.module.graph.nodes))
    for batch in (2, 5):
        x, timestep = torch.randn(batch, 3, 4), torch.arange(float(batch))
        assert torch.equal(found.module(x, timestep)[0], model(x, timestep))


def reshaped(x: Tensor, timestep: Tensor) -> Tensor:
    """A write through a view that is no part: left to torch."""
    y = x.clone()
    y.view(y.shape[0], -1)[:, :2] = 1
    return y


def transposed_in_place(x: Tensor, timestep: Tensor) -> Tensor:
    """An op in place that writes no element."""
    y = x.clone()
    y.transpose_(1, 2)
    return y @ y.transpose(1, 2)


def each_of_a_list(x: Tensor, timestep: Tensor) -> Tensor:
    """One op writes into several tensors, through a view of one."""
    y, z = x * 2, torch.zeros_like(x)
    torch._foreach_add_([y[:, :2], z], 1.0)
    torch._foreach_copy_([z], [y])
    torch._foreach_mul_([y, z], [z, x])
    return y - z


def into_a_given_result(x: Tensor, timestep: Tensor) -> Tensor:
    """The tensor that is written into is no first argument."""
    y = torch.empty_like(x)
    torch.add(x, 1, out=y)
    return y


@pytest.mark.parametrize(
    "body", [reshaped, transposed_in_place, each_of_a_list, into_a_given_result], ids=lambda body: body.__name__
)
def test_what_it_cannot_do_is_left_to_torch(body: Body, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[bool] = []
    monkeypatch.setattr(in_place, "functionalize", lambda *a: done.append(functionalize(*a)) or done[-1])
    model = Writes(body).eval().requires_grad_(False)
    found = captured(model)
    assert done == [False]
    x, timestep = torch.randn(5, 3, 4), torch.arange(5.0)
    assert torch.equal(found.module(x, timestep)[0], model(x, timestep))


@pytest.mark.parametrize(
    "body",
    [
        lambda x, timestep: torch._foreach_mul_([x, x], 2.0) or x,
        lambda x, timestep: torch._foreach_mul_([x[:, :2], x[..., 1:]], 2.0) or x,
        lambda x, timestep: torch._foreach_copy_([x, x[0]], [x * 2, x[1] + 1]) or x,
    ],
)
def test_a_list_of_parts_of_one_tensor_is_refused(body: Body) -> None:
    """PyTorch itself would lose all writes but one."""
    model = Writes(body).eval().requires_grad_(False)
    with pytest.raises(CaptureError, match=r"aten::_foreach_\w+_ in .*two share memory.*in a loop"):
        captured(model)


@pytest.mark.parametrize(
    "body",
    [
        lambda x, timestep: torch._foreach_add_([y := x + 1, z := x * 2], [x, y]) or z,
        lambda x, timestep: torch._foreach_mul_([y := x + 1, z := x * 2], [z, y[:, :]]) or z,
    ],
)
def test_a_list_that_reads_what_it_has_written_is_refused(body: Body) -> None:
    model = Writes(body).eval().requires_grad_(False)
    with pytest.raises(CaptureError, match=r"aten::_foreach_\w+_ in .*after it has written into it.*in a loop"):
        captured(model)


def test_before_and_after() -> None:
    def body(x: Tensor, timestep: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        row = y.select(1, 1)
        y.select(1, 0).copy_(timestep[:, None])
        return y + row.tanh().unsqueeze(1)

    assert text(captured(Writes(body).eval()).module) == golden(
        """
        x: float32[B, 3, 4]
        timestep: float32[B]
        linear: float32[B, 3, 4] = linear(x, @linear.weight, @linear.bias)
        zeros_like: float32[B, 3, 4] = zeros_like(linear, pin_memory=False)
        select_1: float32[B, 4] = select.int(zeros_like, 1, 0)
        slice_1: float32[B] = slice.Tensor(timestep, 0, 0, 9223372036854775807)
        unsqueeze: float32[B, 1] = unsqueeze(slice_1, 1)
        copy_default: float32[B, 4] = copy(select_1, unsqueeze)
        select_scatter_default: float32[B, 3, 4] = select_scatter(zeros_like, copy_default, 1, 0)
        select_int: float32[B, 4] = select.int(select_scatter_default, 1, 1)
        tanh: float32[B, 4] = tanh(select_int)
        unsqueeze_1: float32[B, 1, 4] = unsqueeze(tanh, 1)
        add: float32[B, 3, 4] = add.Tensor(select_scatter_default, unsqueeze_1)
        return add
        """
    )
