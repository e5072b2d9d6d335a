"""What the rules do is proved in tests/channels; here is the graph before and after."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.ir.stages import Stage
from fxquant.pipeline import Pipeline
from fxquant.plan import Plan
from tests.passes.models import AdaLN, adaln
from tests.passes.test_balance_channels import FACTORS, decided
from tests.support import captured, rewritten


def test_before_and_after() -> None:
    float_text, _ = rewritten(AdaLN(), "", **adaln())
    _, balanced = rewritten(AdaLN(), "balance-channels", decided(), **adaln())
    _, after = rewritten(AdaLN(), "balance-channels,absorb-affines", decided(), **adaln())
    assert "channel_affine" in balanced
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
