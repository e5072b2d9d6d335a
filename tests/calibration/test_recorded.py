"""A second conversion from the statistics of an earlier calibration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import fx

import fxquant
from fxquant.errors import CalibrationError
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.pipeline.pipeline import PASSES, Pass, Tier
from fxquant.planning.context import PassContext
from fxquant.statistics.collection import Statistics
from tests.support import layer_node
from tests.tiny import STEPS, calibrate, inputs, make_dit, run

LEARN = "reconstruct-blocks{iterations=20 samples=12 batch=4}"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, statistics = make_dit(), Statistics(keep_calls=8)
    fxquant.compile(model, recipe="rtn-w4a8", calibrate=calibrate(model), statistics=statistics, measure=0)
    path = tmp_path_factory.mktemp("statistics") / "file"
    statistics.save(path)
    return path


@pytest.mark.parametrize("recipe", ["ptq4dit-w8a8", "rtn-w8a8-g4", "htg-w4a8"])
def test_another_recipe_without_calibration(file: Path, recipe: str) -> None:
    """The result is that of a calibration, including bit widths that the first recipe did not have."""
    model = make_dit()
    again = fxquant.compile(model, recipe=recipe, statistics=Statistics.load(file))
    direct = fxquant.compile(model, recipe=recipe, calibrate=calibrate(model))
    assert torch.equal(run(again, seed=4), run(direct, seed=4))
    assert again.plan.layers == direct.plan.layers
    assert again.plan.output_sqnr_db.keys() == direct.plan.output_sqnr_db.keys() == set(STEPS)
    for step, db in direct.plan.output_sqnr_db.items():  # Measured on the same samples, by graphs.
        assert again.plan.output_sqnr_db[step] == pytest.approx(db, abs=0.1)


def test_passes_that_learn_from_calls(file: Path) -> None:
    """With a recipe, and with a plan, which had no calls before."""
    recipe = str(fxquant.make_recipe("rtn-w4a8")).replace("quantize-linears", f"{LEARN},quantize-linears")
    model, statistics = make_dit(), Statistics.load(file)
    direct = fxquant.compile(model, recipe=fxquant.Recipe.parse(recipe), calibrate=calibrate(model))
    again = fxquant.compile(model, recipe=fxquant.Recipe.parse(recipe), statistics=statistics)
    assert again.plan.reconstruction == direct.plan.reconstruction
    by_plan = fxquant.compile(model, plan=direct.plan.undecided(recipe), statistics=statistics)
    assert by_plan.plan.reconstruction == direct.plan.reconstruction
    with pytest.raises(CalibrationError, match="learns from calibration calls"):
        fxquant.compile(model, plan=direct.plan.undecided(recipe))


def test_calls_that_were_not_kept(file: Path) -> None:
    statistics = Statistics.load(file)
    statistics.calls.restore([])
    recipe = str(fxquant.make_recipe("rtn-w4a8")).replace("quantize-linears", f"{LEARN},quantize-linears")
    with pytest.raises(CalibrationError, match="keep none"):
        fxquant.compile(make_dit(), recipe=fxquant.Recipe.parse(recipe), statistics=statistics)


@pytest.mark.parametrize(
    ("recipe", "layers", "message"),
    [
        ("ptq4dit-gptq-w4a8", "default", "second moments"),
        ("single-step-w8a8", "default", "hold all steps of the sampler, and the recipe observes step 0 and 2 later"),
        ("rtn-w4a8", "all", "do not hold the inputs of"),
    ],
)
def test_what_was_not_observed_is_refused(file: Path, recipe: str, layers: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        fxquant.compile(make_dit(), recipe=recipe, layers=layers, statistics=Statistics.load(file))


def test_another_model_is_refused(file: Path) -> None:
    trained, wider = make_dit(), make_dit(attention_head_dim=12)
    trained.proj_out_2.weight.data += 0.01
    for model in (trained, wider, make_dit().double()):
        with pytest.raises(CalibrationError, match="other weights or another dtype"):
            fxquant.compile(model, recipe="rtn-w8a8", statistics=Statistics.load(file))


@dataclass(frozen=True)
class Doubles(Pass):
    """Doubles what a layer reads, and halves its weight."""

    name: ClassVar[str] = "test-doubles"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.CAPTURED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    layer: str = "proj_out_2"
    factor: float = 2.0

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        node = layer_node(rewriter.module, self.layer)
        x = node.args[0]
        with rewriter.before(node):
            doubled = rewriter.call(torch.ops.aten.mul.Tensor, (x, self.factor), [x])
        rewriter.redirect(node, x, doubled)
        rewriter.fold(node, "weight", lambda w: w / self.factor)


@dataclass(frozen=True)
class KeepsInputs(Doubles):
    """Does nothing, and says so."""

    name: ClassVar[str] = "test-keeps"
    keeps_inputs: ClassVar[bool] = True

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        pass


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (Doubles, KeepsInputs):
        monkeypatch.setitem(PASSES._objects, step.name, step)


@pytest.mark.usefixtures("registered")
def test_statistics_of_what_other_passes_made_are_refused(file: Path, tmp_path: Path) -> None:
    plain = fxquant.make_recipe("rtn-w8a8", layers="all")
    doubled = replace(plain, prepare=(Doubles(), *plain.prepare))
    model, statistics = make_dit(), Statistics()
    fxquant.compile(model, recipe=doubled, calibrate=calibrate(model), statistics=statistics, measure=0)
    statistics.save(tmp_path / "doubled")
    loaded = Statistics.load(tmp_path / "doubled")
    assert loaded.run is not None and loaded.run.prepared == ("test-doubles",)
    said = r"what layers read after passes that may change it \(test-doubles\), and this recipe has no such pass before"
    with pytest.raises(CalibrationError, match=said):
        fxquant.compile(model, recipe=plain, statistics=loaded)
    other = replace(plain, prepare=(Doubles(factor=4.0), *plain.prepare))
    with pytest.raises(
        CalibrationError, match=r"\(test-doubles\), and this recipe has test-doubles\{factor=4.0\} before"
    ):
        fxquant.compile(model, recipe=other, statistics=loaded)
    with pytest.raises(CalibrationError, match=r"\(no such pass\), and this recipe has test-doubles before"):
        fxquant.compile(model, recipe=doubled, statistics=Statistics.load(file))
    with pytest.raises(CalibrationError, match="and the other run has no such pass"):
        loaded.merge(Statistics.load(file))
    again = fxquant.compile(model, recipe=doubled, statistics=loaded, measure=0)  # The same passes.
    assert again.plan is not None


@pytest.mark.usefixtures("registered")
def test_a_pass_that_keeps_inputs_may_differ(file: Path) -> None:
    plain = fxquant.make_recipe("rtn-w8a8")
    kept = replace(plain, prepare=(KeepsInputs(), *plain.prepare))
    assert fxquant.compile(make_dit(), recipe=kept, statistics=Statistics.load(file), measure=0).plan is not None


def test_statistics_made_by_hand_are_refused() -> None:
    statistics = Statistics()
    statistics.record("proj", torch.ones(1, 2, 3), torch.tensor(5.0))
    with pytest.raises(CalibrationError, match="do not say how the model was called"):
        fxquant.compile(make_dit(), recipe="rtn-w8a8", statistics=statistics)
    with pytest.raises(CalibrationError, match="pass calibrate="):
        fxquant.compile(make_dit(), recipe="rtn-w8a8", statistics=Statistics())


def test_two_kinds_of_call() -> None:
    """Each graph gets its own calls, and ranges cover both."""
    model, statistics = make_dit(), Statistics(keep_calls=8)

    def both() -> None:
        with torch.no_grad():
            for step in STEPS:
                model(**inputs(timestep=step))
                model(**inputs(timestep=step, size=4))

    direct = fxquant.compile(model, recipe="ptq4dit-w8a8", calibrate=both, statistics=statistics)
    assert [len(statistics.calls.of_kind(kind)) for kind in (0, 1)] == [3, 3]
    again = fxquant.compile(model, recipe="ptq4dit-w8a8", statistics=statistics)
    assert again.plan.layers == direct.plan.layers
    assert len(again.graphs) == 2
    for size in (8, 4):
        assert torch.equal(run(again, size=size), run(direct, size=size))
