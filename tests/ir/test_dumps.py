"""Graphs in files: loaded again they are the same graphs, and passes do the same to them."""

from __future__ import annotations

import copy
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

import fxquant
from fxquant.errors import CheckpointError, PassError
from fxquant.ir.dumps import Dump, dump_of, load_dump, module_of
from fxquant.ir.histories import history_of
from fxquant.ir.meta import LAYER, PROVENANCE
from fxquant.ir.printing import graph_text
from fxquant.ir.stages import SPECS, Stage, stage_named, verify
from fxquant.pipeline.pipeline import Pass, PassRecord, Pipeline
from fxquant.planning.plan import Plan
from tests.support import captured, outputs
from tests.tiny import calibrate, inputs, make_dit


class Graphs:
    """Instrument: the graph after each pass, as a dump and as text."""

    def __init__(self) -> None:
        self.seen: list[tuple[Stage, Dump, str]] = []
        self.stage = Stage.CAPTURED

    def before(self, step: Pass, module: fx.GraphModule) -> None:
        if not self.seen:
            self._add(module)

    def after(self, step: Pass, module: fx.GraphModule, record: PassRecord) -> None:
        self.stage = max(self.stage, step.establishes)
        self._add(module)

    def failed(self, step: Pass, module: fx.GraphModule, error: Exception) -> None:
        pass

    def _add(self, module: fx.GraphModule) -> None:
        self.seen.append((self.stage, dump_of(module, self.stage, largest=None), graph_text(module, notes=True)))


@pytest.fixture(scope="module")
def converted() -> tuple[fxquant.runtime.model.GraphModel, Graphs]:
    model, watch = make_dit(), Graphs()
    recipe = fxquant.make_recipe("htg-w4a8").with_options("group-timesteps", groups=2)
    return fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), measure=0, instruments=[watch]), watch


@pytest.mark.parametrize("modules", [3, "text", [["key"]]], ids=str)
def test_entries_of_another_form_are_told_as_damage(modules: object, tmp_path: Path) -> None:
    graph = captured(nn.Linear(4, 8), torch.randn(2, 4)).module
    dump = dump_of(graph, Stage.CAPTURED)
    dump.nodes[-2]["modules"] = modules
    dump.write(tmp_path / "graph")
    with pytest.raises(CheckpointError, match=r"graph\.json: it does not describe a graph \(.*copy the dump"):
        load_dump(tmp_path / "graph.json")


@pytest.mark.slow
def test_every_stage_is_read_back(converted: tuple[object, Graphs], tmp_path: Path) -> None:
    for number, (stage, dump, text) in enumerate(converted[1].seen):
        dump.write(tmp_path / f"{number:02d}")
        read, module = load_dump(tmp_path / f"{number:02d}.json")
        assert graph_text(module, notes=True) == text
        assert (read.stage, stage_named(read.stage)) == (str(stage), stage)
        verify(module, SPECS[stage])


def test_it_computes_the_same(converted: tuple[fxquant.runtime.model.GraphModel, Graphs]) -> None:
    quantized, watch = converted
    given = [*inputs().values()]
    module = module_of(watch.seen[-1][1])
    assert torch.equal(outputs(module, *given)[0], outputs(quantized.graphs[0], *given)[0])


def test_passes_do_the_same_to_it(converted: tuple[fxquant.runtime.model.GraphModel, Graphs]) -> None:
    quantized, watch = converted
    module = module_of(watch.seen[0][1])
    plan = copy.deepcopy(quantized.plan)
    prepare, _, convert = quantized.plan.recipe.partition(" ; ")
    Pipeline.parse(f"{prepare},{convert}").run(module, plan)
    assert graph_text(module, notes=True) == watch.seen[-1][2]


def test_large_tensors_are_stored_as_shapes(tmp_path: Path) -> None:
    found = captured(make_dit(), timestep_name="timestep", **inputs())
    dump_of(found.module, Stage.CAPTURED, largest=100).write(tmp_path / "small")
    _, module = load_dump(tmp_path / "small")
    tensors = dict(module.named_parameters())
    name = "transformer_blocks.0.attn1.to_q"
    assert isinstance(tensors[f"{name}.weight"].data, FakeTensor) or isinstance(tensors[f"{name}.weight"], FakeTensor)
    assert torch.equal(tensors[f"{name}.bias"], found.module.get_parameter(f"{name}.bias"))
    assert (tmp_path / "small.safetensors").stat().st_size < 20_000
    assert graph_text(module, notes=True) == graph_text(found.module, notes=True)


def test_what_passes_know_about_nodes_survives(converted: tuple[object, Graphs]) -> None:
    module = module_of(converted[1].seen[-1][1])
    node = next(n for n in module.graph.nodes if n.meta.get(LAYER) == "transformer_blocks.0.attn1.to_q")
    assert str(node.meta[PROVENANCE][-1]) == "quantize-linears(linear_3)"
    line = fxquant.origin(node).line
    assert line is not None and line.file == "diffusers/models/attention_processor.py"
    weight = next(n for n in module.graph.nodes if n.op == "get_attr" and n.target.endswith("to_q.weight_packed"))
    assert history_of(module, weight).root == "codes"


def test_the_batch_stays_open() -> None:
    found = captured(make_dit(), timestep_name="timestep", **inputs())
    module = module_of(dump_of(found.module, Stage.CAPTURED, largest=None))
    sizes = {node.name: node.meta["val"].shape[0] for node in module.graph.nodes if node.op == "placeholder"}
    assert len({str(size) for size in sizes.values()}) == 1
    assert not any(isinstance(size, int) for size in sizes.values())
    assert outputs(module, *inputs(batch=3).values())[0].shape[0] == 3


def rename(data: Any, name: str) -> None:
    data["shapes"][name] = data["shapes"].pop("weight")
    data["nodes"][0]["target"] = name


def power(base: object, exponent: int) -> dict[str, Any]:
    return {"name": "p", "op": "call_function", "target": "operator.pow", "args": [base, exponent]}


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        found = captured(nn.Linear(4, 4), torch.randn(2, 4))
        dump_of(found.module, Stage.CAPTURED).write(tmp_path / "dump")
        return tmp_path / "dump.json"

    def changed(self, path: Path, change: object) -> Path:
        data = json.loads(path.read_text(encoding="utf-8"))
        change(data)  # type: ignore[operator]
        path.write_text(json.dumps(data), encoding="utf-8")
        return path

    def test_code(self, path: Path) -> None:
        for target in ("os.system", "builtins.eval", "torch.load", "operator.call", "aten::from_file"):
            self.changed(path, lambda data, target=target: data["nodes"][-2].update(target=target))
            with pytest.raises(CheckpointError, match="is neither an op nor arithmetic"):
                load_dump(path)

    def test_an_op_that_is_not_registered(self, path: Path) -> None:
        self.changed(path, lambda data: data["nodes"][-2].update(target="nobody::knows"))
        with pytest.raises(CheckpointError, match=r"op nobody::knows is not registered here; import the package"):
            load_dump(path)

    def test_a_newer_format(self, path: Path) -> None:
        self.changed(path, lambda data: data.update(format=2))
        with pytest.raises(CheckpointError, match="has format 2, this fxquant reads format 1"):
            load_dump(path)

    def test_a_format_that_is_no_number_is_told_in_short(self, path: Path) -> None:
        self.changed(path, lambda data: data.update(format=data["nodes"]))
        with pytest.raises(CheckpointError, match="this fxquant reads format 1") as caught:
            load_dump(path)
        assert len(str(caught.value)) < 400 + len(str(path))

    def test_damage(self, path: Path, tmp_path: Path) -> None:
        self.changed(path, lambda data: data["nodes"][-2].update(args=[{"node": "nowhere"}]))
        with pytest.raises(CheckpointError, match=r"dump\.json"):
            load_dump(path)
        path.write_text("{}", encoding="utf-8")
        with pytest.raises(CheckpointError, match="is not a dump of a graph"):
            load_dump(path)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_dump(tmp_path / "nowhere")

    @pytest.mark.parametrize(
        "change",
        [
            lambda data, code: data["nodes"][2].update(target=f"x={code}"),
            lambda data, code: data["nodes"][-2].update(kwargs={f"a={code}, b": 1}),
            lambda data, code: rename(data, f'a")\n{code}\ndef g(self):\n  ("'),
            lambda data, code: data["nodes"][-2].update(target="import_module::__func__.__call__", args=["", "this"]),
            lambda data, code: data["nodes"][-2].update(target="aten::__class__.__subclasses__", args=[]),
            lambda data, code: data["shapes"].update({"__class__.table": ["float32", [4]]}),
        ],
        ids=["input", "keyword", "tensor", "import", "class", "attribute of all modules"],
    )
    def test_code_where_a_name_should_be(self, path: Path, tmp_path: Path, change: Callable[..., Any]) -> None:
        made = tmp_path / "made"
        self.changed(path, lambda data: change(data, f"open({str(made)!r},'w')"))
        with pytest.raises(CheckpointError, match=r"dump\.json"):
            load_dump(path)
        assert not made.exists() and not hasattr(nn.Module, "table")

    @pytest.mark.parametrize(
        "change",
        [
            lambda data: data["nodes"][-2].update(args=[{"node": data["nodes"][-2]["name"]}]),
            lambda data: data["nodes"][1].update(name=data["nodes"][0]["name"]),
            lambda data: data["nodes"][-2].update(op="call_method"),
            lambda data: data["nodes"][-1].update(args=[5]),
            lambda data: data["nodes"].pop(),
            lambda data: data["nodes"].insert(0, 1),
            lambda data: data["nodes"].insert(0, power(9, 10**9)),
            lambda data: data["nodes"].insert(0, power("abc", 10**10)),
            lambda data: data["nodes"][0].update(history=5),
            lambda data: data["nodes"][-2].update(changes=[["../../etc/passwd", [1]]]),
            lambda data: data["shapes"].update(weight=["float32", [-1, 4]]),
            lambda data: data["shapes"].update(weight=["float32", [7, 7]]),
            lambda data: data["shapes"].pop("weight"),
            lambda data: data.update(stage="nowhere"),
            lambda data: data.update(stage=5),
            lambda data: data.update(facts=[1]),
        ],
    )
    def test_what_is_no_graph(self, path: Path, change: Callable[..., Any]) -> None:
        self.changed(path, change)
        with pytest.raises(CheckpointError, match=r"dump\.json"):
            load_dump(path)

    def test_an_argument_without_a_form(self) -> None:
        module = captured(nn.Linear(4, 4), torch.randn(2, 4)).module
        node = list(module.graph.nodes)[-2]
        node.kwargs = {"odd": object()}
        with pytest.raises(PassError, match="an argument of type object cannot be written"):
            dump_of(module, Stage.CAPTURED)


def test_a_plan_is_not_needed_to_read(converted: tuple[object, Graphs]) -> None:
    module = module_of(converted[1].seen[0][1])
    (record,) = Pipeline.parse("remove-no-ops").run(module, Plan("", "", "timestep"))
    assert record.edits


def test_a_shape_of_too_many_sizes_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    end = {"name": "output", "op": "output", "target": "output"}
    shapes = {"weight": ["float32", [float(number) for number in range(200_000)]]}
    data = {"format": 1, "stage": "captured", "nodes": [end], "shapes": shapes}
    (tmp_path / "a.json").write_text(json.dumps(data))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="'shapes' > 'weight'"):
        Dump.read(tmp_path / "a.json")
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
