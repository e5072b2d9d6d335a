"""The pass low-rank-branch: proof, golden text, life of a model, and where it must not fire."""

from pathlib import Path

from example_passes.low_rank_branch import Branch, LowRankBranch

from fxquant.testing import assert_golden, assert_not_fired, prove, try_pass

BEFORE = "assign-precision{layers=all} ; "


def test_proof(toy, calls) -> None:
    proof = prove(LowRankBranch(rank=4), toy, calls, before=BEFORE)
    assert proof.tier == "algebraic" and proof.error < 1e-12


def test_golden(toy, calls) -> None:
    trial = try_pass(LowRankBranch(rank=4), toy, calls, before=BEFORE)
    assert trial.plan.decisions_of(Branch) == {"first": Branch(4), "second": Branch(4)}
    assert_golden(trial.after, Path(__file__).with_name("low_rank_branch.txt"))


def test_what_is_left_alone(toy, calls) -> None:
    assert_not_fired(LowRankBranch(rank=5), toy, calls, before=BEFORE)
    assert_not_fired(LowRankBranch(rank=4), toy, calls, before="assign-precision{precision=w4a16 layers=all} ; ")


def test_lifecycle(lifecycle) -> None:
    before = "assign-precision{precision=w4a4} ; balance-channels,absorb-affines"
    lifecycle(f"{before},low-rank-branch{{rank=4}},quantize-linears", ["fake-quant", "native"])
