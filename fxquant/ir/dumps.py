"""Graphs in files: a JSON file with the nodes, and safetensors with the small tensors. No pickle, no code, no weights.

A dump can be loaded again (:func:`module_of`), so that passes can run on it: to reproduce a failure, and for golden
cases. Shapes are not stored but inferred again, from the inputs and tensors. Large tensors, such as weights, are stored
as shapes only and come back as fake tensors, as they are while a plan is replayed.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.node import map_arg

from fxquant.disk.files import blaming, dtype_name, dtype_of_name, load_tensors, write_tensors
from fxquant.disk.whole_file import whole_file
from fxquant.errors import CheckpointError, FxquantError, PassError, UnknownNameError
from fxquant.ir import histories
from fxquant.ir.attention import ValueChange, changes_of, note_change
from fxquant.ir.meta import ITEM, LAYER, NAMES, PROVENANCE
from fxquant.ir.places import Origin
from fxquant.ir.proofs import prove
from fxquant.ir.stages import STAGES, Stage, is_own, stage_named
from fxquant.ir.tensors import read_tensors, set_tensor
from fxquant.ir.time_tables import BOUNDARIES
from fxquant.schemas.common import check, read_json
from fxquant.schemas.dump import DumpFile
from fxquant.text import printable

FORMAT = 1
"""Version of the format of dumps; a newer one is refused."""

LARGEST = 16_384
"""Tensors of at most so many numbers are stored with their values, by default."""

_PLAIN = (LAYER, ITEM, "stack_trace")
_ARITHMETIC = (
    *("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "abs"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"),
)
_FUNCTIONS = {
    **{f"{home}.{name}": getattr(operator, name) for name in _ARITHMETIC for home in ("operator", "_operator")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt", "log", "log2", "exp", "pow")},
    **{f"torch.{name}": getattr(torch, name) for name in dir(torch) if name.startswith("sym_")},
    **{f"builtins.{function.__name__}": function for function in (abs, float, int, max, min, round)},
}
_OP = re.compile(r"(\w+)::(\w+)(?:\.(\w+))?")
_SIZE = re.compile(r"(?:(\d+)\*)?(s\d+)")


@dataclass
class Dump:
    """A graph as plain values.

    Attributes:
        stage: Stage of the graph, such as ``captured``.
        nodes: The nodes in order, as JSON values.
        shapes: Dtype and shape of each tensor that the graph reads, by name.
        tensors: The tensors that are stored with their values, by name.
        names: The names that the model itself uses: true for tensors, false for modules.
        facts: What whoever wrote the dump says about it, as JSON values.
    """

    stage: str
    nodes: list[dict[str, Any]]
    shapes: dict[str, list[Any]]
    tensors: dict[str, Tensor]
    names: dict[str, bool] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def write(self, path: str | Path) -> None:
        """Write ``<path>.json`` and ``<path>.safetensors``, each completely or not at all; their folder is created.

        Raises:
            WriteError: If the files cannot be written.
        """
        path = Path(path)
        data = {name: getattr(self, name) for name in ("stage", "nodes", "shapes", "names", "facts")}
        text = json.dumps({"format": FORMAT, **data}, indent=None, separators=(",", ":"))
        with whole_file(path.with_name(f"{path.name}.json")) as file:
            file.write_text(text.replace('{"name"', '\n{"name"') + "\n", encoding="utf-8")
        with whole_file(path.with_name(f"{path.name}.safetensors")) as file:
            write_tensors(self.tensors, file)

    @classmethod
    def read(cls, path: str | Path) -> Dump:
        """Read what :meth:`write` wrote.

        Args:
            path: The path without or with the ending ``.json``.

        Raises:
            CheckpointError: If a file is missing, damaged or of a newer format.
        """
        path = Path(path)
        stem = path.with_name(path.name.removesuffix(".json").removesuffix(".safetensors").removesuffix(".txt"))
        file = stem.with_name(f"{stem.name}.json")
        if path.is_dir() and not file.is_file():
            raise CheckpointError(
                f"{path} is a folder, not the dump of a graph; give one of the .json files that fxquant quantize "
                "--dump wrote, such as 00-captured.json"
            )
        _, data = read_json(file, "dump")
        if not isinstance(data, dict) or not {"format", "stage", "nodes", "shapes"} <= data.keys():
            raise CheckpointError(f"{file} is not a dump of a graph; fxquant quantize --dump writes such files")
        if data["format"] != FORMAT:
            raise CheckpointError(
                f"{file} has format {printable(repr(data['format']), 60)}, this fxquant reads format {FORMAT}"
            )
        check(DumpFile, data, f"{file}")
        _check_stage(data, file)
        tensors = load_tensors(stem.with_name(f"{stem.name}.safetensors"), torch.device("cpu"))
        rest = {name: data.get(name, {}) for name in ("names", "facts")}
        return cls(data["stage"], data["nodes"], data["shapes"], tensors, **rest)


def _check_stage(data: Mapping[str, Any], file: Path) -> None:
    """Refuse a dump of a stage that no installed package offers.

    Raises:
        CheckpointError: Names the stage, and the module that registered it where the dump was written.
    """
    try:
        stage_named(data["stage"])
    except UnknownNameError as error:
        message = f"{file} holds a graph of an unknown stage, {data['stage'][:40]!r}. Known: {', '.join(STAGES)}."
        if home := data.get("facts", {}).get("stage_module"):
            message += f" {str(home)[:80]} defines it: install its package, or import the module first (--import)."
        raise CheckpointError(message) from error


def dump_of(module: fx.GraphModule, stage: Stage, *, largest: int | None = LARGEST, **facts: Any) -> Dump:
    """Describe a graph as it is now. Tensors are not copied.

    Args:
        module: The graph.
        stage: Its stage.
        largest: The most numbers of a tensor that is kept with its values; None for all tensors that have values.
        facts: For :attr:`Dump.facts`.

    Raises:
        PassError: If an argument of a node cannot be described.
    """
    shapes, tensors = {}, {}
    for name, tensor in read_tensors(module).items():
        shapes[name] = [dtype_name(tensor.dtype), list(map(int, tensor.shape))]
        plain = tensor.layout is torch.strided and not isinstance(tensor, FakeTensor)
        if plain and (largest is None or tensor.numel() <= largest):
            tensors[name] = tensor.detach()
    nodes = [_node(node, tensors) for node in module.graph.nodes]
    if not is_own(stage):
        facts["stage_module"] = stage.home
    return Dump(str(stage), nodes, shapes, tensors, dict(module.meta.get(NAMES, {})), facts)


def module_of(dump: Dump) -> fx.GraphModule:
    """Make the graph again. Shapes and dtypes are inferred; tensors without values are fake.

    Raises:
        CheckpointError: If the dump describes no graph, or calls an op that is not registered in this process.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    root, graph = nn.Module(), fx.Graph()
    for name, (dtype, shape) in dump.shapes.items():
        stated = _fake(mode, shape, dtype_of_name(dtype))
        tensor = dump.tensors.get(name, stated)
        if (tensor.dtype, tensor.shape) != (stated.dtype, stated.shape):
            raise CheckpointError(f"the tensor {name!r} is not {dtype} of shape {shape}")
        set_tensor(root, name, tensor)
    made: dict[str, fx.Node] = {}
    sizes: dict[str, torch.SymInt] = {}
    for entry in dump.nodes:
        arguments, named = _decoded(entry.get("args", []), made), _decoded(entry.get("kwargs", {}), made)
        target = _target(entry["target"]) if entry["op"] == "call_function" else entry["target"]
        node = graph.create_node(entry["op"], target, tuple(arguments), named, name=entry["name"])
        made[node.name] = made[entry["name"]] = node
        _restore(node, entry, dump)
        if node.op == "placeholder":
            node.meta["val"] = _input(mode, entry, sizes)
    module = fx.GraphModule(root, graph, class_name="Dumped")
    module.meta[NAMES] = dict(dump.names)
    _infer(module, mode)
    return module


def load_dump(path: str | Path) -> tuple[Dump, fx.GraphModule]:
    """Read a dump and make its graph.

    Raises:
        CheckpointError: If a file is missing, damaged or of a newer format, or an op is not registered.
    """
    dump = Dump.read(path)
    with blaming(Path(path)):
        try:
            module = module_of(dump)
            module.graph.lint()
        except FxquantError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"it does not describe a graph ({type(error).__name__}: {error}); copy the dump again"
            ) from error
        returned = list(module.graph.nodes)[-1].args
        if len(returned) != 1 or not isinstance(returned[0], (list, tuple)):
            raise CheckpointError("the output of the graph is not a list of its values")
        return dump, module


def _node(node: fx.Node, tensors: dict[str, Tensor]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": node.name, "op": node.op, "target": _target_text(node)}
    if node.args:
        entry["args"] = [_encoded(value, node) for value in node.args]
    if node.kwargs:
        entry["kwargs"] = {key: _encoded(value, node) for key, value in node.kwargs.items()}
    entry |= {key: node.meta[key] for key in _PLAIN if node.meta.get(key)}
    if PROVENANCE in node.meta:
        entry[PROVENANCE] = [[origin.pass_name, list(origin.sources)] for origin in node.meta[PROVENANCE]]
    if stack := node.meta.get("nn_module_stack"):
        entry["modules"] = [[key, str(path), _class(kind)] for key, (path, kind) in stack.items()]
    if node.op == "get_attr":
        entry |= {"history": histories.to_json(node)} if histories.recorded(node) else {}
        entry |= {"boundaries": list(node.meta[BOUNDARIES])} if BOUNDARIES in node.meta else {}
    if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
        value = node.meta["val"]
        entry["value"] = [dtype_name(value.dtype), [_size(size) for size in value.shape]]
        entry["device"] = str(value.device)
    for number, change in enumerate(changes_of(node)):
        stem = f"change.{node.name}.{number}"
        tensors[f"{stem}.factor"], tensors[f"{stem}.shift"] = change.factor, change.shift
        entry.setdefault("changes", []).append([stem, list(change.boundaries)])
    return entry


def _class(kind: object) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{getattr(kind, '__qualname__', '')}"


def _size(size: int | torch.SymInt) -> int | str:
    return size if isinstance(size, int) else str(size)


def _target_text(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._name
    return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', node.target)}"


def _target(text: str) -> Any:
    """The op or function of a text. Only ops that are registered, and arithmetic, are found: a dump runs no code."""
    match = _OP.fullmatch(text)
    if match is not None and not text.startswith("aten::from_file"):  # The only op that opens files.
        namespace, name, overload = match.groups()
        packet = getattr(getattr(torch.ops, namespace, None), name, None)
        found = getattr(packet, overload or "default", None)
        if not isinstance(found, torch._ops.OpOverload):  # Other attributes of torch.ops load and run code.
            raise CheckpointError(
                f"op {text} is not registered here; import the package that defines it first (--import)"
            )
        return found
    if text not in _FUNCTIONS:
        raise CheckpointError(f"{text!r} is neither an op nor arithmetic; a dump may call nothing else")
    return _FUNCTIONS[text]


def _encoded(value: Any, node: fx.Node) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    for kind, key in _KINDS.items():
        if isinstance(value, kind):
            return {key: str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        items = [_encoded(item, node) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, slice):
        return {"slice": [_encoded(part, node) for part in (value.start, value.stop, value.step)]}
    raise PassError(f"node {node.name}: an argument of type {type(value).__name__} cannot be written to a file")


_KINDS: dict[type, str] = {
    torch.dtype: "dtype",
    torch.device: "device",
    torch.memory_format: "memory_format",
    torch.layout: "layout",
}


def _decoded(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, given),) = value.items()
        if key == "node":
            return nodes[given]
        if key == "tuple":
            return tuple(_decoded(given, nodes))
        if key == "slice":
            return slice(*_decoded(given, nodes))
        if key == "float":
            return float(given)
        if key == "device" and isinstance(given, str):
            return torch.device(given)
        if key in ("dtype", "memory_format", "layout") and isinstance(given, str):
            found = getattr(torch, given, None)
            if isinstance(found, tuple(_KINDS)):
                return found
    return {key: _decoded(item, nodes) for key, item in value.items()}


def _restore(node: fx.Node, entry: Mapping[str, Any], dump: Dump) -> None:
    node.meta.update({key: entry[key] for key in _PLAIN if key in entry})
    if PROVENANCE in entry:
        node.meta[PROVENANCE] = tuple(Origin(name, tuple(sources)) for name, sources in entry[PROVENANCE])
    if "modules" in entry:
        node.meta["nn_module_stack"] = {key: (path, kind) for key, path, kind in entry["modules"]}
    if "history" in entry:
        histories.record(node, histories.from_json(entry["history"]))
    if "boundaries" in entry:
        node.meta[BOUNDARIES] = tuple(entry["boundaries"])
    for stem, boundaries in entry.get("changes", []):
        factor, shift = (dump.tensors[f"{stem}.{part}"] for part in ("factor", "shift"))
        note_change(node, ValueChange(factor, shift, tuple(boundaries)))


def _fake(mode: FakeTensorMode, shape: Any, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    with mode:
        return torch.empty(shape, dtype=dtype, device=device)


def _input(mode: FakeTensorMode, entry: Mapping[str, Any], sizes: dict[str, torch.SymInt]) -> Any:
    if "value" not in entry:
        raise CheckpointError(f"input {entry['name']} has no shape")
    dtype, shape = entry["value"]
    return _fake(mode, [_open(mode, size, sizes) for size in shape], dtype_of_name(dtype), entry.get("device", "cpu"))


def _open(mode: FakeTensorMode, size: int | str, sizes: dict[str, torch.SymInt]) -> Any:
    if isinstance(size, int):
        return size
    match = _SIZE.fullmatch(size)
    if match is None:
        raise CheckpointError(f"the size {size!r} of an input cannot be read")
    times, name = match.groups()
    if name not in sizes:
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        sizes[name] = mode.from_tensor(torch.empty(2 + 3 * len(sizes)), symbolic_context=context).shape[0]  # type: ignore[assignment]
    return sizes[name] * int(times or 1)


def _refuse_large(node: fx.Node, values: Sequence[Any]) -> None:
    """Refuse arithmetic whose result would fill the memory: a graph computes sizes only."""
    if node.target in _FUNCTIONS.values() and node.target is not operator.getitem:
        for value in values:
            if isinstance(value, (str, list, tuple)) or (isinstance(value, int) and abs(value) >= 2**63):
                raise CheckpointError(f"node {node.name}: {_target_text(node)} of what is not a size")
        powers = values[1:] if node.target in (operator.pow, math.pow) else ()
        if any(isinstance(exponent, int) and exponent > 64 for exponent in powers):
            raise CheckpointError(f"node {node.name}: a power above 64")


def _infer(module: fx.GraphModule, mode: FakeTensorMode) -> None:
    """Compute the fake value of every node."""
    tensors = read_tensors(module)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = tensors[str(node.target)]
            same = isinstance(value, FakeTensor) and value.fake_mode is mode
            node.meta["val"] = value if same else mode.from_tensor(value, static_shapes=True)
        elif node.op == "call_function":
            values, named = map_arg((node.args, dict(node.kwargs)), lambda read: read.meta["val"])
            _refuse_large(node, values)
            try:
                with mode, torch.no_grad():
                    node.meta["val"] = node.target(*values, **named)
            except Exception as error:
                raise CheckpointError(
                    f"node {node.name}: {node.target} does not accept its arguments: {error}"
                ) from error
            prove(node)
