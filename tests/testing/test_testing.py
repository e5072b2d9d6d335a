"""The kit for authors: golden files, proofs of passes, the life of a quantized model, and tiny models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant.errors import ConfigurationError, LifecycleError, PassError, ProofError
from fxquant.ir.arguments import args
from fxquant.ir.meta import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.pipeline.pipeline import PASSES, Pass, Tier, register_pass
from fxquant.planning.context import PassContext
from fxquant.planning.pass_decisions import Decision
from fxquant.testing import (
    TINY,
    assert_golden,
    assert_not_fired,
    check_lifecycle,
    example_call,
    example_calls,
    own_passes,
    prove,
    tiny_dit,
    tiny_linears,
    try_pass,
)
from tests.support import captured

aten = torch.ops.aten


@dataclass
class Factor(Decision, of="test-kit"):
    factor: float


@dataclass(frozen=True)
class Kit(Pass):
    """Scales the first feed-forward linear and divides its result by the factor, or does something wrong."""

    name: ClassVar[str] = "test-kit"
    tier: ClassVar[Tier] = Tier.ALGEBRAIC
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    way: str = "right"

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        decided = context.plan.decisions_of(Factor)
        for node in list(graph.nodes):
            name = node.meta.get(LAYER, "")
            if not name.endswith("ff.net.0.proj") or self.way == "nowhere":
                continue
            if any(user.target is aten.div.Tensor for user in node.users) and self.way != "again":
                continue
            if self.way == "random":
                decided[name] = Factor(1 + float(torch.rand(())))
            elif self.way == "values":
                decided[name] = Factor(float(rewriter.tensor(args(node).node("weight")).abs().max()))
            elif self.way == "forgets":
                decided[f"{name}.{len(decided)}"] = Factor(2.0)
                decided = dict(decided) | {name: Factor(2.0)}
            factor = decided.setdefault(name, Factor(3.0)).factor
            for parameter in ("weight", "bias"):
                rewriter.fold(node, parameter, lambda w, f=factor: w.double() * f, by=("kit", str(factor)))
            with rewriter.after(node):
                back = rewriter.call(aten.div.Tensor, (node, 1.1 if self.way == "wrong" else factor), [node])
            for reader in [reader for reader in node.users if reader is not back]:
                rewriter.redirect(reader, node, back)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(PASSES, "_objects", dict(PASSES._objects))
    register_pass(Kit)
    yield


def some(value: str, sampled: bool) -> Any:
    return pytest.param(value, marks=[] if sampled else [pytest.mark.exhaustive])


class TestProve:
    def test_an_algebraic_pass(self) -> None:
        model = tiny_dit()
        proof = prove(Kit(), model, example_calls(model))
        assert (proof.tier, proof.edits, proof.calls, proof.dtype) == ("algebraic", 4, 6, "float64")
        assert 0 < proof.error < 1e-12
        assert proof.checked == (
            *("a second run changes nothing", "the plan alone gives the same graph"),
            "weights are not read",
        )
        assert "SQNR" not in str(proof) and "weights are not read" in str(proof)

    def test_a_lossy_and_an_exact_one_of_our_own(self) -> None:
        model = tiny_dit()
        lossy = prove("quantize-linears", model, example_calls(model))
        assert 30 < lossy.sqnr_db < 60 and f"SQNR {lossy.sqnr_db:.1f} dB" in str(lossy)
        exact = prove("remove-no-ops", model, example_call(model))
        assert (exact.error, exact.sqnr_db) == (0.0, math.inf)
        assert prove("remove-no-ops", model, example_call(model), before="", timestep=None).error == 0.0

    @pytest.mark.parametrize(
        ("way", "message"),
        [
            (
                "wrong",
                r"test-kit\{way=wrong\} is not algebraic: in float64 .* first value .*\(layer transf",
            ),
            ("again", "a second run on the same graph makes 4 edits"),
            (
                "random",
                "(cannot be proved|makes another graph|is not algebraic)",
            ),
            ("values", "on weights without values, as a checkpoint is loaded, it fails"),
            ("forgets", "decides something anew; read every decision from the plan"),
        ],
    )
    def test_what_is_refused(self, way: str, message: str) -> None:
        model = tiny_dit()
        with pytest.raises(ProofError, match=message) as error:
            prove(Kit(way), model, example_calls(model))
        assert error.value.pass_name == f"test-kit{{way={way}}}"

    def test_no_match(self) -> None:
        model = tiny_dit()
        with pytest.raises(ProofError, match="changed neither the graph nor the plan of DiTTransformer2DModel"):
            prove(Kit("nowhere"), model, example_calls(model))

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [some(name, name in ("dit", "flux")) for name in TINY])
    def test_balancing_on_every_layout(self, name: str) -> None:
        model = TINY[name]()
        before = "remove-no-ops,assign-precision ; balance-channels"
        proof = prove("absorb-affines", model, example_calls(model), before=before)
        assert proof.edits > 0 and proof.error < 1e-12

    def test_no_calls(self) -> None:
        with pytest.raises(ConfigurationError, match="a pass is tried on calls of the model, and there are none"):
            prove(Kit(), tiny_dit(), [])

    @pytest.mark.parametrize(
        "method", ["wants_statistics", "wants_moments", "wants_samples", "check_graph", "check_plan"]
    )
    def test_a_method_that_fails_is_not_blamed_on_the_calibration(self, method: str) -> None:
        def fails(*_: Any) -> Any:
            raise ZeroDivisionError

        step = type("Fails", (Kit,), {method: fails})()
        model = tiny_dit()
        with pytest.raises(PassError, match=f"pass test-kit: its method {method} failed: ZeroDivisionError"):
            try_pass(step, model, example_calls(model), before="assign-precision{precision=w4a16} ; ")

    def test_the_graphs_and_the_plan_of_a_trial(self) -> None:
        model = tiny_dit()
        trial = try_pass(Kit(), model, example_calls(model))
        assert trial.edits == 4 and trial.decided and len(trial.calls) == 6
        assert list(trial.plan.decisions_of(Factor)) == ["transformer_blocks.0.ff.net.0.proj"]
        assert any(node.target is aten.div.Tensor for node in trial.after.graph.nodes)
        assert trial.context.observed("transformer_blocks.0.ff.net.0.proj").timesteps.tolist() == [100, 500, 900]


def test_the_passes_before_may_have_options_with_semicolons() -> None:
    model = tiny_dit()
    before = "assign-precision{overrides=*ff.net.2=w4a8;*=float}"
    trial = try_pass("remove-no-ops", model, example_call(model), before=before, timestep=None)
    assert {str(layer.precision) for layer in trial.plan.layers.values()} == {"w4a8", "float"}


class TestNotFired:
    def test_it_did_not(self) -> None:
        model = tiny_dit()
        assert_not_fired(Kit("nowhere"), model, example_calls(model))

    def test_it_did(self) -> None:
        model = tiny_dit()
        with pytest.raises(AssertionError, match=r"pass test-kit made 4 edits, but .*(?s:.)*by test-kit"):
            assert_not_fired(Kit(), model, example_calls(model))

    def test_the_reason_is_in_the_plan(self) -> None:
        model = tiny_dit(sample_size=8)
        before = "assign-precision{overrides=*=float}"
        with pytest.raises(AssertionError, match="the plan does not say 'because of the moon'"):
            assert_not_fired(
                "quantize-linears", model, example_call(model), "because of the moon", before=before, timestep=None
            )


class TestGolden:
    def test_write_compare_and_differ(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        module, path = captured(nn.Linear(4, 4), torch.randn(2, 4)).module, tmp_path / "golden" / "linear.txt"
        with pytest.raises(AssertionError, match=r"there is no golden file .*FXQUANT_UPDATE_GOLDEN=1"):
            assert_golden(module, path)
        monkeypatch.setenv("FXQUANT_UPDATE_GOLDEN", "1")
        assert_golden(module, path)
        monkeypatch.delenv("FXQUANT_UPDATE_GOLDEN")
        assert "linear(input_1, @weight, @bias)" in path.read_text()
        assert_golden(module, path)
        with pytest.raises(AssertionError, match=r"--- linear.txt \(golden\)\n\+\+\+ actual\n(?s:.)*\n-relu"):
            path.write_text(path.read_text() + "relu\n")
            assert_golden(module, path)


class TestLifecycle:
    @pytest.mark.slow
    def test_a_recipe_and_a_pass(self) -> None:
        model = tiny_dit()
        found = check_lifecycle(
            [Kit()],
            model,
            example_calls(model),
            other_shape=example_call(model, size=4),
            backends=["fake-quant", "native"],
        )
        assert found.steps[0] == "compile" and found.steps[-2:] == ("backend fake-quant", "backend native")
        assert "other shape" in found.steps and found.output_sqnr_db > 20
        assert str(found).startswith("remove-no-ops,assign-precision") and "torch.compile" in str(found)

    def test_each_failure_is_named(self) -> None:
        model = tiny_dit()
        with pytest.raises(LifecycleError, match=r"2 of 8 steps failed:\n  save and load: ") as error:
            check_lifecycle(Kit("values"), model, example_calls(model), other_shape=example_call(model, size=4))
        assert list(error.value.failures) == ["save and load", "other shape"]

    def test_an_unknown_backend_is_one_failure(self) -> None:
        model = tiny_dit()
        with pytest.raises(LifecycleError) as error:
            check_lifecycle("rtn-w8a8", model, example_calls(model), backends=["abacus"])
        assert list(error.value.failures) == ["backend abacus"]
        assert "unknown backend 'abacus'" in error.value.failures["backend abacus"]

    def test_a_model_that_cannot_be_compiled(self) -> None:
        model = tiny_dit()
        with pytest.raises(LifecycleError) as error:
            check_lifecycle("rtn-w8a8", model, {"hidden_states": torch.randn(2, 4, 8, 8)})
        assert list(error.value.failures) == ["compile"]


@pytest.mark.parametrize("make", [*TINY.values(), tiny_linears])
def test_tiny_models_have_parts_that_all_affect_the_output(make: Callable[..., nn.Module]) -> None:
    model = make()
    call = example_call(model, batch=3, timestep=None, seed=5)
    with torch.no_grad():
        first, second = (
            next(leaf for leaf in torch.utils._pytree.tree_leaves(model(**given)) if isinstance(leaf, Tensor))
            for given in (call, call | {"timestep": call["timestep"] * 0})
        )
    assert len(first) == 3 and first.isfinite().all()
    assert not torch.allclose(first, second)
    assert all(bool(parameter.any()) for parameter in model.parameters())


def test_own_passes_are_ours() -> None:
    assert "test-kit" in PASSES and "test-kit" not in own_passes()
    assert "absorb-affines" in own_passes()


def test_example_call_of_another_model() -> None:
    with pytest.raises(ValueError, match="Linear is not a tiny model"):
        example_call(nn.Linear(2, 2))
