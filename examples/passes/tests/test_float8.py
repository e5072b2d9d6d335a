"""The pass quantize-e4m3: its operator, its error, golden text, life of a model, and the backends that refuse it."""

from pathlib import Path

import pytest
import torch
from example_passes.float8 import Float8, QuantizeE4M3, decode, encode

import fxquant
from fxquant.errors import BackendError
from fxquant.testing import assert_golden, assert_not_fired, prove, try_pass

BEFORE = "assign-precision{layers=all} ; "


def test_numbers_keep_four_bits_of_their_mantissa() -> None:
    x, scale = torch.logspace(-3, 2, 1000, dtype=torch.float64), torch.tensor(0.25)
    rounded = decode(encode(x, scale), scale, x.dtype)
    inside = x < 448 * 0.25
    assert ((rounded - x).abs() / x)[inside & (x > 2**-6 * 0.25)].max() <= 1 / 16
    assert (rounded[~inside] == 112).all()


def test_proof(toy, calls) -> None:
    proof = prove(QuantizeE4M3(), toy, calls, before=BEFORE)
    assert proof.tier == "lossy" and 25 < proof.sqnr_db < 45


def test_golden(toy, calls) -> None:
    trial = try_pass(QuantizeE4M3(), toy, calls, before=BEFORE)
    largest = max(float(call["x"].abs().max()) for call in calls)
    assert trial.plan.decisions_of(Float8)["first"].input_scale == pytest.approx(largest / 448)
    assert trial.plan.layers["first"].reason == "quantize-e4m3 rounds its weight and its input to e4m3"
    assert_golden(trial.after, Path(__file__).with_name("float8.txt"))


def test_what_is_left_alone(toy, calls) -> None:
    assert_not_fired(QuantizeE4M3(), toy, calls, before="assign-precision{precision=w4a16 layers=all} ; ")


def test_lifecycle(lifecycle) -> None:
    lifecycle("assign-precision ; quantize-e4m3,quantize-linears", ["fake-quant"])


@pytest.mark.parametrize("backend", ["native", "torchao"])
def test_other_backends_refuse_its_layers_by_name(backend, toy, calls, monkeypatch) -> None:
    if backend == "torchao":
        pytest.importorskip("torchao")
        # Without VNNI instructions torchao refuses these layers for that reason, before it looks at their ops.
        monkeypatch.setattr("fxquant.backends.torchao.parts.unfit", lambda: None)
    with pytest.raises(BackendError) as refused:
        fxquant.compile(
            toy,
            recipe="assign-precision{layers=all} ; quantize-e4m3,quantize-linears",
            calibrate=lambda: [toy(**call) for call in calls],
            backend=backend,
        )
    text = str(refused.value)
    assert f"backend {backend!r} cannot run the op example_passes::" in text
    assert "of 2 layers (first, second), made by quantize-e4m3; use backend 'fake-quant'" in text
