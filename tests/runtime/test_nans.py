"""A sample with NaN is NaN as a whole, whatever runs it, and the other samples of its batch keep their bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends.native import Native
from fxquant.capture.calls import BATCH, CallSpec, TensorSpec
from fxquant.pipeline.backend import Backend
from fxquant.runtime.nans import with_nans
from tests.tiny import calibrate, inputs, make_dit

BACKENDS = {"fake-quant": "fake-quant", "native": "native", "onednn": Native(kernels="onednn")}
SAMPLE = {("fake-quant", "all"), ("native", "all"), ("onednn", "default")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "layers"),
    [
        pytest.param(
            backend, layers, marks=[pytest.mark.exhaustive] * ((name, layers) not in SAMPLE), id=f"{name}-{layers}"
        )
        for name, backend in BACKENDS.items()
        for layers in ("default", "all")
    ],
)
def test_one_nan_in_a_sample(backend: str | Backend, layers: str, tmp_path: Path) -> None:
    model = make_dit()
    quantized = fxquant.compile(
        model, recipe="ptq4dit-w8a8", layers=layers, backend=backend, calibrate=calibrate(model), measure=0
    )
    fxquant.save(quantized, tmp_path / "saved")
    call = inputs(batch=3)
    poisoned = call | {"hidden_states": call["hidden_states"].clone()}
    poisoned["hidden_states"][1, 0, 0, 0] = torch.nan
    with torch.no_grad():
        for made in (quantized, fxquant.load(tmp_path / "saved", backend=backend)):
            expected, found = made(**call).sample, made(**poisoned).sample
            assert found[1].isnan().all()
            assert torch.equal(found[::2], expected[::2])
        assert model(**poisoned).sample[1].isnan().all()  # As in the float model.


class Overflows(nn.Module):
    """NaN that is in no input: one token's, which nothing spreads."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.proj(x) + x.square().square().square().sub(x.square().square().square()) + timestep[:, None, None]


def test_nan_that_the_model_makes() -> None:
    model = Overflows().eval()
    x, timestep = torch.randn(3, 5, 4), torch.ones(3)
    quantized = fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=lambda: model(x, timestep), measure=0)
    x[2, 1, 0] = 1e30
    with torch.no_grad():
        found = quantized(x, timestep)
    assert found[2].isnan().all()
    assert found[:2].isfinite().all()


def spec(*shape: int | str, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(tuple(shape), dtype)


def call_of(*specs: TensorSpec) -> CallSpec:
    names = tuple(f"x{number}" for number in range(len(specs)))
    return CallSpec(names, specs, {name: number for number, name in enumerate(names)})


NAN = torch.tensor([[1.0], [torch.nan]])


def test_what_shares_no_batch_makes_all_samples_nan() -> None:
    call = call_of(spec(BATCH, 1), spec(1, 7))
    (found,) = with_nans(call, [torch.ones(2, 1), torch.full((1, 7), torch.nan)], [torch.ones(2, 3)])
    assert found.isnan().all()
    (found,) = with_nans(call, [NAN, torch.ones(1, 7)], [torch.ones(5)])  # An output without a batch.
    assert found.isnan().all()


def test_outputs_that_are_no_floats_stay() -> None:
    codes, text = torch.ones(2, 3, dtype=torch.uint8), "text"
    found = with_nans(call_of(spec(BATCH, 1)), [NAN], [torch.ones(2), codes, text])
    assert found[0].isnan().tolist() == [False, True]
    assert found[1] is codes
    assert found[2] is text


def test_nothing_is_copied_without_nan() -> None:
    output = torch.tensor([[-0.0], [torch.inf]])
    assert (
        with_nans(call_of(spec(BATCH, 1), spec(dtype=torch.int64)), [torch.ones(2, 1), torch.tensor(3)], [output])[0]
        is output
    )
    assert with_nans(call_of(spec(dtype=torch.int64)), [torch.tensor(3)], [output])[0] is output


def test_in_a_larger_function_that_is_compiled() -> None:
    model = Overflows().eval()
    x, timestep = torch.randn(3, 5, 4), torch.ones(3)
    quantized = fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=lambda: model(x, timestep), measure=0)
    compiled = torch.compile(lambda *given: quantized(*given) + 1, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x, timestep), quantized(x, timestep) + 1)
        x[0, 0, 0] = torch.nan
        assert compiled(x, timestep)[0].isnan().all()
