"""The pass my-pass: proof, golden text, where it must not fire, and the life of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from fxquant_my_pass.my_pass import MyPass, Scaling

from fxquant.testing import (
    assert_golden,
    assert_not_fired,
    check_lifecycle,
    example_call,
    example_calls,
    prove,
    random_graph,
    tiny_linears,
    try_pass,
)

MODEL = tiny_linears()  # The layers ``first`` and ``second``, small enough to read the graph.
CALLS = example_calls(MODEL, size=5)
BEFORE = "assign-precision{layers=all} ; "  # The passes that come first: every linear is to become W8A8.


def test_proof() -> None:
    """The output stays the same, a second run changes nothing, and the plan alone gives the same graph."""
    proof = prove(MyPass(factor=3.0), MODEL, CALLS, before=BEFORE)
    assert proof.tier == "algebraic" and proof.error < 1e-12


@pytest.mark.parametrize("seed", [1])
def test_proof_on_random_models(seed: int) -> None:
    """Forms of adaLN, attention and norms that nobody thought of; try more seeds when the pass changes."""
    found = random_graph(seed)
    prove(MyPass(factor=3.0), found.model, found.calls)


def test_golden() -> None:
    """The graph after the pass is the text in ``my_pass.txt``."""
    trial = try_pass(MyPass(factor=4.0), MODEL, CALLS, before=BEFORE)
    assert trial.plan.decisions_of(Scaling) == {"first": Scaling(4.0), "second": Scaling(4.0)}
    assert_golden(trial.after, Path(__file__).with_name("my_pass.txt"))


def test_what_is_left_alone() -> None:
    """Linears that stay float."""
    assert_not_fired(MyPass(), MODEL, CALLS, before="assign-precision{precision=w4a16 layers=all} ; ")


def test_lifecycle() -> None:
    """Save, load, copy, other sizes, replay of the plan, torch.compile, and two backends."""
    recipe = "assign-precision{layers=all} ; my-pass{factor=4.0},quantize-linears"
    longer = example_call(MODEL, size=7)  # More tokens, for which another graph is made.
    check_lifecycle(recipe, MODEL, CALLS, other_shape=longer, backends=["fake-quant", "native"])
