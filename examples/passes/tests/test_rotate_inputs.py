"""The pass rotate-inputs: proof, golden text, life of a model, and where it must not fire."""

from pathlib import Path

import pytest
import torch
from example_passes.rotate_inputs import RotateInputs, Rotation, matrix, rotate

import fxquant
from fxquant.testing import assert_golden, assert_not_fired, check_lifecycle, prove, try_pass

BEFORE = "assign-precision{precision=w4a4 layers=all} ; "


def test_the_matrix_is_symmetric_and_orthogonal() -> None:
    h = matrix(64)
    torch.testing.assert_close(h @ h, torch.eye(64, dtype=torch.float64), atol=1e-14, rtol=0)
    assert torch.equal(h, h.T)


def test_proof(toy, calls) -> None:
    proof = prove(RotateInputs(), toy, calls, before=BEFORE)
    assert proof.tier == "algebraic" and proof.error < 1e-12


def test_golden(toy, calls) -> None:
    trial = try_pass(RotateInputs(), toy, calls, before=BEFORE)
    assert trial.plan.decisions_of(Rotation) == {"first": Rotation(16), "second": Rotation(16)}
    assert_golden(trial.after, Path(__file__).with_name("rotate_inputs.txt"))


def test_what_is_left_alone(toy, calls) -> None:
    assert_not_fired(RotateInputs(least=32), toy, calls, before=BEFORE)


def test_lifecycle(lifecycle) -> None:
    lifecycle("assign-precision{precision=w4a4} ; rotate-inputs,quantize-linears")


def test_lifecycle_before_calibration(toy, calls, longer) -> None:
    recipe = f"{BEFORE.replace(' ; ', ',rotate-inputs ; ')}quantize-linears"
    check_lifecycle(recipe, toy, calls, other_shape=longer, backends=["fake-quant", "native"])


@pytest.mark.parametrize("order", [",rotate-inputs ; ", " ; rotate-inputs,"])
def test_the_range_is_that_of_the_rotated_input(order, toy, calls) -> None:
    quantized = fxquant.compile(
        toy,
        recipe=f"assign-precision{{precision=w8a8 layers=all}}{order}quantize-linears",
        calibrate=lambda: [toy(**call) for call in calls],
    )
    found = quantized.plan.layers["first"].activation
    rotated = rotate(torch.cat([call["x"] for call in calls]), matrix(16).float())
    assert (found.low, found.high) == pytest.approx((float(rotated.min()), float(rotated.max())))
