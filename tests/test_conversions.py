"""What lets tests share the work of conversions shares no state, and tells apart what matters."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxquant.capture import rebuilding
from fxquant.errors import VerificationError
from fxquant.ir import proofs
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import SPECS, Stage, verify
from tests import conversions
from tests.conversions import rebuilt_once, worked_out_once
from tests.support import captured
from tests.tiny import make_dit

CHECK = conversions._CHECK_VALUE


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 + 1


def test_equal_graphs_have_code_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile, tracebacks and the inspector find out about the code of one is not told of the other."""
    monkeypatch.setattr(conversions, "_CODES", type(conversions._CODES)())
    with worked_out_once():
        first, second = (fx.symbolic_trace(Doubled()) for _ in range(2))
    assert len(conversions._CODES) == 1
    codes = [type(module).forward.__code__ for module in (first, second)]
    assert codes[0] is not codes[1]
    assert codes[0].co_filename != codes[1].co_filename
    assert codes[0].co_code == codes[1].co_code
    x = torch.randn(3)
    assert torch.equal(first(x), second(x))
    assert torch.equal(first(x), Doubled()(x))


def test_shapes_are_the_same_and_the_cache_is_off_again() -> None:
    module = captured(Doubled(), torch.randn(2, 3)).module
    rewriter = Rewriter(module, "test")
    node = next(node for node in module.graph.nodes if node.op == "call_function")
    before = rewriter._fake_mode.cache_enabled
    with worked_out_once():
        found = [rewriter.infer(node) for _ in range(2)]
    assert rewriter._fake_mode.cache_enabled == before
    expected = rewriter.infer(node)
    assert [(each.shape, each.dtype, each.stride()) for each in found] == 2 * [
        (expected.shape, expected.dtype, expected.stride())
    ]


def test_equal_models_are_rebuilt_once_and_others_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def counted(model: nn.Module, timestep: str | None) -> str | None:
        built.append(model)
        return "because"

    monkeypatch.setattr(conversions, "_OBSTACLE", counted)
    monkeypatch.setattr(conversions, "_OBSTACLES", {})
    with rebuilt_once():
        for model in (make_dit(), make_dit(), make_dit(layers=2)):
            assert rebuilding.obstacle(model, "timestep") == "because"
        changed = make_dit()
        changed.register_to_config(sample_size=(8,))
        rebuilding.obstacle(changed, "timestep")
        changed.register_to_config(sample_size=[8])
        rebuilding.obstacle(changed, "timestep")
        changed.register_forward_hook(lambda *_: None)
        rebuilding.obstacle(changed, "timestep")
    assert len(built) == 5


def test_values_of_equal_ops_are_checked_once_and_others_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in another trace with open sizes, whose symbols are others; what is recorded wrongly is still found."""
    checked = []

    def counted(node: fx.Node) -> None:
        checked.append(node)
        CHECK(node)

    modules = [captured(Doubled(), torch.randn(2, width)).module for width in (3, 3, 5)]
    monkeypatch.setattr(conversions, "_CHECK_VALUE", counted)
    monkeypatch.setattr(conversions, "_TRUE", set())
    found = []
    with worked_out_once():
        for module in modules:
            for node in module.graph.nodes:
                node.meta.pop(proofs._PROVEN, None)
            verify(module, SPECS[Stage.CAPTURED])
            found.append(len(checked))
        assert found == [2, 2, 4]
        node = next(node for node in modules[1].graph.nodes if node.op == "call_function")
        node.meta["val"] = node.meta["val"].to(torch.float64)
        with pytest.raises(VerificationError, match="is recorded as"):
            verify(modules[1], SPECS[Stage.CAPTURED])


def test_models_get_their_values_and_skeletons_take_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Linear, "reset_parameters", conversions._RESETS[nn.Linear])
    found = []
    for context in (nullcontext, worked_out_once):
        torch.manual_seed(0)
        with context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with FakeTensorMode():
                skeleton = nn.Linear(3, 2)
            found.append((nn.Linear(3, 2).weight, torch.rand(2)))
        assert isinstance(skeleton.weight, FakeTensor) and skeleton.weight.requires_grad
    for expected, actual in zip(*found, strict=True):
        assert torch.equal(expected, actual)
