"""The pass choose-bits: proof, choice under a budget, life of a model, and its errors."""

from pathlib import Path

import pytest
from example_passes.choose_bits import ChooseBits, Sensitivity, choose

from fxquant.errors import CalibrationError
from fxquant.testing import assert_golden, prove, try_pass

BEFORE = "assign-precision{layers=all} ; "


def test_proof(toy, calls) -> None:
    proof = prove(ChooseBits(mean=6.0), toy, calls, before=BEFORE)
    assert proof.tier == "exact" and proof.error == 0


def test_golden(toy, calls) -> None:
    trial = try_pass(ChooseBits(mean=6.0), toy, calls, before=BEFORE)
    lines = [
        f"{name}: w{trial.plan.layers[name].weight_bits}, noise {sensitivity.noise:.2e}"
        for name, sensitivity in trial.plan.decisions_of(Sensitivity).items()
    ]
    assert_golden("\n".join(lines), Path(__file__).with_name("choose_bits.txt"))


def test_the_budget_is_kept_and_used() -> None:
    noise = {"a": 1e-3, "b": 1e-4, "c": 1e-6}
    assert choose(noise, {"a": 100, "b": 100, "c": 100}, 4.0) == {"a": 4, "b": 4, "c": 4}
    assert choose(noise, {"a": 100, "b": 100, "c": 100}, 6.0) == {"a": 8, "b": 6, "c": 4}
    assert choose(noise, {"a": 300, "b": 100, "c": 100}, 5.0) == {"a": 4, "b": 8, "c": 4}
    assert choose(noise, {"a": 100, "b": 100, "c": 100}, 8.0) == {"a": 8, "b": 8, "c": 8}


def test_without_calls(toy, calls) -> None:
    with pytest.raises(CalibrationError, match="measures on calibration calls"):
        run_without_calls(toy, calls)


def run_without_calls(toy, calls) -> None:
    trial = try_pass(ChooseBits(), toy, calls, before=BEFORE)
    trial.context.inputs = []
    trial.plan.decisions_of(Sensitivity).clear()
    ChooseBits().run(trial.before.graph, trial.context, None)


def test_lifecycle(lifecycle) -> None:
    lifecycle("assign-precision ; choose-bits{mean=6},quantize-linears")
