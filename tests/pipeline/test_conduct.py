"""A pass that puts a value into the plan that no plan can hold is named, not the pass that reads the value later."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import fxquant
from fxquant.authoring import Decision
from fxquant.errors import ConfigurationError, PassError
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.pipeline.pipeline import Pass, Pipeline, Tier
from fxquant.planning.branches import Branch
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import ActivationRange, AttentionPlan, LayerPlan
from fxquant.planning.plan import Plan
from fxquant.testing import calibration, tiny_linears
from tests.support import captured


@dataclass(frozen=True)
class Reads(Pass):
    """A pass that comes after another."""

    name: ClassVar[str] = "reads"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.LOWERED
    establishes: ClassVar[Stage] = Stage.CAPTURED

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        raise AssertionError("the pass before should have been refused")


@dataclass(frozen=True)
class Decides(Reads):
    """A pass that writes into the plan."""

    name: ClassVar[str] = "decides"
    write: ClassVar[Callable[[Plan], Any]]

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        type(self).write(context.plan)


@dataclass
class Angle(Decision, of="decides"):
    degrees: float


def plan() -> Plan:
    layers = {"up": LayerPlan("linear", "block", [8, 4], 8, 8)}
    return Plan("", "", None, layers=layers, attentions={"attn": AttentionPlan(8)})


def graph() -> fx.GraphModule:
    return captured(nn.Sequential(nn.Linear(4, 8)), torch.randn(2, 4)).module


def sets(option: str, value: Any) -> Callable[[Plan], None]:
    return lambda plan: setattr(plan.layers["up"], option, value)


WRITES = {
    "text for bits": (sets("weight_bits", "4"), "layers > up > weight_bits: .*integer.*not '4'"),
    "bits out of range": (sets("weight_bits", 64), "layers > up > weight_bits: .*8, not 64"),
    "a tensor for a number": (sets("weight_sqnr_db", torch.tensor(3.0)), "layers > up > weight_sqnr_db"),
    "a number of numpy": (sets("group_size", np.int64(2)), "layers > up > group_size"),
    "a tuple for a list": (sets("spread", (1.0, 2.0)), "layers > up > spread"),
    "a dict for a balance": (sets("balance", {"cost": "free"}), "layers > up > balance: .* a Balance, not a dict"),
    "a pair for a range": (sets("activation", (0.0, 1.0)), "layers > up > activation: .* an ActivationRange, not"),
    "two tensors of numbers": (sets("spread", [torch.tensor(1.0), torch.tensor(2.0)]), "layers > up > spread"),
    "a tensor in a range": (
        sets("activation", ActivationRange(torch.zeros(1), 1.0, "max")), "layers > up > activation > low"
    ),
    "a range upside down": (sets("activation", ActivationRange(2.0, 1.0, "max")), "low should not be above high"),
    "text for a layer": (lambda plan: plan.layers.update(up="w4a8"), "layers > up: it should be a LayerPlan, not"),
    "a number as name": (lambda plan: plan.layers.update({3: plan.layers["up"]}), "layers > 3"),
    "no layers": (lambda plan: setattr(plan, "layers", None), "'layers': it should be a dict, not a NoneType"),
    "a list for a vector": (lambda plan: plan.vectors.update(up=[1.0]), "vectors > up: .* a Tensor, not a list"),
    "an integer vector": (lambda plan: plan.vectors.update(up=torch.ones(4, dtype=torch.int64)), "vector 'up' should"),
    "NaN in a vector": (lambda plan: plan.vectors.update(up=torch.full((4,), torch.nan)), "vector 'up' should"),
    "a range of an attention": (
        lambda plan: plan.attentions["attn"].ranges.update(q=[0.0, 1.0]), "attn > ranges > q: .*ActivationRange"
    ),
    "a reason that is no text": (lambda plan: plan.products.update(matmul=3), "products > matmul: .* a str, not a int"),
    "a decision of its own": (
        lambda plan: plan.decisions_of(Angle).update(up=Angle("steep")), "the decision 'up' of decides"
    ),
}  # fmt: skip


def _quoted(message: str) -> str:
    place, colon, rest = message.partition(":")
    parts = [part if part.isdigit() else f"'{part}'" for part in place.split(" > ")] if " > " in place else [place]
    return " > ".join(parts) + colon + rest


@pytest.mark.parametrize("what", WRITES)
def test_the_pass_that_put_it_there_is_named(what: str) -> None:
    write, message = WRITES[what]
    own = plan()
    with pytest.raises(PassError, match=f"pass decides put a value into the plan.*{_quoted(message)}"):
        Pipeline([type("Decides", (Decides,), {"write": staticmethod(write)})(), Reads()]).run(graph(), own)
    assert own == plan()


@pytest.mark.parametrize("what", ["layers", "attentions"])
@pytest.mark.parametrize("how", ["emptied", "exchanged"])
def test_a_pass_that_removes_what_was_decided_is_refused(what: str, how: str) -> None:
    def write(plan: Plan) -> None:
        if how == "emptied":
            getattr(plan, what).clear()
        else:
            setattr(plan, what, {})

    own = plan()
    with pytest.raises(PassError, match=f"pass decides removed (up|attn) from plan.{what}"):
        Pipeline([type("Decides", (Decides,), {"write": staticmethod(write)})(), Reads()]).run(graph(), own)
    assert own == plan()


def test_a_pass_that_exchanges_the_plan_is_refused() -> None:
    class Exchanges(Decides):
        def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
            context.plan = Plan("", "", None)

    with pytest.raises(PassError, match=r"pass decides put another plan into context\.plan, which nothing reads"):
        Pipeline([Exchanges(), Reads()]).run(graph(), plan())


def test_what_the_plan_held_before_is_not_blamed_on_a_pass() -> None:
    own = plan()
    own.layers["up"].weight_bits = "4"  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match="the plan is not valid at 'layers' > 'up' > 'weight_bits'") as error:
        Pipeline([Reads()]).run(graph(), own)
    assert not isinstance(error.value, PassError) and "reads" not in str(error.value)


def test_values_that_a_plan_can_hold() -> None:
    def write(plan: Plan) -> None:
        layer = plan.layers["up"]
        layer.activation, layer.weight_sqnr_db = ActivationRange([0.0, 1], [1.0, 2.0], "max"), float("inf")
        layer.activation = ActivationRange(0, 1.0, "max")
        plan.vectors["up"] = torch.ones(4)
        plan.decisions_of(Angle)["up"] = Angle(3)

    own = plan()
    Pipeline([type("Decides", (Decides,), {"write": staticmethod(write)})()]).run(graph(), own)
    assert isinstance(own.vectors["up"], Tensor)


ANY = "roles=block+adaln+embedder+patch+final"

REPEATED = (
    (f"split-low-rank{{rank=4 {ANY}}}", f"split-low-rank{{rank=2 {ANY}}}", "different roles or layers"),
    (f"rotate-channels{{{ANY}}}", f"rotate-channels{{block=8 {ANY}}}", "different roles or layers"),
    (f"balance-channels{{{ANY}}}", f"balance-channels{{salience=max {ANY}}}", "different roles"),
    ("bin-ranges{bins=2}", "bin-ranges{bins=3}", "keep one bin-ranges"),
    ("quantize-linears", "quantize-linears{rounding=gptq}", "keep one quantize-linears"),
)


@pytest.mark.parametrize(("first", "second", "remedy"), REPEATED)
def test_a_second_pass_that_would_change_nothing_is_refused(first: str, second: str, remedy: str) -> None:
    model = tiny_linears()
    rest = () if first.startswith("quantize") else ("quantize-linears",)
    recipe = f"assign-precision{{layers=all}} ; {','.join((first, second, *rest))}"
    message = f"has {re.escape(first)} and {re.escape(second)}, and both decide about layer 'first'.*{remedy}"
    with pytest.raises(ConfigurationError, match=message):
        fxquant.compile(model, recipe=recipe, calibrate=calibration(model))


def test_passes_of_one_name_share_the_layers_among_them() -> None:
    model = tiny_linears()
    passes = f"split-low-rank{{rank=4 {ANY} layers=first}},split-low-rank{{rank=2 {ANY} layers=second}}"
    recipe = f"assign-precision{{layers=all}} ; {passes},bin-ranges,bin-ranges,quantize-linears"
    quantized = fxquant.compile(model, recipe=recipe, calibrate=calibration(model))
    assert quantized.plan is not None
    assert {name: own.rank for name, own in quantized.plan.decisions_of(Branch).items()} == {"first": 4, "second": 2}
