"""Each rule is proved in float64 on a small captured module: factors asked for by a linear behind the op vanish."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.channels.rules import RULES, rule
from fxquant.channels.wants import Cost
from fxquant.errors import DuplicateNameError
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.passes.absorb_affines import AbsorbAffines
from fxquant.pipeline.pipeline import Pipeline
from fxquant.planning.plan import Plan
from tests.support import (
    AFFINE,
    absorb,
    absorb_shift,
    captured,
    layer_node,
    outputs,
    proved,
    refused,
    relative_error,
    seeds_at,
)

aten = torch.ops.aten
B, T, C = 3, 5, 8

Body = Callable[..., Tensor]


def x(*shape: int) -> Tensor:
    return torch.randn(shape or (B, T, C), dtype=torch.float64)


class Behind(nn.Module):
    """``last(body(self, x))``, with layers ``a``, ``b``, ``c`` and parameters for the body to use."""

    def __init__(self, body: Body, features: int = C) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(C, C) for _ in range(3))
        self.plain = nn.Linear(C, C, bias=False)
        self.narrow = nn.Linear(C, C // 2)
        self.norm, self.rms = nn.LayerNorm(C), nn.RMSNorm(C)
        self.conv = nn.Conv2d(2, C, 3, padding=1)
        self.conv1 = nn.Conv1d(2, C, 1)
        self.conv3 = nn.Conv3d(1, C, 1, bias=False)
        self.table = nn.Embedding(10, C)
        self.row = nn.Parameter(torch.empty(C))
        self.rows = nn.Parameter(torch.empty(2, C))
        self.number = nn.Parameter(torch.empty(1))
        self.count = nn.Buffer(torch.arange(C))
        self.last = nn.Linear(features, 4)
        self.body = body
        for parameter in (self.row, self.rows, self.number, *self.norm.parameters(), *self.rms.parameters()):
            nn.init.uniform_(parameter, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self, x))


class Timed(Behind):
    """With a timestep, as shifts need one."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        return self.last(self.body(self, x, timestep))


def heads(value: Tensor, size: int = 4) -> Tensor:
    return value.unflatten(-1, (-1, size)).transpose(1, 2)


def tokens(value: Tensor) -> Tensor:
    return value.transpose(1, 2).flatten(2)


def reversed_parts(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(parts[::-1], -1)


def square(x: Tensor) -> Tensor:
    """As many tokens as channels."""
    return x[:, :1].expand(-1, C, -1)


def ada_ln(m: Behind, x: Tensor) -> Tensor:
    gamma, beta = torch.cat([m.a(x[:, :1]), m.b(x[:, :1])], -1).chunk(2, -1)
    return F.layer_norm(x, (C,)) * (1 + gamma) + beta


def scale_shift_table(m: Behind, x: Tensor) -> Tensor:
    vector = torch.cat([m.a(x[:, 0]), m.b(x[:, 0])], -1)
    scale, shift = (m.rows[None] + vector.unflatten(-1, (2, C))).chunk(2, dim=1)
    return F.layer_norm(x, (C,)) * (1 + scale) + shift


def geglu(m: Behind, x: Tensor) -> Tensor:
    hidden, gate = torch.cat([m.a(x), m.b(x)], -1).chunk(2, -1)
    return hidden * F.gelu(gate)


def layouts(m: Behind, x: Tensor) -> Tensor:
    return m.a(x).view(-1, T, 2, 4).permute(0, 2, 3, 1).transpose(1, 3).movedim(2, 3).movedim(-1, 2).transpose(2, 3)


# Name: (body of [3, 5, 8], what absorbs the factors).
FREE: dict[str, tuple[Body, set[str]]] = {
    "linear": (lambda m, x: m.a(x), {"a"}),
    "linear without bias": (lambda m, x: m.plain(x), {"plain"}),
    "add": (lambda m, x: m.a(x) + m.b(x), {"a", "b"}),
    "add, one value twice": (lambda m, x: (y := m.a(x)) + y, {"a"}),
    "add with alpha": (lambda m, x: torch.add(m.a(x), m.b(x), alpha=3), {"a", "b"}),
    "add of a number": (lambda m, x: m.a(x) + 2.5, {"a"}),
    "add of a number, no bias to take it": (lambda m, x: m.plain(x) + 2.5, {"plain"}),
    "add of a number with alpha": (lambda m, x: torch.add(m.a(x), 2.5, alpha=3), {"a"}),
    "add of a sum and a number": (lambda m, x: (m.a(x) + m.b(x)) + 1, {"a", "b"}),
    "add of a parameter": (lambda m, x: m.a(x) + m.row, {"a", "row"}),
    "sub": (lambda m, x: m.a(x) - m.b(x), {"a", "b"}),
    "sub of a number": (lambda m, x: m.a(x) - 2.5, {"a"}),
    "sub of parameters": (lambda m, x: m.a(x) + (m.row - m.rows[0]), {"a", "row", "rows"}),
    "numbers one after another": (lambda m, x: (m.a(x) + 2.5 - 1) + 4, {"a"}),
    "mul, nonlinear on the right": (lambda m, x: m.a(x) * F.gelu(m.b(x)), {"a"}),
    "mul, nonlinear on the left": (lambda m, x: F.gelu(m.b(x)) * m.a(x), {"a"}),
    "mul, a norm that would need a weight": (lambda m, x: F.layer_norm(x, (C,)) * m.b(x), {"b"}),
    "mul by a number": (lambda m, x: m.a(x) * 3.0, {"a"}),
    "mul by a parameter": (lambda m, x: m.row * F.silu(m.a(x)), {"row"}),
    "mul by a parameter of one element": (lambda m, x: m.number * F.silu(m.a(x)), {"number"}),
    "div by a number": (lambda m, x: m.a(x) / 3.0, {"a"}),
    "div by a value": (lambda m, x: m.a(x) / (m.b(x).exp() + 1), {"a"}),
    "1 + gamma": (lambda m, x: F.silu(m.b(x)) * (1 + m.a(x)), {"a"}),
    "relu": (lambda m, x: F.relu(m.a(x)), {"a"}),
    "leaky relu": (lambda m, x: F.leaky_relu(m.a(x), 0.2), {"a"}),
    "neg": (lambda m, x: -m.a(x), {"a"}),
    "addcmul": (lambda m, x: torch.addcmul(m.a(x), m.b(x), F.silu(m.c(x)), value=2), {"a", "b"}),
    "addcmul, nonlinear first factor": (lambda m, x: torch.addcmul(m.a(x), F.silu(m.c(x)), m.b(x)), {"a", "b"}),
    "type_as": (lambda m, x: m.a(x).type_as(m.row), {"a"}),
    "where": (lambda m, x: torch.where(x > 0, m.a(x), m.b(x)), {"a", "b"}),
    "masked fill": (lambda m, x: m.a(x).masked_fill(x > 0, 0.0), {"a"}),
    "pad along channels": (lambda m, x: F.pad(m.a(x)[..., 2:], (1, 1)), {"a"}),
    "pad with ones, part of what is read": (lambda m, x: F.pad(m.a(x).mT, (0, 0, 0, 1), value=1.0)[:, :C].mT, {"a"}),
    "pad along tokens": (lambda m, x: F.pad(m.a(x), (0, 0, 1, 2)), {"a"}),
    "stack": (lambda m, x: torch.stack([m.a(x)[..., ::2], m.b(x)[..., ::2]], -1).flatten(-2), {"a", "b"}),
    "roll and flip along tokens": (lambda m, x: m.a(x).roll(2, dims=1).flip(1), {"a"}),
    "repeat over heads": (
        lambda m, x: tokens(heads(m.narrow(x), 2)[:, :, None].repeat(1, 1, 2, 1, 1).flatten(1, 2)),
        {"narrow"},
    ),
    "repeat along tokens": (lambda m, x: m.a(x[:, :1]).repeat(1, T, 1), {"a"}),
    "repeat_interleave along tokens": (lambda m, x: m.a(x[:, :1]).repeat_interleave(T, dim=1), {"a"}),
    "index_select": (lambda m, x: m.a(x).index_select(1, torch.arange(T).flip(0)), {"a"}),
    "index of tokens": (lambda m, x: m.a(x)[:, torch.tensor([4, 0, 2])], {"a"}),
    "index by a mask": (lambda m, x: m.a(x)[torch.tensor([True, False, True])], {"a"}),
    "index of samples and tokens": (lambda m, x: m.a(x)[torch.tensor([[0], [2]]), torch.tensor([1, 3])], {"a"}),
    "RMS norm, 1 + weight": (lambda m, x: F.rms_norm(x, (C,), m.row + 1), {"row"}),
    "layer norm, computed weights": (lambda m, x: F.layer_norm(x, (C,), m.row + 1, m.row * 2), {"row"}),
    "channels first": (lambda m, x: (m.a(x).mT @ F.softmax(x @ x.mT, -1)).mT, {"a"}),
    "tokens of two sources and one summand": (
        lambda m, x: torch.cat([m.a(x), m.b(x)], 1)[:, :T] + m.c(x[:, :1]),
        {"a", "b", "c"},
    ),
    "dropout in evaluation": (lambda m, x: F.dropout(m.a(x), 0.5, m.training), {"a"}),
    "clone, contiguous": (lambda m, x: m.a(x).clone().transpose(1, 2).contiguous().transpose(1, 2), {"a"}),
    "to": (lambda m, x: m.a(x).to(torch.float64, copy=True), {"a"}),
    "layer norm": (lambda m, x: m.norm(x), {"layer_norm"}),
    "layer norm without weights": (lambda m, x: F.layer_norm(x, (C,)), {"layer_norm"}),
    "layer norm without weights, shifted": (lambda m, x: F.layer_norm(x, (C,)) + 2, {"layer_norm"}),
    "layer norm without bias, shifted": (lambda m, x: F.layer_norm(x, (C,), m.row) + 2, {"layer_norm"}),
    "RMS norm": (lambda m, x: m.rms(x), {"rms_norm"}),
    "RMS norm without weight": (lambda m, x: F.rms_norm(x, (C,)), {"rms_norm"}),
    "chunk": (lambda m, x: reversed_parts(m.a(x).chunk(2, -1)), {"a"}),
    "split": (lambda m, x: reversed_parts(m.a(x).split([2, 6], -1)), {"a"}),
    "split by size": (lambda m, x: reversed_parts(m.a(x).split(3, -1)), {"a"}),
    "unbind": (lambda m, x: reversed_parts(m.a(x).unflatten(-1, (4, 2)).unbind(2)), {"a"}),
    "slice": (lambda m, x: torch.cat([(y := m.a(x))[..., 2:], y[..., -8:-6]], -1), {"a"}),
    "slice with a step": (lambda m, x: torch.cat([(y := m.a(x))[..., ::2], y[..., 1::2]], -1), {"a"}),
    "select": (lambda m, x: m.a(x).unflatten(-1, (1, 8)).select(2, -1), {"a"}),
    "narrow": (lambda m, x: torch.cat([(y := m.a(x)).narrow(-1, 5, 3), y.narrow(2, 0, 5)], -1), {"a"}),
    "part of the tokens": (lambda m, x: m.a(x)[:, 1:4], {"a"}),
    "view, permute, transpose, movedim": (lambda m, x: layouts(m, x).flatten(2), {"a"}),
    "unsqueeze, expand, slice, squeeze": (
        lambda m, x: m.a(x).unsqueeze(1).expand(-1, 4, -1, -1)[:, 2:3].squeeze(1),
        {"a"},
    ),
    "unflatten, flatten into the batch": (lambda m, x: m.a(x).unflatten(2, (2, 4)).flatten(2).flatten(0, 1), {"a"}),
    "t": (lambda m, x: m.a(x).flatten(0, 1).t().t(), {"a"}),
    "cat along tokens": (lambda m, x: torch.cat([m.a(x), m.b(x)], 1), {"a", "b"}),
    "cat along channels": (lambda m, x: torch.cat([m.narrow(x), m.a(x)[..., 4:]], -1), {"narrow", "a"}),
    "attention": (
        lambda m, x: tokens(F.scaled_dot_product_attention(heads(m.a(x)), heads(m.b(x)), heads(m.c(x)))),
        {"c"},
    ),
    "attention, value shifted": (
        lambda m, x: tokens(F.scaled_dot_product_attention(heads(m.a(x)), heads(m.b(x)), heads(m.c(x))) + 1),
        {"c"},
    ),
    "softmax(q k) v, by heads": (
        lambda m, x: tokens((heads(m.a(x)) @ heads(m.b(x)).transpose(2, 3)).softmax(-1) @ heads(m.c(x))),
        {"c"},
    ),
    "bmm": (lambda m, x: torch.bmm(torch.bmm(m.a(x), m.b(x).transpose(1, 2)), m.c(x)), {"c"}),
    "linear attention": (lambda m, x: m.a(x) @ (m.b(x).transpose(1, 2) @ m.c(x)), {"c"}),
    "GEGLU": (geglu, {"a"}),
    "SwiGLU": (lambda m, x: F.silu(m.a(x)) * m.b(x), {"b"}),
    "adaLN": (ada_ln, {"a", "b"}),
    "scale_shift_table": (scale_shift_table, {"a", "b", "rows"}),
    "attention, one value for the batch": (
        lambda m, x: tokens(F.scaled_dot_product_attention(heads(m.a(x)), heads(m.b(x)), heads(m.c(x.mean(0, True))))),
        {"c"},
    ),
    "attention, values without a batch": (
        lambda m, x: tokens(
            F.scaled_dot_product_attention(heads(m.a(x)), heads(m.b(x)), heads(m.c(x.mean(0, True)))[0])
        ),
        {"c"},
    ),
    "add of a number with alpha, by position": (lambda m, x: aten.add.Scalar(m.a(x), 2.5, 3), {"a"}),
    "a slice from before the first channel": (
        lambda m, x: torch.cat([aten.slice.Tensor(y := m.a(x), 2, -12, 3), aten.slice.Tensor(y, 2, 3, 12)], -1),
        {"a"},
    ),
    "masked fill by a mask of more axes": (lambda m, x: m.a(x[0, :1]).masked_fill(x > 0, 0.0), {"a"}),
    "cat with a vector of no elements": (lambda m, x: torch.cat([m.a(x), x.new_zeros(0)], 1), {"a"}),
    "dropout in training": (lambda m, x: F.dropout(m.a(x), 0.5, True), {"a"}),
    "a weight that is cast": (lambda m, x: F.linear(x, m.a.weight.to(torch.float64, copy=True)), {"a"}),
    "scaled before": (lambda m, x: torch.ops.fxquant.channel_affine(m.a(x), m.row, None), {"a"}),
}


@pytest.mark.parametrize("name", FREE)
def test_factors_vanish_into_weights(name: str) -> None:
    body, into = FREE[name]
    result = absorb(Behind(body), x())
    proved(result)
    assert set(result.grant.into) == into


# Name: (body, what absorbs the factors). What the linear behind reads as channels are tokens to what absorbs them.
TIED: dict[str, tuple[Body, set[str]]] = {
    "linear": (lambda m, x: m.a(square(x)).transpose(1, 2), {"a"}),
    "norm": (lambda m, x: m.norm(square(x)).transpose(1, 2), {"layer_norm"}),
    "convolution": (lambda m, x: m.conv1(x[:, :2, :1].expand(-1, -1, C)), {"conv1"}),
    "attention": (
        lambda m, x: F.scaled_dot_product_attention(m.a(y := square(x)), m.b(y), m.c(y)).transpose(1, 2),
        {"c"},
    ),
    "matmul": (lambda m, x: (m.a(y := square(x)) @ m.b(y)).transpose(1, 2), {"a"}),
}


@pytest.mark.parametrize("name", TIED)
def test_tokens_share_their_factors(name: str) -> None:
    body, into = TIED[name]
    result = absorb(Behind(body), x())
    proved(result)
    assert set(result.grant.into) == into
    assert len(set(result.grant.classes.tolist())) == 1


def test_an_embedding_has_one_factor_a_column() -> None:
    result = absorb(Behind(lambda m, labels: m.table(labels).transpose(1, 2)), torch.randint(0, 10, (B, C)))
    proved(result, into=["table"])
    assert len(set(result.grant.classes.tolist())) == 1


def test_heads_that_share_a_value_share_its_factors() -> None:
    def grouped(m: Behind, x: Tensor) -> Tensor:
        query = torch.cat([m.a(x), m.b(x)], -1)
        return tokens(F.scaled_dot_product_attention(*map(heads, (query, m.a(x), m.c(x))), enable_gqa=True))

    result = absorb(Behind(grouped, features=2 * C), x())
    proved(result)
    assert result.grant.into == ("c",)
    classes = result.grant.classes.reshape(2, 2, 4)  # [key and value heads, query heads that share one, channels]
    assert (classes[:, 0] == classes[:, 1]).all()
    assert len(set(classes.flatten().tolist())) == C


def test_a_table_takes_the_factors_of_its_columns() -> None:
    result = absorb(Behind(lambda m, labels: m.table(labels)), torch.randint(0, 10, (B, T)))
    proved(result, into=["table"])


@pytest.mark.parametrize(("layer", "shape"), [("conv", (B, 2, 4, 6)), ("conv1", (B, 2, 7)), ("conv3", (B, 1, 2, 3, 4))])
def test_a_convolution_takes_the_factors_of_its_output_channels(layer: str, shape: tuple[int, ...]) -> None:
    result = absorb(Behind(lambda m, x: getattr(m, layer)(x).flatten(2).transpose(1, 2) + 1), x(*shape))
    proved(result, into=[layer])


@pytest.mark.parametrize(
    ("layer", "convolve", "shape"),
    [("conv", F.conv2d, (B, 2, 4, 6)), ("conv1", F.conv1d, (B, 2, 7)), ("conv3", F.conv3d, (B, 1, 2, 3, 4))],
)
def test_a_convolution_padded_by_name_takes_them_as_well(
    layer: str, convolve: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        own = getattr(m, layer)
        return convolve(x, own.weight, own.bias, padding="same").flatten(2).transpose(1, 2) + 1

    proved(absorb(Behind(body), x(*shape)), into=[layer])


def test_a_weight_with_another_reader_is_copied_for_those_who_ask() -> None:
    model = Behind(lambda m, x: m.row * F.silu(m.a((x + m.row).tanh())))
    result = absorb(model, x())
    proved(result, into=["row"])
    held = dict(result.module.named_parameters())
    assert torch.equal(held["row"], model.row)
    (copy,) = [value for name, value in held.items() if name.startswith("row_of")]
    assert torch.equal(copy, model.row * result.factors["last"])


def test_a_shift_passes_once_the_factor_on_its_way_is_gone() -> None:
    result = absorb(Behind(lambda m, x: torch.ops.fxquant.channel_affine(m.a(x), m.row, None) + 1), x(), force=True)
    assert result.grant.reason == "a constant shift cannot pass a factor"
    assert result.error < 1e-12
    assert result.left == 0


def test_a_linear_used_twice_is_copied_for_the_use_that_asks() -> None:
    model = Behind(lambda m, x: m.a(m.a(x).tanh()))
    result = absorb(model, x())
    proved(result, into=["a@2"])
    first, second = layer_node(result.module, "a"), layer_node(result.module, "a@2")
    assert first.args[1].target == "a.weight"
    assert second.args[1] is not first.args[1]
    assert torch.equal(result.module.get_parameter("a.weight"), model.a.weight)


# --- where a request must not pass ----------------------------------------------------------------------------------

# Name: (body of [3, 5, 8], reason).
REFUSED: dict[str, tuple[Body, str]] = {
    "the model's input": (lambda m, x: x, "straight from the model's input x"),
    "a residual": (lambda m, x: (y := m.a(x)) + 0 * m.b(y.tanh()), "also read by tanh"),
    "gelu": (lambda m, x: F.gelu(m.a(x)), "gelu is nonlinear"),
    "silu": (lambda m, x: F.silu(m.a(x)), "silu is nonlinear"),
    "softmax": (lambda m, x: m.a(x).softmax(-1), "softmax.int has no channel rule"),
    "a square": (lambda m, x: (y := m.a(x)) * y, "reads linear more than once"),
    "a quotient of one value": (lambda m, x: (y := m.a(x)) / y, "reads linear more than once"),
    "a product with itself": (lambda m, x: (y := m.a(x)[:, :1].expand(-1, C, -1)) @ y, "more than once"),
    "attention to one value": (
        lambda m, x: F.scaled_dot_product_attention(y := m.a(x), y, y),
        "reads linear more than once",
    ),
    "both sides nonlinear": (lambda m, x: F.silu(m.a(x)) * F.gelu(m.b(x)), "is nonlinear"),
    "a sum of one element": (lambda m, x: m.a(x) + m.b(x).sum(-1, keepdim=True), "broadcast along the channels"),
    "an expanded element": (lambda m, x: m.a(x)[..., :1].expand(-1, -1, C), "copies of one value"),
    "a shift of a product": (lambda m, x: m.a(x) * m.b(x) + 1, "constant shift cannot pass a product"),
    "a shift of a quotient": (lambda m, x: m.a(x) / 3 + 1, "constant shift cannot pass a quotient"),
    "a shift of relu": (lambda m, x: F.relu(m.a(x)) + 1, "constant shift cannot pass relu"),
    "a shift of a matrix product": (lambda m, x: m.a(x) @ m.b(x).transpose(1, 2) @ m.c(x) + 1, "a matrix product"),
    "a shift of a difference": (lambda m, x: (m.a(x) - m.b(x)) + 1, "sub.Tensor cannot take a constant shift"),
    "a shift of an RMS norm": (lambda m, x: m.rms(x) + 1, "RMS norm cannot take a constant shift"),
    "an integer parameter": (lambda m, x: m.count * F.silu(x), "not a floating-point tensor"),
    "a cast from integers": (lambda m, x: m.count.expand(B, T, C).to(torch.float64), "not floating-point"),
    "a weight made in the graph": (lambda m, x: F.linear(x, m.a.weight * 2), "weight of linear is computed"),
    "a norm's weight made in the graph": (lambda m, x: F.layer_norm(x, (C,), m.row * 2), "layer_norm is computed"),
    "one sample of the batch": (lambda m, x: m.a(x)[0], "one sample is selected"),
    "channels mixed with the batch": (
        lambda m, x: m.a(x).transpose(0, 2).reshape(-1, T).unflatten(0, (C, -1)).transpose(0, 2),
        "mixes the channels with the batch",
    ),
    "the size of the batch is added": (lambda m, x: m.a(x) + x.shape[0], "adds a number that the graph computes"),
    "a weight that is rounded to integers": (
        lambda m, x: F.linear(x, (m.a.weight).to(torch.int64).to(torch.float64)),
        "weight of linear is computed",
    ),
    "a weight that is rounded to 8 bits": (
        lambda m, x: F.linear(x, m.a.weight.to(torch.float8_e4m3fn).to(torch.float64)),
        "weight of linear is computed",
    ),
    "one parameter as weight and bias of a norm": (lambda m, x: F.layer_norm(x, (C,), m.row, m.row), "more than once"),
    "one parameter as input and weight": (
        lambda m, x: F.linear(m.a.weight, m.a.weight) + 0 * x[:, :1],
        "more than once",
    ),
    "a shift of a dropout in training": (lambda m, x: F.dropout(m.a(x), 0.5, True) + 1, "dropout in training mode"),
    "rounded to integers": (lambda m, x: m.a(x).to(torch.int64).to(torch.float64), "not floating-point"),
    "rounded to 8 bits": (lambda m, x: m.a(x).to(torch.float8_e4m3fn).to(torch.float64), "rounds to 8 bits"),
    "the largest channels": (lambda m, x: m.a(x).topk(C)[0], "topk has no channel rule"),
    "a grid": (lambda m, x: torch.meshgrid(m.row, m.rows[0], indexing="ij")[1], "meshgrid"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stops_a_request(name: str) -> None:
    body, reason = REFUSED[name]
    refused(absorb(Behind(body), x(), force=True), reason)


def test_a_shift_does_not_pass_a_product_with_a_vector() -> None:
    # Its channels are rows of the softmax, and the elements of the vector are what is summed over.
    result = absorb_shift(Timed(lambda m, x, timestep: F.softmax(square(x), -1) @ m.row), x(), torch.arange(B).double())
    assert result.error < 1e-12
    assert result.left == 0


def test_a_weight_that_is_a_vector_has_no_rows() -> None:
    # Its outputs are the tokens, here as many as channels.
    result = absorb(Behind(lambda m, x: F.linear(square(x), m.row)), x())
    assert result.error < 1e-12
    assert result.grant.cost is Cost.VECTOR
    result = absorb_shift(Timed(lambda m, x, timestep: F.linear(square(x), m.row)), x(), torch.arange(B).double())
    assert result.error < 1e-12
    assert result.left == 0


@pytest.mark.parametrize("factor", [-1.5, 0.0])
def test_only_positive_factors_pass(factor: float) -> None:
    module = captured(Behind(lambda m, x: F.relu(m.a(x))).double(), value := x()).module
    expected = outputs(module, value)
    (seed,) = seeds_at(module, ["last"])
    rewriter, (reader,) = Rewriter(module, "request"), seed.readers
    factors = torch.linspace(0.5, 2, C, dtype=torch.float64)
    factors[3] = factor
    with rewriter.before(reader):
        held = rewriter.constant("factor", factors, [seed.value])
        scaled = rewriter.call(AFFINE, (seed.value, held, None), [seed.value])
    rewriter.redirect(reader, seed.value, scaled)
    rewriter.fold(reader, "weight", lambda w: torch.where(factors != 0, w / factors, w))
    module.recompile()
    expected = outputs(module, value) if factor == 0 else expected
    (record,) = Pipeline([AbsorbAffines()]).run(module, Plan("", "", None), Stage.TRANSFORMED)
    assert record.edits == 0
    assert relative_error(outputs(module, value), expected) < 1e-12


# --- vectors, ties and parts ----------------------------------------------------------------------------------------


class SharedModulation(nn.Module):
    """As in PixArt: one time vector for all blocks, to which each adds a table of its own."""

    def __init__(self, tables: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Linear(C, 2 * C)
        self.first, self.second = nn.Linear(C, C), nn.Linear(C, C)
        self.tables = nn.ParameterList([torch.randn(2, C) for _ in range(2)]) if tables else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        vector = self.time(time).unflatten(-1, (2, C))
        for number, linear in enumerate((self.first, self.second)):
            table = vector if self.tables is None else self.tables[number][None] + vector
            scale, shift = table.chunk(2, dim=1)
            x = x + linear(F.layer_norm(x, (C,)) * (1 + scale) + shift).tanh()
        return x


@pytest.mark.parametrize("tables", [True, False])
def test_a_shared_modulation_vector_costs_one_multiplication_of_a_vector_each(tables: bool) -> None:
    result = absorb(SharedModulation(tables), x(), x(B, C), at=["first", "second"])
    proved(result, Cost.VECTOR)
    assert result.groups == [["first"], ["second"]]
    multiplied = [node for node in result.module.graph.nodes if "channel_affine" in str(node.target)]
    assert len(multiplied) == 2
    for node in multiplied:
        assert list(node.meta["val"].shape[1:]) == [2, C]


def test_one_block_may_be_scaled_and_not_another() -> None:
    result = absorb(SharedModulation(), x(), x(B, C), at=["first"])
    assert result.error < 1e-12
    assert result.grant.cost is Cost.VECTOR
    assert set(result.grant.into) == {"a multiplication after unflatten", "tables.0", "layer_norm"}


class JointAttention(nn.Module):
    """As in SD3: text and image attend to each other, and two output projections read slices of the result."""

    def __init__(self, text_out: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(C, 3 * C), nn.Linear(C, 3 * C)
        self.image_out, self.text_out = nn.Linear(C, C), nn.Linear(C, C)
        self.read = text_out

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        joint = torch.cat([self.image(image), self.text(text)], 1)
        attended = tokens(F.scaled_dot_product_attention(*(heads(part) for part in joint.chunk(3, -1))))
        text_tokens = attended[:, image.shape[1] :]
        return self.image_out(attended[:, : image.shape[1]]), self.text_out(text_tokens) if self.read else text_tokens


def test_slices_of_one_attention_share_their_factors() -> None:
    result = absorb(JointAttention(), x(), x(B, 2, C), at=["image_out", "text_out"])
    proved(result)
    assert result.groups == [["image_out", "text_out"]]
    image, text = result.grants["image_out"], result.grants["text_out"]
    assert (image.classes == text.classes).all()
    assert len(set(image.classes.tolist())) == C
    assert set(image.into) == set(text.into) == {"image", "text"}


def test_different_factors_for_slices_of_one_attention_stay() -> None:
    result = absorb(JointAttention(), x(), x(B, 2, C), at=["image_out", "text_out"], force=True, spread=True)
    assert result.error < 1e-12
    assert result.left == 2


def test_a_slice_that_is_read_as_it_is_keeps_the_other_as_it_is() -> None:
    refused(absorb(JointAttention(False), x(), x(B, 2, C), at=["image_out"], force=True), "read unscaled")


def test_a_request_is_granted_for_the_channels_that_can_be_scaled() -> None:
    def single_stream(m: Behind, x: Tensor) -> Tensor:
        attended = tokens(F.scaled_dot_product_attention(*(heads(linear(x)) for linear in (m.a, m.b, m.c))))
        return torch.cat([attended, F.gelu(m.plain(x))], -1)

    result = absorb(Behind(single_stream, features=2 * C), x())
    assert result.error < 1e-12
    assert result.left == 0
    assert result.grant.granted.tolist() == [True] * C + [False] * C
    assert (result.grant.cost, result.grant.into) == (Cost.FREE, ("c",))
    assert result.grant.reason == "gelu is nonlinear"
    forced = absorb(Behind(single_stream, features=2 * C), x(), force=True)
    assert forced.error < 1e-12
    assert forced.left == 1  # Only what GELU made is scaled at run time.


def test_a_second_rule_for_an_op_is_refused() -> None:
    assert torch.ops.aten.linear.default in RULES
    with pytest.raises(DuplicateNameError, match=r"aten.linear.default already has the channel rule 'linear'"):
        rule(torch.ops.aten.linear.default)(lambda node, want: None)  # type: ignore[arg-type, return-value]


def test_every_rule_says_what_it_does() -> None:
    assert all(found.__doc__ for found in RULES.values())
