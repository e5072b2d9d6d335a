"""The drop-in as a module of torch: state dicts and copies."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import ConfigurationError
from fxquant.runtime.model import GraphModel
from tests.tiny import calibrate, inputs, make_dit, run


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    model = make_dit()
    return fxquant.compile(model, recipe="ptq4dit-w4a8", calibrate=calibrate(model), measure=0)


def zeroed(model: GraphModel) -> GraphModel:
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in clone.tensors().values():
            tensor.zero_()
    return clone


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


# --- state dicts ---


@pytest.mark.slow
def test_keys_are_the_names_in_the_model_whatever_was_captured(quantized: GraphModel) -> None:
    model = copy.deepcopy(quantized)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "transformer_blocks.0.attn1.to_q.weight_packed" in before
    assert not any(name.startswith("graphs") for name in before)
    run(model, size=4)
    assert len(model.graphs) == 2
    assert list(model.state_dict()) == list(before)
    model.load_state_dict(before)  # From before the second graph, after it.
    zero = zeroed(model)
    zero.load_state_dict(before)
    for size in (8, 4):
        assert torch.equal(run(zero, size=size), run(quantized, size=size))


@pytest.mark.parametrize("assign", [False, True])
def test_within_another_module(quantized: GraphModel, assign: bool) -> None:
    state = Holder(quantized).state_dict()
    assert all(name.startswith("inner.") for name in state)
    state = {name: tensor.clone() for name, tensor in state.items()}
    holder = Holder(zeroed(quantized))
    assert holder.load_state_dict(state, assign=assign) == ([], [])
    assert torch.equal(run(holder.inner), run(quantized))
    assert torch.equal(run(holder.inner, size=4), run(quantized, size=4))


def test_a_state_dict_that_does_not_fit(quantized: GraphModel) -> None:
    model = copy.deepcopy(quantized)
    name, state = "transformer_blocks.0.attn1.to_q.bias", model.state_dict()
    for change, said in (
        (lambda s: s.pop(name), f'Missing key.*"{name}"'),
        (lambda s: s.update({name: torch.zeros(3)}), rf"{name} has shape \(3,\), not \(16,\)"),
        (lambda s: s.update(other=torch.zeros(3)), 'Unexpected key.*"other"'),
    ):
        given = dict(state)
        change(given)
        with pytest.raises(RuntimeError, match=f"(?s){said}"):
            model.load_state_dict(given)
    assert sorted(model.load_state_dict({}, strict=False).missing_keys) == sorted(state)
    assert torch.equal(run(model), run(quantized))


def test_a_traced_model_has_the_state_of_the_original() -> None:
    model, other = make_dit(), make_dit()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    traced = fxquant.trace(model)
    for capture in (False, True):
        if capture:
            run(traced)
        state = traced.state_dict()
        assert state.keys() == {*dict(model.named_parameters()), *dict(model.named_buffers())}
        traced.load_state_dict({name: tensor.clone() for name, tensor in fxquant.trace(other).state_dict().items()})
        assert torch.equal(run(traced), run(other))
        assert torch.equal(run(traced, size=4), run(other, size=4))


def test_hooks_of_state_dicts_run(quantized: GraphModel) -> None:
    model, seen = copy.deepcopy(quantized), []
    model.register_state_dict_pre_hook(lambda *_: seen.append("writing"))
    model.register_load_state_dict_post_hook(lambda *_: seen.append("read"))
    model.load_state_dict(model.state_dict())
    assert seen == ["writing", "read"]


# --- copies ---


def test_a_shallow_copy_shares_tensors_and_calls_itself(quantized: GraphModel) -> None:
    clone = copy.copy(quantized)
    assert torch.equal(run(clone), run(quantized))
    graphs = len(quantized.graphs)
    run(clone, size=4)
    assert (len(clone.graphs), len(quantized.graphs)) == (2, graphs)
    ours, theirs = clone.tensors(), quantized.tensors()
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in theirs)


def test_a_compiled_one_is_saved_as_it_is(quantized: GraphModel, tmp_path: Path) -> None:
    fxquant.save(torch.compile(quantized), tmp_path / "compiled")
    fxquant.save(quantized, tmp_path / "plain")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("compiled", "plain")]
    assert files[0] == files[1]
    for write in (fxquant.save, fxquant.export_aot):
        with pytest.raises(ConfigurationError, match=r"traced by fxquant\.trace, and is not quantized"):
            write(fxquant.trace(make_dit()), tmp_path / "traced")
        with pytest.raises(ConfigurationError, match="not a DiTTransformer2DModel"):
            write(make_dit(), tmp_path / "float")


def test_a_call_without_its_timestep() -> None:
    """Where the model takes it among any keywords, a call may lack the very name."""

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
            return self.proj(x) * more.get("timestep", torch.ones(len(x)))[:, None]

    model, x = Keywords().eval(), torch.randn(2, 4)
    made = fxquant.compile(
        model,
        recipe="rtn-w8a8",
        layers="all",
        calibrate=lambda: [model(x, timestep=torch.full((2,), step)) for step in (0.9, 0.5)],
        measure=0,
    )
    assert torch.equal(made(x), made(x, timestep=torch.ones(2)))


def test_its_tensors_can_be_pickled(quantized: GraphModel) -> None:
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    model = zeroed(quantized)
    model.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(model(**inputs()).sample, quantized(**inputs()).sample)
