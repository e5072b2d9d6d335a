"""PassDecisions: decisions of a pass from outside are saved, loaded, compared, copied and reported."""

from __future__ import annotations

import copy
import enum
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

import fxquant
from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.ir.meta import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.pipeline.pipeline import PASSES, Pass, Tier, register_pass
from fxquant.pipeline.recipes import make_recipe
from fxquant.planning.context import PassContext
from fxquant.planning.pass_decisions import Decision
from fxquant.planning.plan import PLAN_FILE, VECTORS_FILE, Plan
from tests import tiny


class Kind(enum.Enum):
    HADAMARD = "hadamard"
    RANDOM = "random"


@dataclass
class Size:
    rows: int
    columns: int


@dataclass
class Rotation(Decision, of="rotate-inputs"):
    seed: int
    matrix: Tensor
    kind: Kind = Kind.RANDOM
    permutation: Tensor | None = None
    sizes: tuple[Size, ...] = ()
    sqnr_db: float | None = None
    notes: dict[str, list[str]] = field(default_factory=dict)


def rotation(seed: int = 0) -> Rotation:
    matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))
    return Rotation(seed, matrix, Kind.HADAMARD, torch.arange(3), (Size(1, 2),), float("inf"), {"a": ["b"]})


def planned() -> Plan:
    plan = Plan("", "", "timestep")
    plan.vectors["q"] = torch.ones(3)
    plan.decisions_of(Rotation)["blocks.0.q"] = rotation()
    plan.decisions_of(Rotation)["blocks.1.q"] = replace(rotation(1), permutation=None)
    return plan


def test_decisions_are_saved_and_loaded(tmp_path: Path) -> None:
    plan = planned()
    plan.save(tmp_path)
    assert load_file(tmp_path / VECTORS_FILE).keys() == {
        "q",
        ".rotate-inputs:blocks.0.q.matrix",
        ".rotate-inputs:blocks.0.q.permutation",
        ".rotate-inputs:blocks.1.q.matrix",
    }
    loaded = Plan.load(tmp_path)
    assert loaded == plan and loaded.vectors.keys() == {"q"}
    found = loaded.decisions_of(Rotation)
    assert list(found) == ["blocks.0.q", "blocks.1.q"]
    one, own = found["blocks.0.q"], rotation()
    assert torch.equal(one.matrix, own.matrix) and torch.equal(one.permutation, own.permutation)
    assert one.permutation.dtype is torch.int64
    assert (one.seed, one.kind, one.sizes, one.sqnr_db, one.notes) == (
        0,
        Kind.HADAMARD,
        (Size(1, 2),),
        float("inf"),
        {"a": ["b"]},
    )
    assert found["blocks.1.q"].permutation is None
    assert loaded == plan
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again")  # Also if no pass has asked for them.
    Plan.load(tmp_path / "again").save(tmp_path / "third")
    assert (tmp_path / "third" / PLAN_FILE).read_text() == (tmp_path / PLAN_FILE).read_text()


def test_a_plan_without_them_has_no_such_entry() -> None:
    plan = Plan("", "", None)
    assert not plan.decisions_of(Rotation)
    assert "pass_decisions" not in plan.to_json()


def changed(change: str) -> Plan:
    plan = planned()
    first = plan.decisions_of(Rotation)["blocks.0.q"]
    if change == "field":
        first.seed = 5
    elif change == "tensor":
        first.matrix[0, 0] += 1
    elif change == "dtype":
        first.matrix = first.matrix.double()
    elif change == "entry":
        del plan.decisions_of(Rotation)["blocks.1.q"]
    elif change == "vector":
        plan.vectors["q"][0] = 2
    elif change == "bits":
        plan.bytes_after = 1
    return plan


@pytest.mark.parametrize("change", ["field", "tensor", "dtype", "entry", "vector", "bits"])
def test_plans_are_compared(change: str) -> None:
    assert planned() == planned()
    assert changed(change) != planned()
    assert planned() != "plan"


def test_how_long_passes_took_does_not_count() -> None:
    plan, other = planned(), planned()
    plan.passes = [{"pass": "a", "seconds": 1.0, "edits": 1, "ops": {}}]
    other.passes = [{"pass": "a", "seconds": 2.0, "edits": 1, "ops": {}}]
    assert plan == other
    other.passes[0]["edits"] = 2
    assert plan != other


def test_a_copy_is_its_own() -> None:
    plan = planned()
    other = copy.deepcopy(plan)
    assert other == plan
    other.decisions_of(Rotation)["blocks.0.q"].matrix.zero_()
    assert other != plan and plan == planned()
    untyped = copy.deepcopy(plan)  # Its entries have no type until a pass asks for them.
    again = copy.deepcopy(untyped)
    again.decisions_of(Rotation)["blocks.0.q"].matrix.zero_()
    assert untyped == plan


def test_the_report_shows_them() -> None:
    report = fxquant.report(planned())
    lines = report.table(every=True).splitlines()
    start = lines.index("decisions of rotate-inputs")
    assert [word for word in lines[start + 1].split() if word] == [
        "of", "seed", "kind", "sizes", "sqnr_db", "notes", "matrix", "permutation"
    ]  # fmt: skip
    assert lines[start + 3].split()[:3] == ["blocks.0.q", "0", "hadamard"] and "float32[3, 3]" in lines[start + 3]
    assert report.to_json()["decisions"][0]["values"]["permutation"] == "int64[3]"
    assert "decisions" not in fxquant.report(Plan("", "", None)).to_json()


def test_entries_that_differ_in_numbers_share_a_row() -> None:
    plan = Plan("", "", "timestep")
    for number in range(3):
        plan.decisions_of(Rotation)[f"blocks.{number}.q"] = Rotation(number, torch.zeros(2, 2), sqnr_db=10.0 + number)
    lines = fxquant.report(plan).table().splitlines()
    (row,) = (line for line in lines if line.startswith("blocks."))
    assert "0..2" in row.split() and "10.0..12.0" in row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.pop("seed"), r"'blocks.0.q' of rotate-inputs does not fit Rotation.*seed"),
        (lambda entry: entry.update(seed="five"), r"rotate-inputs: seed: input should be a valid integer"),
        (lambda entry: entry.update(kind="wild"), r"rotate-inputs: kind: input should be 'hadamard' or 'random'"),
        (lambda entry: entry.update(other=1), r"rotate-inputs has 'other', which Rotation does not"),
        (lambda entry: entry.update(matrix=[1.0]), r"'.rotate-inputs:blocks.0.q.matrix' belongs to no decision"),
        (lambda entry: entry.update(seed={"tensor": ".rotate-inputs:blocks.0.q.seed"}), r"lacks its tensor"),
    ],
)
def test_a_damaged_entry_is_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    planned().save(tmp_path)
    data = json.loads((tmp_path / PLAN_FILE).read_text())
    change(data["pass_decisions"]["rotate-inputs"]["blocks.0.q"])
    (tmp_path / PLAN_FILE).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        Plan.load(tmp_path).decisions_of(Rotation)


def test_what_is_no_tensor_is_refused_by_name(tmp_path: Path) -> None:
    planned().save(tmp_path)
    data = json.loads((tmp_path / PLAN_FILE).read_text())
    data["pass_decisions"]["rotate-inputs"]["blocks.1.q"]["permutation"] = [0, 1, 2]
    (tmp_path / PLAN_FILE).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"'blocks.1.q' of rotate-inputs: permutation should be a tensor"):
        Plan.load(tmp_path).decisions_of(Rotation)


def test_tensors_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    planned().save(tmp_path)
    whole = load_file(tmp_path / VECTORS_FILE)
    key = ".rotate-inputs:blocks.0.q.matrix"
    for tensors, message in (
        ({name: tensor for name, tensor in whole.items() if name != key}, rf"lacks its tensor '{key}'"),
        (whole | {".other:q.matrix": torch.ones(3)}, "tensor '.other:q.matrix' belongs to no decision of the plan"),
        (whole | {"q": whole["q"] * float("inf")}, "vector 'q' should hold finite numbers"),
        (whole | {"q": torch.arange(3)}, "vector 'q' should hold finite numbers"),
    ):
        save_file(tensors, tmp_path / VECTORS_FILE)
        with pytest.raises(CheckpointError, match=message):
            Plan.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.bool, torch.float64])
def test_a_tensor_may_hold_anything(tmp_path: Path, dtype: torch.dtype) -> None:
    plan = Plan("", "", None)
    matrix = torch.tensor([[1.0, float("inf")], [float("nan"), 0.0]]).to(dtype)
    plan.decisions_of(Rotation)["q"] = Rotation(0, matrix, permutation=matrix)
    plan.save(tmp_path)
    loaded = Plan.load(tmp_path)
    assert loaded == plan
    assert loaded.decisions_of(Rotation)["q"].matrix.dtype is dtype


def test_types_that_cannot_be_stored_are_refused_at_once() -> None:
    @dataclass
    class Held(Decision, of="hold"):
        module: torch.nn.Module

    class Bare(Decision, of="bare"):
        pass

    @dataclass
    class Other(Decision, of="rotate-inputs"):
        seed: int

    plan = planned()
    with pytest.raises(ConfigurationError, match=r"field 'module' of Held is a .*Module.*cannot store"):
        plan.decisions_of(Held)
    with pytest.raises(ConfigurationError, match="Bare is not a dataclass"):
        plan.decisions_of(Bare)
    with pytest.raises(ConfigurationError, match="decisions of rotate-inputs are Rotations, not Others"):
        plan.decisions_of(Other)
    with pytest.raises(ConfigurationError, match="names no pass"):
        type("Nameless", (Decision,), {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": "five"}, "'q' of rotate-inputs cannot be stored: seed"),
        ({"matrix": [[1.0]]}, "'q' of rotate-inputs cannot be stored: matrix: it is a list, not a tensor"),
        ({"notes": {"a": object()}}, "'q' of rotate-inputs cannot be stored: notes"),
        ({"sizes": torch.ones(2)}, "'q' of rotate-inputs cannot be stored: sizes"),
    ],
)
def test_values_that_do_not_fit_are_refused_when_saving(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    plan = planned()
    plan.decisions_of(Rotation)["q"] = replace(rotation(), **values)
    with pytest.raises(ConfigurationError, match=message):
        plan.save(tmp_path / "plan")
    assert not (tmp_path / "plan" / PLAN_FILE).exists()


@dataclass
class Gain(Decision, of="scale-nothing"):
    mean: float
    channels: Tensor


@dataclass(frozen=True)
class ScaleNothing(Pass):
    """Decides the mean of each layer's input and changes nothing."""

    name: ClassVar[str] = "scale-nothing"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        gains = context.plan.decisions_of(Gain)
        for node in graph.nodes:
            name = node.meta.get(LAYER)
            layer = context.plan.layers.get(name)
            if layer is None or layer.observed is None or name in gains:
                continue
            seen = context.observed(layer.observed)
            gains[name] = Gain(float(seen.maximum.mean()), seen.maximum.amax(0).double())


@pytest.fixture
def registered() -> Any:
    register_pass(ScaleNothing)
    yield
    del PASSES._objects[ScaleNothing.name]


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
def test_a_pass_from_outside_decides_saves_and_replays(tmp_path: Path) -> None:
    chosen = make_recipe("rtn-w8a8")
    chosen = replace(chosen, convert=(ScaleNothing(), *chosen.convert))
    model = tiny.make_dit()
    quantized = fxquant.compile(model, recipe=chosen, calibrate=tiny.calibrate(model))
    again = fxquant.compile(model, recipe=chosen, calibrate=tiny.calibrate(model))
    gains = quantized.plan.decisions_of(Gain)
    assert gains and all(name in quantized.plan.layers for name in gains)
    assert again.plan == quantized.plan
    fxquant.save(quantized, tmp_path / "saved")
    loaded = fxquant.load(tmp_path / "saved")
    assert loaded.plan.pass_decisions.to_json() == quantized.plan.pass_decisions.to_json()
    assert torch.equal(tiny.run(loaded), tiny.run(quantized))
    replayed = fxquant.compile(model, plan=quantized.plan)  # Without statistics: all is decided.
    assert replayed.plan.decisions_of(Gain).keys() == gains.keys()
    assert torch.equal(tiny.run(replayed), tiny.run(quantized))
    assert "decisions of scale-nothing" in str(fxquant.report(tmp_path / "saved"))
    tiny.run(quantized, size=4)  # A further kind of call decides on a copy.
    assert quantized.plan == again.plan


class Other(enum.Enum):
    A = "a"


@dataclass
class Left:
    a: int


@dataclass
class Right:
    a: int


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (Any, float("nan")), (Other | str, Other.A), (Left | Right, Right(1)), (dict, {1: 2}), (Any, (1, 2)),
        (dict[str | None, int], {None: 1}), (int, True), (object, Left(1)),
    ],
)  # fmt: skip
def test_what_would_be_read_back_as_something_else_is_refused(tmp_path: Path, hint: Any, value: Any) -> None:
    kind = dataclass(type("Held", (Decision,), {"__annotations__": {"v": hint}, "__module__": __name__}, of="hold"))
    plan = Plan("", "", None)
    plan.decisions_of(kind)["q"] = kind(value)
    try:
        plan.save(tmp_path)
    except ConfigurationError as error:
        assert "'q' of hold cannot be stored: v" in str(error)
        return
    back = Plan.load(tmp_path).decisions_of(kind)["q"].v
    assert type(back) is type(value) and (back == value or value != value)


def test_an_int_of_a_float_field_is_a_float() -> None:
    plan = Plan("", "", None)
    plan.decisions_of(Rotation)["q"] = replace(rotation(), sqnr_db=1)
    other = copy.deepcopy(plan)
    assert other == plan
    assert type(other.decisions_of(Rotation)["q"].sqnr_db) is float
    assert other == plan


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 501, 1])
def test_names_that_cannot_be_read_back_are_refused(tmp_path: Path, name: Any) -> None:
    plan = Plan("first", "", None)
    plan.save(tmp_path)
    plan.recipe = "second"
    plan.decisions_of(Rotation)[name] = rotation()
    with pytest.raises(ConfigurationError, match="a decision of rotate-inputs is called"):
        plan.save(tmp_path)
    assert Plan.load(tmp_path).recipe == "first"


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, dtype=torch.complex128), torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")],
    ids=["complex", "sparse", "meta"],
)
def test_tensors_that_cannot_be_stored_are_refused(tmp_path: Path, tensor: Tensor) -> None:
    Plan("first", "", None).save(tmp_path)
    plan = Plan("second", "", None)
    plan.decisions_of(Rotation)["q"] = Rotation(0, tensor)
    with pytest.raises(ConfigurationError, match="matrix: only dense tensors of real numbers"):
        plan.save(tmp_path)
    assert Plan.load(tmp_path).recipe == "first"


def test_a_plan_too_large_to_be_read_is_refused(tmp_path: Path) -> None:
    plan = Plan("", "", None)
    for number in range(3):
        plan.decisions_of(Rotation)[f"b.{number}.q"] = replace(rotation(), notes={"a": ["x" * 5_000_000]})
    with pytest.raises(ConfigurationError, match="Keep long lists as tensors"):
        plan.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_learned_tensor_is_copied_without_its_history() -> None:
    weight = torch.ones(3, 3, requires_grad=True)
    plan = Plan("", "", None)
    plan.decisions_of(Rotation)["q"] = Rotation(0, weight * 2)
    other = copy.deepcopy(plan)
    assert other == plan and not other.decisions_of(Rotation)["q"].matrix.requires_grad


def test_types_that_cannot_be_read_back_are_refused_at_once() -> None:
    class Mode(enum.Enum):
        A = 1

    @dataclass
    class Local(Decision, of="local"):
        mode: Mode

    @dataclass
    class Derived(Decision, of="derived"):
        a: int
        b: int = field(init=False, default=0)

    @dataclass
    class Plain:
        a: int

    plan = Plan("", "", None)
    for kind, message in (
        (Local, "types of the fields of Local cannot be found"),
        (Derived, "Derived should be made from its fields alone"),
        (Plain, "is not a subclass of Decision"),
        ("rotate-inputs", "is not a subclass of Decision"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            plan.decisions_of(kind)
    with pytest.raises(ConfigurationError, match="'a:b' is not a name of a pass"):
        type("Colon", (Decision,), {}, of="a:b")


@dataclass
class Positive(Decision, of="positive"):
    a: int

    def __post_init__(self) -> None:
        if self.a < 0:
            raise ValueError("a is negative")


@dataclass
class MorePositive(Positive):
    b: int = 0


def test_a_type_may_refuse_values(tmp_path: Path) -> None:
    plan = Plan("", "", None)
    plan.decisions_of(Positive)["q"] = Positive(1)
    plan.save(tmp_path)
    path = tmp_path / PLAN_FILE
    path.write_text(path.read_text().replace('"a": 1', '"a": -1'))
    with pytest.raises(CheckpointError, match="'q' of positive does not fit Positive: a is negative"):
        Plan.load(tmp_path).decisions_of(Positive)


def test_one_pass_has_one_type() -> None:
    plan = Plan("", "", None)
    plan.decisions_of(Positive)["q"] = MorePositive(1, 2)
    with pytest.raises(ConfigurationError, match="decisions of positive are MorePositives, not Positives"):
        plan.decisions_of(Positive)
    rows = [("a.q", Positive(1)), ("b.k", MorePositive(1, 2))]
    plan.decisions_of(MorePositive).update(rows)
    assert "decisions of positive" in str(fxquant.report(plan))


def test_a_type_that_is_defined_again_takes_its_entries() -> None:
    body = {"__annotations__": {"a": int}, "__module__": __name__}
    plan, made = Plan("", "", None), [dataclass(type("D", (Decision,), dict(body), of="d")) for _ in range(2)]
    plan.decisions_of(made[0])["q"] = made[0](1)
    assert plan.decisions_of(made[1])["q"] == made[1](1)
