"""A quantized model in another dtype: its graphs are made anew, its codes stay, and its pipeline is converted whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import BackendError, ConfigurationError
from fxquant.runtime.model import GraphModel
from tests.adapters.loras import lora, relative
from tests.tiny import calibrate, inputs, make_dit, make_pipeline, run


def call(model: nn.Module, dtype: torch.dtype, size: int = 8) -> Tensor:
    given = inputs(size=size)
    made: Tensor = model(**{**given, "hidden_states": given["hidden_states"].to(dtype)}).sample
    assert made.dtype == dtype
    return made.float()


@pytest.fixture(scope="module", params=["fake-quant", "native"])
def quantized(request: pytest.FixtureRequest) -> GraphModel:
    model = make_dit()
    return fxquant.compile(model, recipe="ptq4dit-w4a8", backend=request.param, calibrate=calibrate(model), measure=0)


@pytest.mark.slow
def test_it_computes_in_the_dtype(quantized: GraphModel, tmp_path: Path) -> None:
    expected, model = run(quantized), copy.deepcopy(quantized)
    before = model.stored_tensors()
    assert model.to(torch.bfloat16) is model
    assert model.dtype == torch.bfloat16
    found = call(model, torch.bfloat16)
    assert relative(found, expected) < 0.05
    assert call(model, torch.bfloat16, size=4).isfinite().all()  # Another size is traced in this dtype too.
    for name, tensor in model.stored_tensors().items():
        assert torch.equal(tensor, before[name].to(tensor.dtype)), name
    fxquant.save(model, tmp_path / "model")
    read = fxquant.load(tmp_path / "model", torch_dtype=torch.bfloat16)
    assert torch.equal(call(read, torch.bfloat16), found)
    assert torch.equal(run(quantized), expected)
    assert relative(run(model.float()), expected) < 0.02  # Tensors that were rounded to bfloat16 stay rounded.


def test_loras_stay(quantized: GraphModel) -> None:
    model, adapter = copy.deepcopy(quantized), lora(make_dit(), targets=("to_q", "to_v", "net.2"), size=0.3)
    plain = run(model)
    model.load_lora_adapter(adapter, prefix="transformer", adapter_name="style")
    model.set_adapters("style", 0.8)
    expected = run(model)
    assert relative(expected, plain) > 0.1
    model.to(torch.bfloat16)
    assert relative(call(model, torch.bfloat16), expected) < 0.05
    model.load_lora_adapter(adapter, prefix="transformer", adapter_name="style", hotswap=True)
    model.set_adapters("style", 0.8)
    assert relative(call(model, torch.bfloat16), expected) < 0.05
    model.disable_lora()
    assert relative(call(model, torch.bfloat16), plain) < 0.05


def test_an_offloaded_model_stays_offloaded(quantized: GraphModel) -> None:
    model = copy.deepcopy(quantized)
    model.enable_group_offload("cpu")
    model.half()
    assert model._place.streaming is not None
    assert relative(call(model, torch.float16), run(quantized)) < 0.05


def test_a_pipeline_is_converted_whole(quantized: GraphModel) -> None:
    pipe = make_pipeline(copy.deepcopy(quantized))

    def image() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe([1], num_inference_steps=2, generator=generator, output_type="np").images)

    expected = image()
    pipe.to(torch.bfloat16)
    assert {pipe.transformer.dtype, pipe.vae.dtype} == {torch.bfloat16}
    assert relative(image(), expected) < 0.1


@pytest.mark.parametrize("goal", [torch.float8_e4m3fn, "meta"])
def test_a_pipeline_is_refused_before_a_part_changes(goal: Any) -> None:
    pipe = make_pipeline()
    before = {name: id(tensor) for name, tensor in pipe.transformer.named_parameters()}
    pipe.vae = fxquant.trace(make_dit())
    for options in ({"dtype": goal} if isinstance(goal, torch.dtype) else {"device": goal}, None):
        with pytest.raises(ConfigurationError, match=r"not in torch\.float8_e4m3fn|meta device"):
            pipe.to(**options) if options else pipe.to(goal)
    assert (pipe.transformer.dtype, pipe.transformer.device.type) == (torch.float32, "cpu")
    assert {name: id(tensor) for name, tensor in pipe.transformer.named_parameters()} == before
    pipe.to("cpu", torch.bfloat16)
    assert {pipe.transformer.dtype, pipe.vae.dtype} == {torch.bfloat16}


def test_a_traced_model_is_converted_beside_its_original() -> None:
    original = make_dit()
    model = fxquant.trace(original)
    expected = run(model)
    model.to(torch.bfloat16)
    assert torch.equal(call(model, torch.bfloat16), call(make_dit().to(torch.bfloat16), torch.bfloat16))
    assert torch.equal(run(original), expected)
    model.enable_group_offload("cpu")
    assert model.half()._place.streaming is not None
    assert relative(call(model, torch.float16), expected) < 0.05
    assert model.dtype == torch.float16


def test_what_cannot_be_converted_stays_as_it_was(quantized: GraphModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(quantized)
    expected = run(model)
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ConfigurationError, match="computes in float16, bfloat16, float32 or float64, not in"):
            model.to(dtype)

    def check(*_: Any) -> None:
        raise BackendError("not in this dtype")

    monkeypatch.setattr(type(model.backend), "check", check)
    with pytest.raises(BackendError, match="not in this dtype"):
        model.to(torch.bfloat16)
    assert model.dtype == torch.float32 and torch.equal(run(model), expected)
