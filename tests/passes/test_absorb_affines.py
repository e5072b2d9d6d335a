"""What the rules do is proved in tests/channels; here is the graph before and after."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.ir.stages import Stage
from fxquant.ir.tensors import read_tensors
from fxquant.pipeline.pipeline import Pipeline
from fxquant.planning.plan import Plan
from tests.passes.models import AdaLN, adaln
from tests.passes.test_balance_channels import FACTORS, decided
from tests.support import captured, golden, rewritten, text


def test_before_and_after() -> None:
    float_text, _ = rewritten(AdaLN(), "", **adaln())
    _, balanced = rewritten(AdaLN(), "balance-channels", decided(), **adaln())
    _, after = rewritten(AdaLN(), "balance-channels,absorb-affines", decided(), **adaln())
    assert balanced == golden(
        """
        x: float32[B, 3, 4]
        timestep: float32[B, 4]
        silu: float32[B, 4] = silu(timestep)
        linear: float32[B, 8] = linear(silu, @time.weight, @time.bias)
        unsqueeze: float32[B, 1, 8] = unsqueeze(linear, 1)
        chunk = chunk(unsqueeze, 2, -1)
        getitem: float32[B, 1, 4] = getitem(chunk, 0)
        getitem_1: float32[B, 1, 4] = getitem(chunk, 1)
        layer_norm: float32[B, 3, 4] = layer_norm(x, [4], None, None, 1e-05, False)
        add: float32[B, 1, 4] = add.Tensor(getitem, 1)
        mul: float32[B, 3, 4] = mul.Tensor(layer_norm, add)
        add_1: float32[B, 3, 4] = add.Tensor(mul, getitem_1)
        add_1_balanced: float32[B, 3, 4] = fxquant::channel_affine(add_1, @q.balance, None)
        linear_1: float32[B, 3, 4] = linear(add_1_balanced, @q.weight, @q.bias)
        return linear_1
        """
    )
    assert after == golden(
        """
        x: float32[B, 3, 4]
        timestep: float32[B, 4]
        silu: float32[B, 4] = silu(timestep)
        linear: float32[B, 8] = linear(silu, @time.weight, @time.bias)
        unsqueeze: float32[B, 1, 8] = unsqueeze(linear, 1)
        chunk = chunk(unsqueeze, 2, -1)
        getitem: float32[B, 1, 4] = getitem(chunk, 0)
        getitem_1: float32[B, 1, 4] = getitem(chunk, 1)
        layer_norm: float32[B, 3, 4] = layer_norm(x, [4], None, None, 1e-05, False)
        add: float32[B, 1, 4] = add.Tensor(getitem, 1)
        mul: float32[B, 3, 4] = mul.Tensor(layer_norm, add)
        add_1: float32[B, 3, 4] = add.Tensor(mul, getitem_1)
        linear_1: float32[B, 3, 4] = linear(add_1, @q.weight, @q.bias)
        return linear_1
        """
    )
    assert after == float_text


def test_what_the_weights_become() -> None:
    model = AdaLN()
    module = captured(model, **adaln()).module
    Pipeline.parse("balance-channels,absorb-affines").run(module, decided())
    weight, bias = (module.get_parameter(f"time.{name}").double() for name in ("weight", "bias"))
    old_weight, old_bias = model.time.weight.double(), model.time.bias.double()
    both = FACTORS.repeat(2)
    torch.testing.assert_close(weight, old_weight / both[:, None])
    gamma, beta = old_bias.chunk(2)
    torch.testing.assert_close(bias, torch.cat([(gamma + 1) / FACTORS - 1, beta / FACTORS]))


class Affine(nn.Module):
    """A factor behind ReLU, and maybe a shift."""

    def __init__(self, factor: Tensor, shift: Tensor | None = None) -> None:
        super().__init__()
        self.a, self.factor, self.shift = nn.Linear(4, 4), nn.Parameter(factor), shift and nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.fxquant.channel_affine(F.relu(self.a(x)), self.factor, self.shift)


def absorbed(model: nn.Module) -> bool:
    module = captured(model, x=torch.randn(3, 4)).module
    x = torch.randn(3, 4)
    expected = model(x)
    Pipeline.parse("absorb-affines").run(module, Plan("", "", None), Stage.TRANSFORMED)
    torch.testing.assert_close(module(x)[0], expected)
    return not any("channel_affine" in str(node.target) for node in module.graph.nodes)


def test_factors_are_absorbed_if_they_are_positive_and_have_no_shift() -> None:
    assert absorbed(Affine(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert absorbed(Affine(torch.tensor([2.0])))
    assert absorbed(Affine(torch.tensor(2.0)))
    assert not absorbed(Affine(torch.tensor([1.0, 2.0, -3.0, 4.0])))
    assert not absorbed(Affine(torch.tensor([1.0, 2.0, 0.0, 4.0])))
    assert not absorbed(Affine(torch.ones(4) * 2, torch.tensor(1.0)))
    assert absorbed(Affine(torch.ones(1, 4) * 2))


class Behind(nn.Module):
    """A factor that nothing can take, for each of the reasons that there are."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.a, self.factor = kind, nn.Linear(4, 4), nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.a(x)
        z = {"shared": y, "gelu": F.gelu(y), "wrong axis": y.transpose(1, 2)}[self.kind]
        scaled = torch.ops.fxquant.channel_affine(z, self.factor, None)
        return (scaled, y.sigmoid()) if self.kind == "shared" else (scaled,)


@pytest.mark.parametrize("kind", ["shared", "gelu", "wrong axis"])
def test_must_not_fire(kind: str) -> None:
    """With a shared user or behind a barrier, or where tokens stand for channels, the factor stays at run time."""
    module = captured(Behind(kind), x=torch.randn(2, 4, 4)).module
    before = text(module)
    tensors = {name: tensor.clone() for name, tensor in read_tensors(module).items()}
    (record,) = Pipeline.parse("absorb-affines").run(module, Plan("", "", None), Stage.TRANSFORMED)
    assert (record.edits, text(module)) == (0, before)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_tensors(module).items())
