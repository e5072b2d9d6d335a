"""Replaces in-place writes of a graph by ops that make new tensors, which later readers read instead.

``ExportedProgram.run_decompositions`` does this for every op, but it traces the graph twice more, which takes longer
than the capture itself. One walk over the graph rewrites the few forms that transformers use, such as
``out[..., 0::2] = x`` in rotary embeddings. The rest is left to ``run_decompositions``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_arg

from fxquant.capture.borders import unmark
from fxquant.errors import CaptureError
from fxquant.ir.arguments import source_of
from fxquant.ir.proofs import prove_trace

aten = torch.ops.aten

_SCATTERS = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}
"""Ops that view a part, and the op that puts a new part into the whole. Their arguments after the tensors are equal."""
_SAME = ("aten::to", "aten::detach", "aten::contiguous", "aten::alias", "aten::lift_fresh", "aten::dropout")
"""Ops that may return their input tensor itself."""
_VIEWS = (
    "slice",
    "select",
    "view",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "expand",
    "unbind",
    "split",
    "chunk",
)
_FRESH = "aten::lift_fresh_copy"  # Its result shares memory with its input only during a trace.
_INHERITED = ("nn_module_stack", "stack_trace")


def writes(node: fx.Node) -> bool:
    """Whether an op writes into a value in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def without_writes(program: torch.export.ExportedProgram, model: str) -> fx.GraphModule:
    """The graph of a program without in-place writes: every op is a function of its inputs.

    Args:
        program: What ``torch.export`` traced.
        model: The name of the model's class, for messages.

    Raises:
        CaptureError: If the model writes in a way that cannot be traced, or into its inputs or buffers.
    """
    exported = program.module(check_guards=False)
    assert isinstance(exported, fx.GraphModule)
    if not any(map(writes, program.graph.nodes)):
        prove_trace(exported.graph)
    else:
        refuse_shared_lists(exported.graph)
        regions = any(isinstance(node.target, HigherOrderOperator) for node in program.graph.nodes)
        if regions or not functionalize(exported.graph, _fake_mode(program.graph)):
            try:
                program = program.run_decompositions({})
            except RuntimeError as error:  # It writes into a tensor that the model keeps as an attribute.
                raise CaptureError(
                    f"{model} writes into a tensor in a way that cannot be traced ({str(error).splitlines()[0]}); let "
                    "it work on a copy, and keep no state between calls"
                ) from error
            exported = program.module(check_guards=False)
            unmark(exported.graph.nodes)
        if program.graph_signature.user_inputs_to_mutate or program.graph_signature.buffers_to_mutate:
            raise CaptureError(f"{model} writes into its inputs or buffers in place; let it work on a copy")
    assert isinstance(exported, fx.GraphModule)
    return exported


def _fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode of the fake values of a graph."""
    values = (node.meta.get("val") for node in graph.nodes)
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def functionalize(graph: fx.Graph, mode: FakeTensorMode) -> bool:
    """Replace all in-place writes of a graph. Return False, with the graph partly changed, if one has another form.

    A write into a part of a tensor, ``copy_(slice(x), y)``, becomes ``x' = slice_scatter(x, copy(slice(x), y))``.
    Later readers of ``x`` or of a view of ``x`` read ``x'`` or the same view of ``x'``.

    Args:
        graph: A graph as ``torch.export`` traces it. Its fake values share memory where the values of the model do.
        mode: The mode of the fake values.
    """
    return _Walk(graph, mode).run()


def refuse_shared_lists(graph: fx.Graph) -> None:
    """Refuse ops that write into a list of tensors, one after the other, if an earlier write affects a later one.

    Two of the tensors may share memory (``torch._foreach_mul_([y, y], 2)``), or a tensor may be read after it was
    written (``torch._foreach_copy_([x, y], [y, x])``). PyTorch replaces such writes as if all happened at once.

    Raises:
        CaptureError: Names the op and the module that calls it.
    """
    for node in filter(writes, graph.nodes):
        lists = [
            ([_memory(part) if isinstance(part, fx.Node) else None for part in value], argument.is_write)
            for value, argument in zip(node.args, node.target._schema.arguments, strict=False)
            if isinstance(value, (list, tuple))
        ]
        written = [memory for memories, is_write in lists if is_write for memory in memories]
        read = [pair for memories, is_write in lists if not is_write for pair in enumerate(memories)]
        if len(set(written)) < len(written):
            what = "writes into a list of tensors where two share memory"
        elif any(memory in written[:number] for number, memory in read if memory is not None):
            what = "reads a tensor of a list after it has written into it"
        else:
            continue
        path = next((path for path, _ in reversed((node.meta.get("nn_module_stack") or {}).values()) if path), "")
        raise CaptureError(
            f"{_name(node)} in {path or 'the model'} {what}, which tracing would get wrong; write into the tensors one "
            "after the other, in a loop"
        )


class _Walk:
    """One walk over a graph.

    Attributes:
        source: For each view, the value that it is a view of in the model's code.
        made_from: For each view, the node that it reads in place of its source.
        now: For each value whose memory is written into, the node that holds it, and the number of writes up to then.
        written: Number of writes so far, for each value that owns such memory.
    """

    def __init__(self, graph: fx.Graph, mode: FakeTensorMode) -> None:
        self.graph = graph
        self.mode = mode
        self.source: dict[fx.Node, fx.Node] = {}
        self.made_from: dict[fx.Node, fx.Node] = {}
        self.now: dict[fx.Node, tuple[fx.Node, int]] = {}
        self.written: dict[fx.Node, int] = {}

    def run(self) -> bool:
        lost: list[fx.Node] = []  # Views whose source their fake values do not show, and their inputs.
        for node in list(self.graph.nodes):
            if writes(node):
                if not node.target._schema.arguments[0].is_write or not isinstance(node.args[0], fx.Node):
                    return False  # It writes into an out= argument, or into a list of tensors (torch._foreach_add_).
                node.replace_all_uses_with(source_of(node))  # It returns the tensor that it writes into.
                if _name(node) == "aten::detach_":
                    self.graph.erase_node(node)
            elif node.op == "call_function" and (memory := _memory(node)) is not None and _name(node) != _FRESH:
                source = next((other for other in node.all_input_nodes if _memory(other) == memory), None)
                if source is not None:
                    self.source[node] = source
                elif _name(node).removeprefix("aten::").startswith(_VIEWS):
                    lost += [node, *node.all_input_nodes]
        every = [node for node in self.graph.nodes if writes(node)]
        if not all(map(self._can_write, every)):
            return False
        self.written = {self._owner(source_of(node)): 0 for node in every}
        if any(self._owner(node) in self.written for node in lost):
            return False
        unmark(node for node in self.graph.nodes if self._owner(node) in self.written)
        for node in list(self.graph.nodes):
            self._visit(node)
        return True

    def _owner(self, node: fx.Node) -> fx.Node:
        while node in self.source:
            node = self.source[node]
        return node

    def _can_write(self, node: fx.Node) -> bool:
        """Whether the op has a form that does not write, and each view up to the owner can be put into its source."""
        part = source_of(node)
        while part in self.source:
            if part.target not in _SCATTERS and not _is_same(part):
                return False
            part = self.source[part]
        return part.op == "call_function" and _functional(node) is not None

    def _visit(self, node: fx.Node) -> None:
        source, target = self.source.get(node), node.args[0] if node.args else None
        with self.graph.inserting_before(node):
            current = {other: self._current(other) for other in node.all_input_nodes}
        node.args = map_arg(node.args, lambda other: current[other])
        node.kwargs = map_arg(node.kwargs, lambda other: current[other])
        if writes(node):
            with self.graph.inserting_before(node):
                self._write(node, target)  # type: ignore[arg-type]
            self.graph.erase_node(node)
        elif (owner := self._owner(node)) in self.written:
            self.now[node] = node, self.written[owner]
            if source is not None:
                self.made_from[node] = current[source]

    def _write(self, node: fx.Node, target: fx.Node) -> None:
        """Write into ``target``, a value of the model's code, and into every value that ``target`` is a part of."""
        owner, old = self._owner(target), source_of(node)
        self.written[owner] += 1
        new = self._call(_functional(node), node.args, node.kwargs, node)
        if new.meta["val"].dtype != old.meta["val"].dtype:
            new = self._call(aten.to.dtype, (new, old.meta["val"].dtype), {}, node)
        self.now[target] = new, self.written[owner]
        while target in self.source:
            whole = self.source[target]
            if target.target in _SCATTERS:
                stands = self.now[whole][0]
                new = self._call(_SCATTERS[target.target], (stands, new, *target.args[1:]), target.kwargs, node)
            self.now[whole] = new, self.written[owner]
            target = whole

    def _current(self, node: fx.Node) -> fx.Node:
        """The node that holds the current value. A view is made again if its memory was written into since."""
        if node not in self.now:
            return node
        held, version = self.now[node]
        latest = self.written[self._owner(node)]
        if version != latest:
            source = self._current(self.source[node])
            old = self.made_from[node]
            args, kwargs = map_arg((node.args, node.kwargs), lambda other: source if other is old else other)
            held = self._call(node.target, args, kwargs, node)
            self.now[node] = held, latest
        return held

    def _call(self, target: Any, args: Any, kwargs: Any, origin: fx.Node) -> fx.Node:
        node = self.graph.call_function(target, args, dict(kwargs))
        values, named = map_arg((node.args, dict(node.kwargs)), lambda other: other.meta["val"])
        with self.mode, torch.no_grad():
            node.meta["val"] = target(*values, **named)
        node.meta |= {key: origin.meta[key] for key in _INHERITED if key in origin.meta}
        return node


def _functional(node: fx.Node) -> Any:
    """The same op without the write: ``copy`` for ``copy_``; None if the op has no such form."""
    op = node.target
    assert isinstance(op, torch._ops.OpOverload)
    packet = getattr(aten, _name(node).removeprefix("aten::").removesuffix("_"), None)
    if packet is None or op._overloadname not in packet.overloads() or torch.Tag.inplace_view in op.tags:
        return None
    found = getattr(packet, op._overloadname)
    takes, took = ([a.name for a in schema.arguments] for schema in (found._schema, op._schema))
    return found if takes == took and not found._schema.is_mutable and len(found._schema.returns) == 1 else None


def _is_same(node: fx.Node) -> bool:
    return _name(node).startswith(_SAME)


def _name(node: fx.Node) -> str:
    return str(getattr(getattr(node.target, "_schema", None), "name", ""))


def _memory(node: fx.Node) -> int | None:
    """Identifies the memory of a value. The first item of a tuple or list stands for all items."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    while isinstance(first, Tensor) and is_batchedtensor(first):  # Made within torch.vmap.
        first = get_unwrapped(first)
    return first.untyped_storage()._cdata if isinstance(first, Tensor) else None
