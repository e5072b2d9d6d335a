"""Statistics belong to what calibration saw: a pass that changes what layers read declares how, or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import fxquant
from fxquant.authoring import (
    Decision,
    Pass,
    PassContext,
    PassError,
    Rewriter,
    Stage,
    Tier,
    args,
    layer_input,
    layer_of,
    moments,
    register_pass,
)
from fxquant.numerics.sqnr import sqnr_db
from fxquant.pipeline.pipeline import PASSES
from fxquant.pipeline.recipes import Recipe, make_recipe
from fxquant.planning.decisions import LayerPlan, Shift
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics
from fxquant.testing import calibration, check_lifecycle, example_call, example_calls, prove, tiny_dit, try_pass
from tests.tiny import run

aten = torch.ops.aten
UP = "transformer_blocks.0.ff.net.0.proj"


@dataclass
class Rotation(Decision, of="test-rotate"):
    matrix: Tensor


@dataclass(frozen=True)
class Rotate(Pass):
    """Multiplies the input of a layer by an orthogonal matrix, and its weight by the same matrix."""

    name: ClassVar[str] = "test-rotate"
    tier: ClassVar[Tier] = Tier.ALGEBRAIC
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    declares: str = "right"
    layer: str = UP

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        decided = context.plan.decisions_of(Rotation)
        for node in list(graph.nodes):
            name = layer_of(node)
            if name != self.layer or node.target is not aten.linear.default:
                continue
            x = args(node).node("input")
            if x.target is aten.matmul.default:
                continue
            channels = int(x.meta["val"].shape[-1])
            if name not in decided:
                generator = torch.Generator().manual_seed(0)
                values = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
                decided[name] = Rotation(torch.linalg.qr(values).Q)
            matrix = decided[name].matrix
            constant = rewriter.constant(f"{name}.rotation", matrix.to(x.meta["val"].dtype), [node])
            with rewriter.before(node):
                rotated = rewriter.inline(torch.matmul, [x, constant], [node])
            rewriter.redirect(node, x, rotated)
            rewriter.fold(node, "weight", lambda w, m=matrix: w.double() @ m, by=("rotate", matrix))
            if self.declares == "right":
                context.transform_input(name, lambda rows, m=matrix: rows @ m)
            elif self.declares == "wrong":
                context.transform_input(name, lambda rows: rows.flip(1))
            elif self.declares == "shape":
                context.transform_input(name, lambda rows: rows[:, :2])


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(PASSES, "_objects", dict(PASSES._objects))
    register_pass(Rotate)
    yield


def recipe(step: Pass, name: str = "rtn-w4a8", at: int = 0) -> Recipe:
    plain = make_recipe(name)
    return Recipe(plain.prepare, (*plain.convert[:at], step, *plain.convert[at:]))


def quantized(made: Recipe, **options: Any) -> Any:
    model = tiny_dit()
    return fxquant.compile(model, recipe=made, calibrate=calibration(model), measure=0, **options)


def read_by_layer(model: Any, layer: str) -> Tensor:
    """All rows that a quantized layer reads in the calibration calls."""
    found: list[Tensor] = []
    read: dict[fx.Node, Tensor] = {}

    class Reads(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.target is torch.ops.fxquant.linear.default and layer_of(n) == layer:
                found.append(read[args(n).node("xq")].flatten(0, -2))
            if n.target is torch.ops.fxquant.quantize.default:
                read[n] = self.env[args(n).node("x")]
            return value

    (captured,) = model.captured
    for call in example_calls(tiny_dit()):
        canonical = model.architecture.canonical((), call)
        with torch.no_grad():
            Reads(captured.module).run(*captured.inputs(canonical.leaves))
    return torch.cat(found)


def test_a_rotation_that_is_not_declared_is_refused_by_name() -> None:
    message = (
        rf"layer '{UP}' no longer reads what calibration saw: the pass test-rotate\{{declares=no\}} changed its input "
        r"and did not declare how. Call context.transform_input\(layer, function\) in that pass"
    )
    with pytest.raises(PassError, match=message):
        quantized(recipe(Rotate("no")))


def test_ranges_of_a_declared_rotation_are_those_of_the_rotated_input() -> None:
    found = quantized(recipe(Rotate()))
    rows = read_by_layer(found, UP)
    activation = found.plan.layers[UP].activation
    extent = float(rows.max() - rows.min())
    assert abs(activation.low - float(rows.min())) < 0.1 * extent
    assert abs(activation.high - float(rows.max())) < 0.1 * extent
    assert sqnr_db(run(tiny_dit()), run(found)) > 20


@pytest.mark.parametrize(
    ("declares", "message"),
    [("wrong", "they agree to .* dB"), ("shape", "it gives 2 channels, and the layer reads 16")],
)
def test_a_wrong_declaration_is_refused(declares: str, message: str) -> None:
    with pytest.raises(PassError, match=rf"declares a transform of the input of layer '{UP}' that is not .*{message}"):
        quantized(recipe(Rotate(declares)))


def test_a_pass_before_calibration_needs_no_declaration() -> None:
    plain = make_recipe("rtn-w4a8")
    made = Recipe((*plain.prepare, Rotate("no")), plain.convert)
    statistics = Statistics()
    found = quantized(made, statistics=statistics)
    again = fxquant.compile(tiny_dit(), plan=found.plan, statistics=statistics)  # Prepares and converts in one go.
    assert torch.equal(run(again), run(found))


def test_other_layers_keep_their_statistics_and_a_layer_that_nobody_asks_about_is_no_error() -> None:
    made = make_recipe("rtn-w8a8").with_options("assign-precision", overrides=f"{UP}=float")
    made = Recipe(made.prepare, (Rotate("no"), *made.convert))
    assert sqnr_db(run(tiny_dit()), run(quantized(made))) > 20


@pytest.mark.parametrize("name", ["rtn-gptq-w4a8", "ptq4dit-w4a8", "htg-w8a8"])
@pytest.mark.parametrize("at", [0, 2])
def test_rotations_before_and_after_balancing(name: str, at: int) -> None:
    if name.startswith("rtn") and at:
        pytest.skip("nothing comes before")
    found = quantized(recipe(Rotate(), name, at))
    rows, layer = read_by_layer(found, UP), found.plan.layers[UP]
    low, high = (torch.tensor(bound).flatten() for bound in (layer.activation.low, layer.activation.high))
    extent = float(rows.max() - rows.min())
    assert abs(float(low.min()) - float(rows.min())) < 0.2 * extent
    assert abs(float(high.max()) - float(rows.max())) < 0.2 * extent


@pytest.mark.slow
def test_it_is_proved_and_lives() -> None:
    model = tiny_dit()
    proof = prove(Rotate(), model, example_calls(model))
    assert proof.error < 1e-12
    check_lifecycle(Rotate(), model, example_calls(model), other_shape=example_call(model, size=4))


def test_rows_ranges_and_moments_in_the_order_of_the_passes() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 3, generator=generator)
    statistics = Statistics(num_rows=50)
    statistics.wants_moments = {"q"}.__contains__
    statistics.record("q", rows[None], torch.tensor(5.0))
    plan = Plan("", "", "timestep")
    plan.layers["q"] = LayerPlan("linear", "block", [4, 3], 8, 8)
    matrix = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    factor = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)
    context = PassContext(plan, statistics)

    def sorted_rows(values: Tensor) -> Tensor:
        return values[values[:, 0].argsort()]

    def check(expected: Tensor, linear: bool = True) -> None:
        seen = layer_input(context, "q")
        torch.testing.assert_close(sorted_rows(torch.cat(seen.rows)), sorted_rows(expected).float())
        torch.testing.assert_close(seen.maximum[0], expected.amax(0))
        torch.testing.assert_close(moments(context, "q"), expected.T @ expected / 50, rtol=1e-5, atol=1e-5)

    context.transform_input("q", lambda rows: rows @ matrix)
    now = rows.double() @ matrix
    check(now)
    assert not layer_input(context, "q").exact
    plan.vectors["q"] = factor  # Balanced afterwards.
    now = now / factor
    check(now)
    context.transform_input("q", lambda rows: rows[:, [2, 0, 1]])
    now = now[:, [2, 0, 1]]
    check(now)
    context.transform_input("q", lambda rows: rows.tanh())  # Not linear: moments of the sampled rows.
    now = now.tanh()
    check(now)
    plan.vectors["q.shift"], plan.layers["q"].shift = (
        torch.ones(1, 3, dtype=torch.float64),
        Shift("free", balanced=True),
    )
    check(now - 1)
    context.transform_input("q", lambda rows: rows.sum(0))
    with pytest.raises(PassError, match=r"layer q: a transform of its input gives \[3\] for rows of shape \[50, 3\]"):
        layer_input(context, "q")


def test_a_pass_may_say_that_it_keeps_what_layers_read() -> None:
    class Says(Rotate):
        keeps_inputs: ClassVar[bool] = True

    model = tiny_dit()
    assert try_pass(Says("no"), model, example_calls(model)).context.changed == {}
    assert try_pass(Rotate("no"), model, example_calls(model)).context.changed == {UP: "test-rotate{declares=no}"}


def test_our_own_passes_declare_what_they_change() -> None:
    """In the plan, as factors and shifts; a rotation by a function, which the pipeline compares with the graph."""
    from fxquant.testing import own_passes

    assert [name for name in own_passes() if not PASSES[name].keeps_inputs] == ["rotate-channels"]


def test_a_model_that_drops_out_values_in_evaluation_is_compared_with_the_same_ones() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.second(functional.dropout(functional.gelu(self.first(x)), 0.5, True)) + timestep[:, None, None]

    torch.manual_seed(0)
    calls = [{"x": torch.randn(2, 5, 16), "timestep": torch.full((2,), step)} for step in (0.9, 0.1)]
    step = "rotate-channels{roles=block+adaln+embedder+patch+final}"
    trial = try_pass(step, Dropping().eval(), calls, before="assign-precision{layers=all} ; ")
    assert [*trial.context.transforms] == ["first", "second"]


def test_each_graph_of_a_model_begins_anew_and_proofs_leave_no_trace() -> None:
    model = tiny_dit()
    calls = [*example_calls(model), *example_calls(model, size=4)]
    made = fxquant.compile(model, recipe=recipe(Rotate()), calibrate=calibration(model, calls), measure=0, prove=True)
    assert len(made.graphs) == 2
    plain = fxquant.compile(model, recipe=recipe(Rotate()), calibrate=calibration(model, calls), measure=0)
    assert made.plan == plain.plan
    assert sqnr_db(run(model), run(made)) > 20 and sqnr_db(run(model, size=4), run(made, size=4)) > 20
