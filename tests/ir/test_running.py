"""Runs of a graph with other tensors."""

from __future__ import annotations

import torch
from torch import nn

from fxquant.ir.layers import stored_weight
from fxquant.ir.running import run_with
from fxquant.ir.tensors import read_tensors
from tests.support import captured, layer_node


def test_another_weight_for_one_run() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4)
    module = captured(model, x).module
    before = {name: tensor.clone() for name, tensor in read_tensors(module).items()}
    weight = stored_weight(layer_node(module, "2"))
    assert weight is not None
    (plain,), (zero,) = run_with(module, [x]), run_with(module, [x], {weight: torch.zeros(2, 4)})
    assert torch.equal(plain, model(x)) and not plain.requires_grad
    assert torch.equal(zero, model[2].bias.expand(3, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in read_tensors(module).items())
