"""Stages of other packages: their place in the order, what their graphs may hold, and what cannot be registered."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import fx

from fxquant.authoring import register_op, register_stage, stage_named, unregister_stage
from fxquant.errors import ConfigurationError, DuplicateNameError, PluginError, UnknownNameError, VerificationError
from fxquant.ir import stages
from fxquant.ir.stage_order import _NEIGHBOURS
from fxquant.ir.stages import SPECS, STAGES, Stage, in_order, later, verify
from tests.ir.test_inlining import twice, with_op  # noqa: F401  (a fixture)


@pytest.fixture(autouse=True)
def _removed() -> Iterator[None]:
    """Removes the stages of a test, the last one first."""
    yield
    stages._REGISTERED.clear()
    for stage in reversed([*_NEIGHBOURS]):
        unregister_stage(stage)
    STAGES._pending = None


def test_a_stage_lies_between_two_others() -> None:
    sparse = register_stage("sparse", after=Stage.TRANSFORMED)
    ready = register_stage("ready", after="sparse", before="quantized")
    assert [str(stage) for stage in in_order()] == [
        "captured", "observed", "transformed", "sparse", "ready", "quantized", "lowered"
    ]  # fmt: skip
    assert Stage.TRANSFORMED < sparse < ready < Stage.QUANTIZED
    assert Stage.LOWERED > sparse >= sparse
    assert not sparse < sparse
    assert later(ready, sparse) is later(sparse, ready) is ready
    assert sparse.home == __name__
    assert repr(sparse) == "<stage sparse>"


def test_copies_are_the_same_stage() -> None:
    sparse = register_stage("sparse", after=Stage.TRANSFORMED)
    assert copy.deepcopy(sparse) is copy.copy(sparse) is pickle.loads(pickle.dumps(sparse)) is sparse
    assert copy.deepcopy(Stage.QUANTIZED) is Stage.QUANTIZED


def test_stages_in_one_place_have_no_order() -> None:
    one, two = (register_stage(name, after=Stage.TRANSFORMED) for name in ("one", "two"))
    assert not one <= two
    assert not two <= one
    with pytest.raises(ConfigurationError, match=rf"the stages one \({__name__}\) and two .* have no order"):
        later(one, two)


def test_registering_again() -> None:
    first = register_stage("sparse", after=Stage.TRANSFORMED)
    assert register_stage("sparse", after="transformed", before=Stage.QUANTIZED) is first
    for other in ({"after": Stage.OBSERVED}, {"after": Stage.TRANSFORMED, "check": str}):
        with pytest.raises(DuplicateNameError, match="stage 'sparse' is already registered by <stage sparse>"):
            register_stage("sparse", **other)  # type: ignore[arg-type]
    for name in ("captured", "lowered"):
        with pytest.raises(DuplicateNameError, match=f"stage '{name}' is already registered"):
            register_stage(name, after=Stage.TRANSFORMED)
    assert len(in_order()) == 6
    assert len(SPECS) == 5


def test_what_is_not_a_stage() -> None:
    for name in ("Sparse", "sparse_one", "", "a--b", "a b", None):
        with pytest.raises(ConfigurationError, match="a stage cannot be called"):
            register_stage(name, after=Stage.TRANSFORMED)  # type: ignore[arg-type]
    message = "unknown stage 'transfomed'. Known: captured, lowered, observed, quantized, transformed."
    with pytest.raises(UnknownNameError, match=message):
        register_stage("sparse", after="transfomed")
    with pytest.raises(ConfigurationError, match="stage sparse: before should be a stage or the name of one, not 3"):
        register_stage("sparse", after=Stage.TRANSFORMED, before=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="cannot come after lowered, which is the last"):
        register_stage("sparse", after=Stage.LOWERED)
    with pytest.raises(ConfigurationError, match="check should be a function of a node, not 'mul'"):
        register_stage("sparse", after=Stage.TRANSFORMED, check="mul")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="is not an op"):
        register_stage("sparse", after=Stage.TRANSFORMED, ops=[torch.relu])
    assert len(in_order()) == len(STAGES) == 5
    with pytest.raises(TypeError):
        assert Stage.CAPTURED < 3  # type: ignore[operator]


def test_a_circle_is_refused() -> None:
    sparse = register_stage("sparse", after=Stage.TRANSFORMED)
    message = "stage round cannot come after sparse and before transformed: transformed comes before sparse"
    with pytest.raises(ConfigurationError, match=message):
        register_stage("round", after=sparse, before=Stage.TRANSFORMED)
    with pytest.raises(ConfigurationError, match="before sparse: sparse is the same stage"):
        register_stage("round", after=sparse, before=sparse)
    with pytest.raises(ConfigurationError, match="have no order: own -> own"):
        register_stage("own", after="own")


def test_removal() -> None:
    sparse = register_stage("sparse", after=Stage.TRANSFORMED)
    ready = register_stage("ready", after=sparse)
    with pytest.raises(ConfigurationError, match="the stage ready was registered next to sparse; remove it first"):
        unregister_stage(sparse)
    with pytest.raises(ConfigurationError, match="the stage captured belongs to fxquant and stays"):
        unregister_stage(Stage.CAPTURED)
    unregister_stage(ready)
    unregister_stage(sparse)
    assert [*SPECS] == [Stage.CAPTURED, Stage.OBSERVED, Stage.TRANSFORMED, Stage.QUANTIZED]
    message = f"the stage sparse of {__name__} is not registered any more"
    for use in (lambda: sparse > Stage.CAPTURED, lambda: unregister_stage(sparse), lambda: later(sparse, sparse)):
        with pytest.raises(ConfigurationError, match=message):
            use()
    with pytest.raises(UnknownNameError, match="unknown stage 'sparse'"):
        stage_named("sparse")


def test_what_its_graphs_may_hold(twice: object) -> None:  # noqa: F811
    module = with_op(twice)
    before = register_stage("before", after=Stage.TRANSFORMED)
    sparse = register_stage("sparse", after=before, ops=[twice])
    after = register_stage("after", after=sparse)
    verify(module, SPECS[sparse])
    verify(module, SPECS[after])  # A stage may hold what the one before it may hold.
    for stage in (Stage.TRANSFORMED, before, Stage.QUANTIZED):
        with pytest.raises(VerificationError, match=f"does not belong in a graph of stage '{stage}'"):
            verify(module, SPECS[stage])
    register_op(sparse, twice)  # From this stage on.
    verify(module, SPECS[Stage.QUANTIZED])
    with pytest.raises(VerificationError):
        verify(module, SPECS[before])
    with pytest.raises(ConfigurationError, match="fxquant_test::twice is registered for sparse graphs; keep the stage"):
        unregister_stage(sparse)


def test_its_own_condition(twice: object) -> None:  # noqa: F811
    def no_large_nodes(node: fx.Node) -> str | None:
        return "its name is too long" if len(node.name) > 10 else None

    def fails(node: fx.Node) -> str | None:
        raise KeyError(node.name)

    register_op(Stage.TRANSFORMED, twice)
    module = with_op(twice)
    strict = register_stage("strict", after=Stage.TRANSFORMED, check=no_large_nodes)
    with pytest.raises(VerificationError, match=r"twice_default.*its name is too long, in a graph of stage 'str"):
        verify(module, SPECS[strict])
    broken = register_stage("broken", after=Stage.TRANSFORMED, check=fails)
    with pytest.raises(VerificationError, match=r"the check of stage 'broken' failed at .*KeyError"):
        verify(module, SPECS[broken])


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for modules, with two that offer stages by entry points."""
    points = [EntryPoint(name, f"stages_of_{name}:STAGE", "fxquant.stages") for name in ("one", "two")]
    monkeypatch.setattr("fxquant.registry.entry_points", lambda group: points if group == "fxquant.stages" else [])
    monkeypatch.syspath_prepend(tmp_path)
    STAGES._pending = None
    yield tmp_path
    for name in ("one", "two"):
        sys.modules.pop(f"stages_of_{name}", None)


def package(folder: Path, name: str, place: str, more: str = "") -> None:
    code = f"from fxquant.authoring import register_stage\nSTAGE = register_stage({name!r}, {place})\n{more}"
    (folder / f"stages_of_{name}.py").write_text(code)


def test_installed_packages_offer_stages(installed: Path) -> None:
    package(installed, "one", "after='two'")
    package(installed, "two", "after='transformed'")
    assert "one" in STAGES
    assert "stages_of_one" not in sys.modules  # Nothing is imported before it is asked for.
    one = stage_named("one")
    assert one is sys.modules["stages_of_one"].STAGE  # type: ignore[attr-defined]
    assert Stage.TRANSFORMED < stage_named("two") < one
    with pytest.raises(DuplicateNameError):
        register_stage("two", after=Stage.TRANSFORMED)


def test_packages_that_name_each_other(installed: Path) -> None:
    package(installed, "one", "after='two'")
    package(installed, "two", "after='one'")
    with pytest.raises(PluginError, match="have no order: one -> two -> one"):
        stage_named("one")
    assert len(in_order()) == 5


def test_a_package_that_cannot_be_imported(installed: Path) -> None:
    package(installed, "one", "after='transformed'", "import no_such_module")
    package(installed, "two", "after='transformed'", "STAGE = 3")
    with pytest.raises(PluginError, match=r"the stage 'one' cannot be imported from stages_of_one:STAGE: Module"):
        stage_named("one")
    with pytest.raises(PluginError, match="3 is not the stage 'two'"):
        stage_named("two")
