"""Offloading and other changes of a model: compiled and offloaded, offloaded before it was quantized."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import fxquant
from fxquant.errors import CalibrationError, SpeedWarning
from fxquant.runtime.model import GraphModel
from tests.tiny import calibrate, inputs, make_dit, make_pipeline, run


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    model = make_dit()
    return fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), measure=0)


def image(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe([1], num_inference_steps=2, generator=generator, output_type="np").images)


# --- compiled and offloaded ---

OFFLOADS: dict[str, Callable[[GraphModel], Any]] = {
    "group": lambda model: model.enable_group_offload("cpu"),
    "accelerate": lambda model: accelerate.cpu_offload(model, torch.device("cpu")),
}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("first", ["compile", "offload"])
def test_an_offloaded_model_that_is_compiled_warns_once(quantized: GraphModel, offload: str, first: str) -> None:
    model, counter = copy.deepcopy(quantized), CompileCounter()
    if first == "offload":
        OFFLOADS[offload](model)
    model.compile(backend=counter)
    if first == "compile":
        OFFLOADS[offload](model)
    with pytest.warns(SpeedWarning, match=r"runs without being compiled\. compile_repeated_blocks\(\) works"):
        made = model(**inputs()).sample
    assert torch.equal(made, run(quantized)) and counter.frame_count == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpeedWarning)
        model(**inputs())


def test_within_a_larger_function_that_is_compiled(quantized: GraphModel) -> None:
    model = copy.deepcopy(quantized)
    model.enable_group_offload("cpu")
    function = torch.compile(lambda given: model(**given).sample + 1, backend="eager")
    with pytest.warns(SpeedWarning, match="runs without being compiled"):
        made = function(inputs())
    assert torch.equal(made, run(quantized) + 1)


def test_an_offloaded_model_that_is_not_compiled_does_not_warn(quantized: GraphModel) -> None:
    model = copy.deepcopy(quantized)
    model.enable_group_offload("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpeedWarning)
        model(**inputs())


# --- offloaded before it is quantized ---


@pytest.mark.slow
def test_a_pipeline_that_is_offloaded_already() -> None:
    """Pipelines attach their hooks again after each call, in calibration too."""
    pipe = make_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    expected, floating = image(pipe), pipe.transformer

    def broken() -> None:
        image(pipe)
        raise KeyError

    with pytest.raises(CalibrationError, match="KeyError"):
        fxquant.compile(floating, recipe="rtn-w8a8", calibrate=broken)
    assert torch.equal(image(pipe), expected)
    assert type(floating._hf_hook).__name__ == "CpuOffload"
    pipe.transformer = fxquant.compile(
        floating, recipe="rtn-w8a8", calibrate=lambda: [image(pipe), image(pipe)], measure=1
    )
    assert type(pipe.transformer._hf_hook).__name__ == "CpuOffload"
    assert not hasattr(floating, "_hf_hook") and not hasattr(floating, "_old_forward")
    made = image(pipe)
    assert 0 < (made - expected).norm() / expected.norm() < 0.05
    pipe.remove_all_hooks()
    assert not hasattr(pipe.transformer, "_hf_hook")
    assert torch.equal(image(pipe), made)
    assert torch.equal(run(floating), run(make_dit()))


def test_compile_pipeline_renews_the_hooks_of_the_pipeline() -> None:
    pipe = make_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    fxquant.compile_pipeline(pipe, recipe="rtn-w8a8", calibrate=lambda: image(pipe), measure=0)
    assert pipe.transformer in [hook.model for hook in pipe._all_hooks]
    made = image(pipe)
    pipe.remove_all_hooks()
    assert torch.equal(image(pipe), made)
