"""Splits a graph into pieces: its blocks, and the ops between them. Blocks with equal code get equal keys.

The tensors that a piece reads are inputs of its code, like the values of earlier pieces. So the code of one block
serves every block that computes the same ops on tensors of the same shapes, and ``torch.compile`` compiles it once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.ir.tensors import get_tensor
from fxquant.reconstruction.segments import Segment, segments

_aten = torch.ops.aten
_RESHAPES = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.expand.default)
"""Ops of a tensor and sizes, of which some are sizes of the tensor."""
_CUTS = {_aten.slice.Tensor: (2, 3), _aten.split_with_sizes.default: (1,), _aten.narrow.default: (2, 3)}
"""Ops that cut a sequence, such as that of the prompt and the image, with the positions of the lengths."""
_SYMBOL = re.compile(r"\b[su]\d+\b")
_FRAGMENT = 0.5  # A part of a block with a smaller share of the ops of the largest block is not compiled.
_EARLY = 0.3  # Share of the ops of a block from which a value of it follows that is not the result of the block.
_SHARED = 0.75  # Share of the other blocks that read a value which is computed once for all blocks.

WithTensors = Mapping[Any, tuple[Any, tuple[int, ...]]]
"""Ops that take numbers, with the op that takes 0-d tensors instead and the positions of these arguments."""

Dims = tuple[str | None, ...]
"""For each dimension of a tensor its size as an expression of the batch size, or None if it is a number."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a graph, and what its code gets.

    Attributes:
        name: Module path of the block, or a name for what lies between blocks.
        nodes: The nodes that compute, in order.
        block: Whether it is a block that is worth compiling.
        values: The nodes of earlier pieces whose results it gets, one for each value input.
        dims: Open dimensions of the value inputs; None for inputs that are not tensors.
        tensors: Names of the tensors of the model that it gets.
        tables: Those of them that are tables with a row per group of timesteps; blocks differ in the number of rows.
        numbers: Numbers that it gets as 0-d tensors.
        outputs: Positions in ``nodes`` of the results that it returns.
        key: Equal for pieces that can share their code.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    block: bool
    values: tuple[fx.Node, ...] = ()
    dims: tuple[Dims | None, ...] = ()
    tensors: tuple[str, ...] = ()
    tables: frozenset[str] = frozenset()
    numbers: tuple[float, ...] = ()
    outputs: tuple[int, ...] = ()
    key: Hashable = None
    _arguments: Mapping[fx.Node, tuple[Any, Any, Any]] = field(default_factory=dict, repr=False)

    def graph(self) -> fx.Graph:
        """The code as a graph of its own: value inputs, tensors and numbers are placeholders, in this order."""
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        counts = {"v": len(self.values), "t": len(self.tensors), "n": len(self.numbers)}
        inputs = {(kind, i): graph.placeholder(f"{kind}{i}") for kind, count in counts.items() for i in range(count)}

        def filled(part: Any) -> Any:
            if isinstance(part, _Size):
                source = made[part.of] if isinstance(part.of, fx.Node) else inputs["v", part.of]
                return graph.call_function(torch.ops.aten.sym_size.int, (source, part.dim))
            if isinstance(part, _Input):
                return inputs[part.kind, part.number]
            return made[part] if isinstance(part, fx.Node) else part

        for node in self.nodes:
            target, args, kwargs = self._arguments[node]
            filled_args, filled_kwargs = (_mapped(part, filled) for part in (args, kwargs))
            made[node] = graph.create_node(node.op, target, filled_args, filled_kwargs, node.name, node.type)
        graph.output(tuple(made[self.nodes[position]] for position in self.outputs))
        return graph


@dataclass(frozen=True)
class _Input:
    """An argument that is an input of the piece: a value ``v``, a tensor ``t`` or a number ``n``."""

    kind: str
    number: int


@dataclass(frozen=True)
class _Size:
    """An argument that is the size of a dimension of a value input, by its number, or of a node of the piece."""

    of: int | fx.Node
    dim: int


def pieces(module: fx.GraphModule, with_tensors: WithTensors) -> list[Piece]:
    """The pieces of a graph, in the order in which they run.

    Args:
        module: The graph with its tensors.
        with_tensors: Ops whose numbers differ from block to block. Their numbers become inputs.
    """
    parts = [part for segment in _hoisted(segments(module.graph)) for part in segment]
    largest = max((len(nodes) for name, nodes in parts if _is_block(name)), default=0)
    made = []
    for name, nodes in parts:
        worth = _is_block(name) and len(nodes) >= _FRAGMENT * largest
        made.append(_piece(module, name, nodes, worth, with_tensors))
    wanted: dict[Hashable, set[int]] = {}
    for piece in made:
        wanted.setdefault(piece.key, set()).update(_read_outside(piece))
    return [_with_outputs(piece, tuple(sorted(wanted[piece.key]))) for piece in made]


def repeated(found: Iterable[Piece]) -> bool:
    """Whether any two blocks share their code."""
    return any(count > 1 for count in Counter(piece.key for piece in found if piece.block).values())


def _is_block(name: str) -> bool:
    return "." in name


def _hoisted(found: Sequence[Segment]) -> Iterable[list[tuple[str, tuple[fx.Node, ...]]]]:
    """The segments, without what the first block computes for most other blocks, which becomes a piece before it.

    The first block that needs an embedding of the timestep computes it in the captured graph, so without this the first
    block would differ from the others. Of two blocks, the second reads this and the result of the first. The result
    follows from most ops of the first.
    """
    owner = {node: _block(segment.name) for segment in found for node in segment.nodes}
    count = len({_block(segment.name) for segment in found if _is_block(segment.name)})
    least = max(2.0, _SHARED * (count - 1))
    weightless: set[fx.Node] = set()  # Follow from the inputs of the call alone.
    for node in owner:
        if all(source.op == "placeholder" or source in weightless for source in node.all_input_nodes):
            weightless.add(node)
    for segment in found:
        shared: set[fx.Node] = set()
        if _is_block(segment.name):
            own = set(segment.nodes)
            for node in reversed(segment.nodes):
                others = {owner[user] for user in node.users if user in owner} - {owner[node]}
                readers = len([name for name in others if _is_block(name)])
                early = node in weightless or (count == 2 and len(_sources(node, own)) <= _EARLY * len(own))
                if node in shared or readers >= (1 if early else least):
                    shared.update({node, *(source for source in node.all_input_nodes if source in own)})
        first = tuple(node for node in segment.nodes if node in shared)
        rest = tuple(node for node in segment.nodes if node not in shared)
        yield [part for part in (("shared", first), (segment.name, rest)) if part[1]]


def _sources(node: fx.Node, own: Container[fx.Node]) -> set[fx.Node]:
    """The nodes of a block that a node follows from, itself included."""
    found, stack = set[fx.Node](), [node]
    while stack:
        last = stack.pop()
        if last in own and last not in found:
            found.add(last)
            stack += last.all_input_nodes
    return found


def _block(name: str) -> str:
    return name.partition("@")[0]


def _read_outside(piece: Piece) -> set[int]:
    own = set(piece.nodes)
    return {i for i, node in enumerate(piece.nodes) if any(user not in own for user in node.users)}


def _with_outputs(piece: Piece, outputs: tuple[int, ...]) -> Piece:
    return replace(piece, outputs=outputs, key=(piece.key, outputs))


def _piece(
    module: fx.GraphModule, name: str, nodes: tuple[fx.Node, ...], block: bool, with_tensors: WithTensors
) -> Piece:
    """A piece, whose key describes its code and inputs; its outputs are decided later."""
    reader = _Reader(nodes, with_tensors)
    dims = tuple(_dims(value) for value in reader.values)
    key = (
        tuple(_code(node, reader) for node in nodes),
        tuple(_described(value, size) for value, size in zip(reader.values, dims, strict=True)),
        tuple(_tensor(get_tensor(module, target), target in reader.tables) for target in reader.tensors),
    )
    given = (tuple(reader.values), dims, tuple(reader.tensors), frozenset(reader.tables), tuple(reader.numbers))
    return Piece(name, nodes, block, *given, (), key, reader.arguments)


class _Reader:
    """Numbers the inputs of a piece in the order in which its nodes read them."""

    def __init__(self, nodes: tuple[fx.Node, ...], with_tensors: WithTensors) -> None:
        self.own = {node: position for position, node in enumerate(nodes)}
        self.values: list[fx.Node] = []
        self.tensors: list[str] = []
        self.tables: set[str] = set()
        self.numbers: list[float] = []
        self.arguments: dict[fx.Node, tuple[Any, Any, Any]] = {}
        self._first: dict[fx.Node, int] = {}
        read = [source for node in nodes for source in node.all_input_nodes if source not in self.own]
        # The first block may read a value and a contiguous copy of it. All values become contiguous anyway.
        self._same = {node.args[0]: node for node in read if node.target is torch.ops.aten.contiguous.default}
        read = [self._same.get(node, node) for node in read]
        self._sizes, self._lengths = _sizes_of(read), _lengths_of(read)
        for node in nodes:
            target, positions = with_tensors.get(node.target, (node.target, ()))
            args = tuple(self._number(arg) if i in positions else arg for i, arg in enumerate(self._sized(node)))
            self.arguments[node] = target, _mapped(args, self._input), _mapped(dict(node.kwargs), self._input)

    def _number(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return value
        self.numbers.append(value)
        return _Input("n", len(self.numbers) - 1)

    def _sized(self, node: fx.Node) -> Sequence[Any]:
        """The arguments of a node, with sizes of tensors in place of numbers that equal them.

        The numbers are sizes of this graph. A graph for another resolution has the same code then, and this graph
        serves no other sizes, so the code is right for it even where a number equals a size by chance.
        """
        if node.target in _RESHAPES and isinstance(node.args[0], fx.Node):
            source, given = node.args[0], node.args[1]
            sizes: list[Any] = list(given)  # type: ignore[arg-type]
            found = _kept_sizes(source, sizes)
            return (source, [self._size(source, found[i]) if i in found else size for i, size in enumerate(sizes)])
        if node.target in _CUTS:
            positions = _CUTS[node.target]
            return [_mapped(arg, self._length) if i in positions else arg for i, arg in enumerate(node.args)]
        return node.args

    def _length(self, number: Any) -> Any:
        if isinstance(number, int) and number in self._lengths:
            return self._size(*self._lengths[number])
        return number

    def _size(self, source: fx.Node, dim: int) -> _Size:
        if source in self.own:
            return _Size(source, dim)
        source = self._same.get(source, source)
        return _Size(self._first[source] if source in self._first else self._value(source), dim)

    def _input(self, node: Any) -> Any:
        if not isinstance(node, fx.Node) or node in self.own:
            return node
        node = self._same.get(node, node)
        if node.op == "get_attr":
            target = str(node.target)
            if target not in self.tensors:
                self.tensors.append(target)
                if all(_selects_rows(user, node) for user in node.users if user in self.own):
                    self.tables.add(target)
            return _Input("t", self.tensors.index(target))
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and _open(value) in self._sizes:
            return self._size(*self._sizes[_open(value)])
        return _Input("v", self._value(node))

    def _value(self, node: fx.Node) -> int:
        if node not in self._first or _is_by_reader(node):
            self.values.append(node)
            self._first.setdefault(node, len(self.values) - 1)
            return len(self.values) - 1
        return self._first[node]


def _sizes_of(read: Iterable[fx.Node]) -> dict[str, tuple[fx.Node, int]]:
    """By open size, an input and the dimension that has this size; activations come before other inputs."""
    found: dict[str, tuple[fx.Node, int]] = {}
    for node in sorted(dict.fromkeys(read), key=lambda node: node.op == "get_attr" or _is_by_reader(node)):
        for dim, size in enumerate(_dims(node) or ()):
            if size is not None:
                found.setdefault(size, (node, dim))
    return found


def _lengths_of(read: Iterable[fx.Node]) -> dict[int, tuple[fx.Node, int]]:
    """By a size that is a number, an activation and the dimension that has this size; the last one holds channels."""
    found: dict[int, tuple[fx.Node, int]] = {}
    for node in dict.fromkeys(read):
        for dim, size in list(_fixed(node).items())[:-1]:
            found.setdefault(size, (node, dim))
    return found


def _kept_sizes(source: fx.Node, sizes: Sequence[Any]) -> dict[int, int]:
    """Which sizes that a tensor is reshaped to are numbers that it has already: their positions, with its dimensions.

    The first and the last dimensions are kept up to one that is split or merged.
    """
    dims = _fixed(source)
    count = source.meta["val"].dim() if dims else 0
    found: dict[int, int] = {}
    for shift, order in ((0, range(len(sizes))), (count - len(sizes), reversed(range(len(sizes))))):
        for i in order:
            if isinstance(sizes[i], int):
                if dims.get(i + shift) != sizes[i]:
                    break
                found.setdefault(i, i + shift)
    return found


def _fixed(node: fx.Node) -> dict[int, int]:
    """The sizes of an activation that are numbers and larger than 1, by dimension."""
    value = node.meta.get("val")
    if node.op == "get_attr" or not isinstance(value, Tensor) or not value.is_floating_point():
        return {}
    return {dim: size for dim, size in enumerate(value.shape) if isinstance(size, int) and size > 1}


def _is_by_reader(node: fx.Node) -> bool:
    """Whether each reader gets the value by itself.

    Blocks differ in which of their layers share a bin of timesteps.
    """
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() <= 1 and not value.is_floating_point()


def _selects_rows(node: fx.Node, table: fx.Node) -> bool:
    return node.target is torch.ops.aten.index_select.default and node.args[:2] == (table, 0)


def _code(node: fx.Node, reader: _Reader) -> Hashable:
    target, args, kwargs = reader.arguments[node]
    return node.op, target, _hashable(args, reader.own), _hashable(kwargs, reader.own)


def _hashable(part: Any, own: Mapping[fx.Node, int]) -> Hashable:
    if isinstance(part, _Size) and isinstance(part.of, fx.Node):
        return "size", own[part.of], part.dim
    if isinstance(part, fx.Node):
        return "node", own[part]
    if isinstance(part, (list, tuple)):
        return tuple(_hashable(item, own) for item in part)
    if isinstance(part, Mapping):
        return tuple((name, _hashable(item, own)) for name, item in part.items())
    if isinstance(part, slice):
        return tuple(_hashable(item, own) for item in (part.start, part.stop, part.step))
    return type(part).__name__, repr(part)


def _mapped(part: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the leaves of arguments."""
    if isinstance(part, (list, tuple)):
        items = [_mapped(item, function) for item in part]
        return tuple(items) if isinstance(part, tuple) else items
    if isinstance(part, Mapping):
        return {name: _mapped(item, function) for name, item in part.items()}
    if isinstance(part, slice):
        return slice(*(_mapped(item, function) for item in (part.start, part.stop, part.step)))
    return function(part)


def _dims(node: fx.Node) -> Dims | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    sizes: list[Any] = [*value.shape]
    return tuple(_open(size) if isinstance(size, torch.SymInt) else None for size in sizes)


def _open(size: torch.SymInt) -> str:
    """A size as an expression of the batch size, under the same name in all graphs."""
    return _SYMBOL.sub("batch", str(size))


def _described(node: fx.Node, dims: Dims | None) -> Hashable:
    """What the code depends on: sizes are left out, because torch.compile checks them itself."""
    value = node.meta.get("val")
    return (value.dtype, dims) if isinstance(value, Tensor) else type(value).__name__


def _tensor(tensor: Tensor, table: bool) -> Hashable:
    return tensor.dtype, tensor.layout, tensor.device.type, tuple(tensor.shape[table:]), tensor.dim()
