"""A stage of another package in pipelines, recipes, dumps, plans and on the command line."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxquant
from fxquant.authoring import Pipeline, Plan, Stage, register_stage, unregister_stage
from fxquant.cli.__main__ import app
from fxquant.errors import CheckpointError, ConfigurationError, PassError, PluginError, VerificationError
from fxquant.ir.dumps import Dump, load_dump
from fxquant.passes.remove_noops import RemoveNoOps
from fxquant.pipeline.dumps import DumpGraphs, Reproducer
from fxquant.pipeline.pipeline import PASSES
from fxquant.pipeline.recipes import Recipe, recipe_of
from fxquant.testing import prove
from tests.support import captured

_MODULE = "tests.pipeline.decomposing"
_RECIPE = (
    "remove-no-ops,assign-precision{precision=w8a8} ; balance-channels,absorb-affines,test-write-out,quantize-linears"
)


@pytest.fixture
def package() -> Iterator[ModuleType]:
    """The package of the tests, registered for one test: other tests run over all registered passes."""
    yield importlib.import_module(_MODULE)
    forget()


def forget() -> None:
    """As if the package was not installed."""
    module = sys.modules.pop(_MODULE, None)
    if module is not None:
        for name in ("test-write-out", "test-late"):
            PASSES.remove(name)
        unregister_stage(module.DECOMPOSED)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.gelu(self.first(x))) + timestep[:, None, None]


def call(step: float = 500.0) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 3, 8), "timestep": torch.full((2,), step)}


def plan() -> Plan:
    return Plan("", "", "timestep")


def graph() -> torch.fx.GraphModule:
    return captured(Model().eval(), **call()).module


def test_the_pipeline_orders_by_it(package: ModuleType) -> None:
    assert Pipeline.parse("test-late,test-write-out").stage is package.DECOMPOSED
    assert Pipeline.parse("absorb-affines,test-write-out,test-late,remove-no-ops,quantize-linears").stage == (
        Stage.QUANTIZED
    )
    message = (
        "absorb-affines works on transformed graphs but comes after test-write-out, which makes them test-decomposed; "
        "move it to the front"
    )
    with pytest.raises(ConfigurationError, match=message):
        Pipeline.parse("test-write-out,absorb-affines")
    with pytest.raises(ConfigurationError, match="test-late works on test-decomposed graphs, this one is quantized"):
        Pipeline.parse("test-late").run(graph(), plan(), Stage.QUANTIZED)


def test_stages_of_two_packages_in_one_place(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    other = register_stage("test-other", after=Stage.TRANSFORMED)
    try:
        monkeypatch.setattr(package.Late, "requires", other)
        with pytest.raises(ConfigurationError, match="the stages test-other and test-decomposed have no order"):
            Pipeline.parse("test-write-out,test-late")
        monkeypatch.setattr(package.Late, "requires", Stage.LOWERED)
        monkeypatch.setattr(package.Late, "establishes", other)
        with pytest.raises(ConfigurationError, match="test-late cannot follow test-write-out: the stages"):
            Pipeline.parse("test-write-out,test-late")
    finally:
        unregister_stage(other)


def test_graphs_are_verified_against_it(package: ModuleType) -> None:
    module = graph()
    (record,) = Pipeline.parse("test-write-out").run(module, plan())
    assert (record.ops["aten::gelu"], record.ops["aten::erf"]) == (-1, 1)
    module = graph()
    with pytest.raises(VerificationError, match="a GELU should be written as other ops"):
        Pipeline.parse("test-late").run(module, plan(), package.DECOMPOSED)
    with pytest.raises(VerificationError, match="a GELU should be written") as error:
        Pipeline.parse("test-write-out{forgets=True},test-late").run(module, plan())
    assert error.value.__notes__ == ["in pass test-write-out{forgets=True}"]
    assert str(prove("test-write-out", Model().eval(), call()))


def test_dumps_know_it(package: ModuleType, tmp_path: Path) -> None:
    Pipeline.parse("test-write-out,test-late", [DumpGraphs(tmp_path)]).run(graph(), plan())
    path = tmp_path / "01-test-write-out.json"
    dump, _ = load_dump(path)
    assert (dump.stage, dump.facts["stage_module"]) == ("test-decomposed", _MODULE)
    found = CliRunner().invoke(app, ["opt", str(path), "--passes", "test-late", "--json"])
    assert json.loads(found.stdout)["stage"] == "test-decomposed"
    listed = CliRunner().invoke(app, ["list", "stages"])
    assert "after transformed and before quantized, of tests.pipeline.decomposing" in " ".join(listed.stdout.split())
    forget()
    message = f"an unknown stage, 'test-decomposed'.*{_MODULE} defines it: install its package, or import the module"
    with pytest.raises(CheckpointError, match=message):
        Dump.read(path)
    refused = CliRunner().invoke(app, ["opt", str(path), "--passes", "remove-no-ops"])
    assert refused.exit_code == 2
    assert "(--import)" in refused.stderr
    again = CliRunner().invoke(app, ["opt", str(path), "--passes", "test-late", "--import", _MODULE])
    assert again.exit_code == 0, again.stderr


def test_a_reproducer_imports_the_package_of_the_stage(
    package: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise KeyError("no")

    monkeypatch.setattr(RemoveNoOps, "run", fails)
    steps = [package.WriteOut(), RemoveNoOps()]
    with pytest.raises(PassError) as error:
        Pipeline(steps, [Reproducer(tmp_path)]).run(graph(), plan())
    (command,) = error.value.__notes__
    assert command.endswith(f"--passes remove-no-ops --import {_MODULE}")
    monkeypatch.setattr(package.DECOMPOSED, "home", "__main__")
    with pytest.raises(PassError) as error:
        Pipeline(steps, [Reproducer(tmp_path)]).run(graph(), plan())
    command, script = error.value.__notes__
    assert command.endswith("--passes remove-no-ops")
    assert "an op or stage of the graph, is defined in a script or notebook" in script


def test_a_model_goes_through_it(package: ModuleType, tmp_path: Path) -> None:
    model = Model().eval()
    quantized = fxquant.compile(
        model, recipe=Recipe.parse(_RECIPE), calibrate=lambda: [model(**call(step)) for step in (100.0, 900.0)]
    )
    history = fxquant.rewrite_history(quantized)
    assert history.step("test-write-out").stage == "test-decomposed"
    assert history.step("quantize-linears").stage == "quantized"
    quantized.plan.save(tmp_path / "plan")
    fxquant.save(quantized, tmp_path / "checkpoint")
    given = call()
    expected = quantized(**given)
    torch.testing.assert_close(fxquant.load(tmp_path / "checkpoint", model=Model().eval())(**given), expected)
    forget()
    message = (
        f"the plan was made with the pass 'test-write-out' of {_MODULE}, which is not known here: install that package"
    )
    with pytest.raises(PluginError, match=message):
        recipe_of(Plan.load(tmp_path / "plan"))
    with pytest.raises(CheckpointError, match=message):
        fxquant.load(tmp_path / "checkpoint", model=Model().eval())
