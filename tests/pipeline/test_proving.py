"""Passes are proved at conversion: what keeps its tier passes in every dtype, what does not is refused by name."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxquant
from fxquant.errors import ConfigurationError, ProofError, ProofWarning
from fxquant.ir.arguments import source_of
from fxquant.ir.doubles import in_float64
from fxquant.ir.meta import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import SPECS, Stage, verify
from fxquant.ir.tensors import read_tensors
from fxquant.pipeline import proving
from fxquant.pipeline.pipeline import Pass, PassRecord, Pipeline, Tier
from fxquant.pipeline.recipes import Recipe, make_recipe
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from tests.support import captured, layer_node, nodes_of, outputs, text
from tests.tiny import calibrate, make_dit

aten = torch.ops.aten


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.last = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, (8,))
        return self.last(x + self.down(F.gelu(self.up(x))).float().to(x.dtype))


@dataclass(frozen=True)
class Scales(Pass):
    """Multiplies the weights of a layer and divides those of the next, as far as the option says."""

    name: ClassVar[str] = "scales"
    tier: ClassVar[Tier] = Tier.ALGEBRAIC
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    layer: str = "down"
    factor: float = 3.0
    undo: bool = True

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        node = layer_node(rewriter.module, self.layer)
        for name in ("weight", "bias"):
            rewriter.fold(node, name, lambda w: w.double() * self.factor)
        if self.undo:
            with rewriter.after(node):
                back = rewriter.call(aten.div.Tensor, (node, self.factor), [node])
            for reader in [reader for reader in node.users if reader is not back]:
                rewriter.redirect(reader, node, back)


@dataclass(frozen=True)
class Exact(Scales):
    name: ClassVar[str] = "exact-scales"
    tier: ClassVar[Tier] = Tier.EXACT


def run(step: Pass, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[fx.GraphModule, list[PassRecord]]:
    inputs = torch.randn(4, 8).to(dtype)
    module = captured(Feed().to(dtype), x=inputs).module
    context = PassContext(Plan("", "", None), inputs=[[inputs], [inputs * 2]])
    return module, Pipeline([step], **options).run(module, context)


@pytest.mark.parametrize("roomy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_keeps_its_tier(dtype: torch.dtype, roomy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "_fits_in_memory", lambda module, dtype: roomy)
    _, (record,) = run(Scales(), dtype, prove=True)
    proof = record.proof
    assert proof is not None and proof.calls == 2
    assert proof.dtype == ("float64" if roomy else str(dtype).removeprefix("torch."))
    if roomy:
        assert 0 < proof.error <= proof.allowed == 1e-12
        assert "scales: algebraic, 4 edits; relative error" in str(proof)
    _, (record,) = run(Exact(factor=2.0), dtype, prove=True)  # A power of 2 rounds nothing.
    assert record.proof is not None and record.proof.error == 0.0
    assert "equal bit for bit in" in str(record.proof)


@pytest.mark.parametrize(
    ("dtype", "roomy", "factor"),
    [
        (torch.float32, True, 1.1),
        (torch.bfloat16, True, 1.1),
        (torch.float32, False, 1.1),
        (torch.bfloat16, False, 3.0),  # A factor of 1.1 is less than what rounding all weights to bfloat16 costs.
    ],
)
def test_scaled_weights(dtype: torch.dtype, roomy: bool, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "_fits_in_memory", lambda module, dtype: roomy)
    step = Scales(factor=factor, undo=False)
    with pytest.raises(ProofError, match=rf"pass {re.escape(str(step))} is not algebraic.*declare the tier") as error:
        run(step, dtype, prove=True)
    assert error.value.error is not None and 1e-3 < error.value.error < 1
    assert "(layer down), aten.linear.default, which reads @down.weight, @down.bias, changed by the" in str(error.value)
    assert error.value.pass_name == str(step)
    run(step, dtype)  # Without the option nothing is run.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_compared_in_float32_if_there_is_no_memory_for_float64(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factor of 1.1 is less than what rounding all weights to 16 bits costs, and much more than to float32."""
    monkeypatch.setattr(proving, "_fits_in_memory", lambda module, dtype: dtype is torch.float32)
    with pytest.raises(ProofError, match=r"is not algebraic: in float32 an output is off by"):
        run(Scales(factor=1.1, undo=False), dtype, prove=True)
    with pytest.raises(ProofError, match=r"is not algebraic: in float32 an output is off by"):
        run(Scales(factor=1.001, undo=False), dtype, prove=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, (record,) = run(Scales(), dtype, prove=True)
    assert record.proof is not None and record.proof.dtype == "float32"
    assert 0 < record.proof.error <= record.proof.allowed < 1e-4


def test_a_proof_that_cannot_tell_a_mistake_from_rounding_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "_fits_in_memory", lambda module, dtype: False)
    with pytest.warns(
        ProofWarning, match=r"pass scales\{factor=1.1 undo=False\} was compared in bfloat16 only.*Free mem"
    ):
        run(Scales(factor=1.1, undo=False), torch.bfloat16, prove=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(Scales(), torch.float32, prove=True)  # The noise of float32 hides little.
        run(Exact(factor=2.0), torch.bfloat16, prove=True)


def test_what_is_not_exact_is_named_with_its_error() -> None:
    module = captured(Feed(), x=torch.randn(4, 8)).module
    before = text(module)
    context = PassContext(Plan("", "", None), inputs=[[torch.randn(4, 8)]])
    with pytest.raises(ProofError, match=r"pass exact-scales is not exact: in float32 an output is off by .*e-0[678]"):
        Pipeline([Exact()], prove=True).run(module, context)
    assert text(module) == before  # Restored.


def test_a_lossy_pass_is_not_run_again() -> None:
    assert run(type("Lossy", (Scales,), {"tier": Tier.LOSSY})(undo=False), prove=True)[1][0].proof is None


def test_calls_are_needed() -> None:
    module = captured(Feed(), x=torch.randn(4, 8)).module
    with pytest.raises(ConfigurationError, match="prove=True needs calls"):
        Pipeline([Scales()], prove=True).run(module, Plan("", "", None))


def test_a_graph_in_float64() -> None:
    x = torch.randn(4, 8)
    module = captured(Feed(), x=x).module
    before, tensors = text(module), read_tensors(module)
    wide = in_float64(module)
    verify(wide, SPECS[Stage.CAPTURED])
    assert {tensor.dtype for tensor in read_tensors(wide).values()} == {torch.float64}
    assert "float32" not in text(wide)
    torch.testing.assert_close(outputs(wide, x.double())[0], Feed().double()(x.double()), rtol=1e-6, atol=1e-6)
    assert text(module) == before and all(read_tensors(module)[name] is tensor for name, tensor in tensors.items())


class Watch:
    def __init__(self) -> None:
        self.proofs: dict[str, Any] = {}

    def before(self, step: Pass, module: fx.GraphModule) -> None:
        pass

    def after(self, step: Pass, module: fx.GraphModule, record: PassRecord) -> None:
        self.proofs[step.name] = record.proof

    def failed(self, step: Pass, module: fx.GraphModule, error: Exception) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ptq4dit-w4a8", "htg-w8a8"])
def test_our_own_recipes_are_proved_at_conversion_and_give_the_same_model(recipe: str) -> None:
    watch, model = Watch(), make_dit()
    proved = fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), prove=True, instruments=[watch])
    done = {name: proof for name, proof in watch.proofs.items() if proof is not None}
    assert {"remove-no-ops", "balance-channels", "absorb-affines"} <= done.keys()
    assert all(proof.error <= 1e-12 for proof in done.values())
    plain = fxquant.compile(model, recipe=recipe, calibrate=calibrate(model))
    assert proved.plan == plain.plan


@dataclass(frozen=True)
class Breaks(Pass):
    name: ClassVar[str] = "test-breaks"
    tier: ClassVar[Tier] = Tier.ALGEBRAIC
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        for node in nodes_of(rewriter.module, aten.gelu.default):
            rewriter.replace(node, source_of(node))


def test_a_conversion_refuses_a_pass_that_does_not_keep_its_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxquant.pipeline.pipeline import PASSES

    monkeypatch.setitem(PASSES._objects, "test-breaks", Breaks)
    plain, model = make_recipe("ptq4dit-w8a8"), make_dit()
    recipe = Recipe(plain.prepare, (Breaks(), *plain.convert))
    with pytest.raises(ProofError, match=r"pass test-breaks is not algebraic.*\(layer transformer_blocks.0.ff.net.2\)"):
        fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), prove=True)
    with pytest.raises(ConfigurationError, match="passes are proved on calibration calls"):
        fxquant.compile(model, plan=Plan(str(recipe), "", "timestep"), prove=True)
    assert all(LAYER not in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [(0.0, -0.0, 1e-300), (float("inf"), float("-inf"), 1e308), (float("nan"), float("inf"), 1e308)],
)
def test_values_that_compare_as_equal_or_not_at_all(before: float, after: float, error: float) -> None:
    one, other = torch.tensor([1.0, before]), torch.tensor([1.0, after])
    assert proving.relative_error(other, one) > 0 and proving.relative_error(other, one) >= error * 1e-10
    assert proving.relative_error(one, one.clone()) == 0


def test_the_graph_itself_is_compared_not_only_what_the_plan_makes_of_it() -> None:
    class First(Scales):
        """Is right only when it carries out what it has decided before."""

        def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
            node, known = layer_node(rewriter.module, "last"), "last" in context.plan.vectors
            context.plan.vectors["last"] = torch.ones(8)
            rewriter.fold(node, "weight", lambda w: w * (1.0 if known else 1.1))

    with pytest.raises(ProofError, match=r"not algebraic: in float32 an output is off"):
        run(First(), prove=True)
