from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import fxquant
from fxquant.ir.products import find_products
from tests.support import captured, relative_error


class Mixer(nn.Module):
    """Residual blocks on tokens whose only layer the subclasses write."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([nn.Sequential(self.block()) for _ in range(2)])

    def block(self) -> nn.Module:
        raise NotImplementedError

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.embed(sample) + torch.sin(timestep.float())[:, None, None]
        for block in self.blocks:
            h = h + block(F.layer_norm(h, (8,)))
        return h


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.offset = nn.Parameter(torch.randn(8, 8) / 3), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kernel, self.offset)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.ParameterList([nn.Parameter(torch.randn(8, 8) / 3)])
        self.table = nn.ParameterDict({"0": nn.Parameter(torch.randn(8, 8) / 3)})

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.kernels[0]), self.table["0"])


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


class Clashes(nn.Linear):
    """A linear with modules and parameters of the names that fxquant gives its own tensors."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.balance, self.input_scale = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight_packed = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.balance(x) + self.input_scale(x) * self.weight_packed


class Cast(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def of(block: Any) -> Mixer:
    return type("Model", (Mixer,), {"block": lambda self: block()})().eval()


def call(batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"sample": torch.randn(batch, 5, 4, generator=generator), "timestep": torch.arange(batch) + 1}


def compiled(model: nn.Module, recipe: str, **options: Any) -> fxquant.GraphModel:
    def calibrate() -> None:
        for seed in range(3):
            model(**call(seed=seed))

    return fxquant.compile(model, recipe=recipe, calibrate=calibrate, measure=0, **options)


class Registers(nn.Module):
    """Linears on learned tokens, which are the same for all samples and have a batch of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 3, 8))
        self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        k = self.to_k(self.tokens).expand(x.shape[0], -1, -1)
        v = self.to_v(F.gelu(self.tokens)).expand(x.shape[0], -1, -1)
        return F.scaled_dot_product_attention(x, k, v)


LAYERS = {
    Named: ["kernel"],
    Listed: ["kernels.0", "table.0"],
    SelfAttention: ["mha.in_proj_weight", "mha.out_proj"],
    Clashes: ["", ".balance", ".input_scale"],
    Cast: [""],
    Registers: ["to_k", "to_v"],
}
BY_TIMESTEP = (Registers, SelfAttention)
"""Those that `make test` quantizes by groups of timesteps, which balances them too."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "block"),
    [
        *(pytest.param("rtn-w8a8", block, marks=pytest.mark.exhaustive) for block in LAYERS),
        *(("ptq4dit-w8a8", block) for block in LAYERS if block not in BY_TIMESTEP),
        *(pytest.param("ptq4dit-w8a8", block, marks=pytest.mark.exhaustive) for block in BY_TIMESTEP),
        *(("htg-w8a8", block) for block in BY_TIMESTEP),
    ],
)
def test_layers_of_any_name_are_quantized(recipe: str, block: Any, tmp_path: Path) -> None:
    model = of(block)
    quantized = compiled(model, recipe)
    expected = {f"blocks.{i}.0.{name}".removesuffix(".").replace("..", ".") for i in (0, 1) for name in LAYERS[block]}
    assert {name for name, layer in quantized.plan.layers.items() if layer.activation_bits == 8} == expected
    with torch.no_grad():
        wanted = quantized(**call(3, seed=9))
        assert relative_error([wanted], [model(**call(3, seed=9))]) < 0.1
    fxquant.save(quantized, tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(fxquant.load(tmp_path / "q", model=of(block))(**call(3, seed=9)), wanted)


class Products(nn.Module):
    """Every way to multiply that is neither a layer nor attention."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4))
        self.linear = nn.Linear(4, 4)
        self.normed = weight_norm(nn.Linear(4, 4))
        self.up, self.gru, self.pairs = (
            nn.ConvTranspose1d(4, 4, 1),
            nn.GRU(4, 4, batch_first=True),
            nn.Bilinear(4, 4, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.kernel
        y = y + torch.einsum("btd,de->bte", x, self.kernel)
        y = y + torch.addmm(self.linear.bias, x[:, 0], self.kernel)[:, None]
        y = y + torch.bmm(x, torch.bmm(x.transpose(1, 2), x))
        y = y + torch.tensordot(x, self.kernel, 1)
        y = y + torch.outer(x[0, 0], x[0, 1])[:1]
        y = y + torch.mv(self.kernel, x[0, 0])
        y = y + torch.baddbmm(y, x, x.transpose(1, 2) @ x)
        y = y + self.up(x.transpose(1, 2)).transpose(1, 2)
        y = y + self.gru(x)[0] + self.pairs(x, x) + self.normed(x)
        y = y + F.linear(x, self.linear.weight * 2)
        y = y + (self.kernel @ self.kernel)[0]
        return y + self.linear(x)


WEIGHT = "it multiplies by a weight as"
ACTIVATIONS = "it is a product of two activations"
COMPUTED = "its weight is computed in the graph"
EXPECTED = [
    ("matmul", WEIGHT),
    ("einsum", WEIGHT),
    ("addmm", WEIGHT),
    ("tensordot", WEIGHT),
    ("bmm", ACTIVATIONS),
    ("bmm", ACTIVATIONS),
    ("outer", ACTIVATIONS),
    ("matmul", ACTIVATIONS),
    ("baddbmm", ACTIVATIONS),
    ("mv", WEIGHT),
    ("conv_transpose1d", "transposed convolutions are not quantized"),
    ("gru", "recurrent layers are not quantized"),
    ("bilinear", ACTIVATIONS),
    ("linear", COMPUTED),
    ("linear", COMPUTED),
    ("matmul", "it multiplies constants"),
]


def test_every_product_has_a_reason() -> None:
    graph = captured(Products(), x=torch.randn(2, 3, 4)).module.graph
    found = find_products(graph)
    shown = [(product.op, product.reason) for product in found]
    for op, reason in EXPECTED:
        match = next(entry for entry in shown if entry[0] == op and reason in entry[1])
        shown.remove(match)
    assert not shown
    assert all(":" in product.name for product in found)
    assert [product.name.partition(":")[0] for product in found if product.op in ("gru", "bilinear")] == [
        "gru.gru",
        "pairs.bilinear",
    ]


def test_names_of_products_do_not_depend_on_what_came_before() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
            if more is not None:
                x = x + F.linear(more, self.kernel * 3)
            return F.linear(x, self.kernel * 2)

    x = torch.randn(2, 3, 4)
    (alone,) = [p.name for p in find_products(captured(Optional(), x=x).module.graph)]
    both = [p.name for p in find_products(captured(Optional(), x=x, more=x).module.graph)]
    assert len(both) == 2
    assert both[1] == alone


def test_the_report_tells_them() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(8, 8) / 3)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.kernel

    report = fxquant.report(compiled(of(Block), "rtn-w8a8"))
    assert [name.partition(":")[0] for name in report.products] == ["blocks.0.0.matmul", "blocks.1.0.matmul"]
    text = report.table()
    assert "layers and matrix products in float, and why" in text
    assert "(2x): it multiplies by a weight as matmul" in text
    assert "embed: layers=default keeps layers of role patch in float" in text
    assert report.to_json()["products"] == dict(report.products)
