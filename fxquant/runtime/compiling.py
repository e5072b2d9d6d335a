"""Compiles a model in pieces: each distinct block once, for all blocks that compute the same.

Compiling a whole model takes time in proportion to its blocks, although the blocks are alike. Here the code of a block
is a function of the values and the tensors that it reads, and each distinct function is compiled once. What lies
between the blocks runs uncompiled.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.decorators import mark_unbacked, maybe_mark_dynamic
from torch._dynamo.exc import TorchDynamoException
from torch._prims_common import make_contiguous_strides_for

from fxquant.capture.graph import CapturedGraph
from fxquant.errors import ConfigurationError, SpeedWarning
from fxquant.pipeline.backend import Backend
from fxquant.runtime.caches.cacheable import refuse_compiling
from fxquant.runtime.caches.cutting import PART
from fxquant.runtime.moving import Place
from fxquant.runtime.pieces import Dims, Piece, pieces, repeated
from fxquant.runtime.torch_compile import CAN_MARK, keep_layouts, quantizes_convolutions

Code = Callable[..., tuple[Any, ...]]


class Compilable(nn.Module):
    """The part of a captured model that compiles it."""

    backend: Backend | None
    captured: list[CapturedGraph]
    _place: Place
    _pieces: InPieces | None = None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile in place, as :meth:`torch.nn.Module.compile` does, with the settings that the backend needs."""
        refuse_compiling(self)  # type: ignore[arg-type]
        super().compile(*args, **kwargs)
        compiled, backend = self._compiled_call_impl, self.backend
        assert compiled is not None
        if backend is not None:

            def call(*args: Any, **kwargs: Any) -> Any:
                with backend.settings():
                    return compiled(*args, **kwargs)

            self._compiled_call_impl = call

    def compile_repeated_blocks(self, *args: Any, dynamic: bool | None = None, **options: Any) -> None:
        """Compile each distinct block once, for all blocks that compute the same, as the method of diffusers does.

        It takes a fraction of the time of :meth:`compile`, and the compiled model is a little slower, because nothing
        is fused across the ends of blocks and what lies outside of blocks is not compiled. Blocks are compiled when
        they first run. If the model is offloaded, the tensors of a block are moved together when it runs.

        Args:
            *args: As for :func:`torch.compile`.
            dynamic: As for :func:`torch.compile`. With True, images and prompts of other sizes need no new compilation,
                if their graphs differ only in sizes that the inputs of the blocks have.
            **options: As for :func:`torch.compile`.

        Raises:
            ConfigurationError: If the model has no blocks that are alike.
            TypeError: If an argument is not one of ``torch.compile``.
        """
        given = inspect.signature(torch.compile).bind_partial(None, *args, dynamic=dynamic, **options).arguments
        chosen = {name: value for name, value in given.items() if name not in ("model", "dynamic")}
        made = InPieces(chosen, dynamic, self.backend)
        for captured in self.captured:
            made.plan(captured.module)
        if self.backend is not None:
            self.backend.compiling_blocks()
        self._pieces = made


@dataclass
class InPieces:
    """Runs the graphs of a model piece by piece, with compiled blocks.

    Attributes:
        options: Keyword arguments of ``torch.compile``, without ``dynamic``.
        dynamic: As for ``torch.compile``. With True, sizes of inputs are open from the first call on.
        backend: What the graphs were lowered for.
    """

    options: Mapping[str, Any]
    dynamic: bool | None
    backend: Backend | None
    _blocks: dict[Hashable, _Block] = field(default_factory=dict)
    _plans: dict[int, tuple[Any, _Plan]] = field(default_factory=dict)

    def copy(self, backend: Backend | None) -> InPieces:
        """The same settings for another model, which compiles its blocks itself."""
        return InPieces(self.options, self.dynamic, backend)

    def run(
        self, module: fx.GraphModule, inputs: Sequence[Tensor], moved: Callable[[Tensor], Tensor] = lambda it: it
    ) -> tuple[Any, ...]:
        """The outputs of a graph. ``moved`` brings the tensors of the model to the device of the inputs."""
        return self.plan(module).run(inputs, moved)

    def plan(self, module: fx.GraphModule) -> _Plan:
        """How a graph is run; made anew if the code of the graph changed.

        Raises:
            ConfigurationError: If no two blocks of the graph are alike.
        """
        kept = self._plans.get(id(module))
        if kept is None or kept[0] is not module._code:
            kept = self._plans[id(module)] = module._code, self._made(module)
        return kept[1]

    def forget_parts(self) -> None:
        """Forget how parts of graphs are run, which caches of steps made; the code of blocks is kept."""
        self._plans = {key: kept for key, kept in self._plans.items() if PART not in kept[1].module.meta}

    def _made(self, module: fx.GraphModule) -> _Plan:
        found = pieces(module, {} if self.backend is None else self.backend.with_tensors())
        if not repeated(found) and PART not in module.meta:
            raise ConfigurationError(
                "no two blocks of this model compute the same ops on tensors of the same shapes, so nothing is gained "
                "by compiling blocks; compile the whole model: model.compile()"
            )
        return _Plan(module, [(piece, self._code(piece)) for piece in found])

    def _code(self, piece: Piece) -> Code:
        if not piece.block:
            return _function(piece.graph())
        if piece.key not in self._blocks:
            self._blocks[piece.key] = _Block(piece, self.options, self.dynamic)
        return self._blocks[piece.key]


class _Plan:
    """The steps that compute a graph."""

    def __init__(self, module: fx.GraphModule, parts: Sequence[tuple[Piece, Code]]) -> None:
        self.module = module
        self._parts = parts
        self._inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._output = module.graph.output_node()
        last: dict[fx.Node, int] = {}
        for number, (piece, _) in enumerate(parts):
            last.update(dict.fromkeys((*piece.values, *(piece.nodes[i] for i in piece.outputs)), number))
        kept = set(self._output.all_input_nodes)
        self._freed: list[list[fx.Node]] = [[] for _ in parts]
        for node, number in last.items():
            if node not in kept:
                self._freed[number].append(node)
        self._numbers: dict[tuple[int, torch.device], list[Tensor]] = {}

    def run(self, inputs: Sequence[Tensor], moved: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
        values: dict[fx.Node, Any] = dict(zip(self._inputs, inputs, strict=True))
        for number, (piece, code) in enumerate(self._parts):
            tensors = [moved(self._tensor(target)) for target in piece.tensors]
            numbers = self._numbers_of(number, piece, tensors) if piece.numbers else ()
            made = code(None, *(values[node] for node in piece.values), *tensors, *numbers)
            del tensors
            values.update(zip((piece.nodes[i] for i in piece.outputs), made, strict=True))
            del made
            for node in self._freed[number]:
                del values[node]
        for node in self._output.all_input_nodes:
            if node.op == "get_attr":
                values[node] = moved(self._tensor(str(node.target)))
        leaves: Any = fx.node.map_arg(self._output.args[0], values.__getitem__)
        return tuple(leaves)

    def _tensor(self, target: str) -> Tensor:
        found: Tensor = operator.attrgetter(target)(self.module)
        return found

    def _numbers_of(self, step: int, piece: Piece, tensors: Sequence[Tensor]) -> list[Tensor]:
        device = tensors[0].device if tensors else torch.device("cpu")
        if (step, device) not in self._numbers:
            self._numbers[step, device] = [torch.tensor(number, device=device) for number in piece.numbers]
        return self._numbers[step, device]


class _Block:
    """Compiled code of a block, with open batch dimensions as :mod:`fxquant.runtime.torch_compile` opens them."""

    def __init__(self, piece: Piece, options: Mapping[str, Any], dynamic: bool | None) -> None:
        graph = piece.graph()
        self._dims: tuple[Dims | None, ...] = piece.dims
        self._tables = tuple(target in piece.tables for target in piece.tensors)
        self._dynamic = dynamic
        self._open = CAN_MARK and dynamic is not False and not quantizes_convolutions(graph)
        if self._open:
            keep_layouts(graph)
        self._name = piece.name
        self._masks: tuple[bool, ...] | None = None
        # With dynamic=True, torch would open the sizes of weights too.
        self._compiled = torch.compile(_function(graph), dynamic=None if self._open else dynamic, **options)

    def __call__(self, _: None, *given: Any) -> tuple[Any, ...]:
        # Compiled code is for one order in memory, and the first block may get another than the others.
        inputs = [*(_contiguous(value) for value in given[: len(self._dims)]), *given[len(self._dims) :]]
        trains = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        if not self._open or trains or not torch._dynamo.config.automatic_dynamic_shapes:
            made: tuple[Any, ...] = self._compiled(None, *inputs)
            return made
        try:
            made = self._compiled(None, *self._opened(inputs))
        except TorchDynamoException as error:
            warnings.warn(
                f"torch.compile cannot compile {self._name} for an open batch "
                f"({str(error).strip().splitlines()[0]}); it decides itself about batch sizes",
                SpeedWarning,
                stacklevel=2,
            )
            self._open = False
            made = self._compiled(None, *inputs)  # The marks are on aliases.
        return made

    def _opened(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs as aliases with marks, which would stay on the tensors of the caller and of the model."""
        values, tensors = len(self._dims), len(self._dims) + len(self._tables)
        if self._masks is None:  # Decided once: other marks would be another compilation.
            lengths = {size for value in inputs[:values] if isinstance(value, Tensor) for size in value.shape[:-1]}
            self._masks = tuple(_is_mask(value, lengths) for value in inputs[:values])
        marked = [self._marked(*each) for each in zip(inputs[:values], self._dims, self._masks, strict=True)]
        for tensor, table in zip(inputs[values:tensors], self._tables, strict=True):
            marked.append(tensor.data if table else tensor)
            if table:
                mark_unbacked(marked[-1], 0, hint_override=tensor.shape[0], min=1)
        return [*marked, *inputs[tensors:]]

    def _marked(self, value: Any, dims: Dims | None, mask: bool) -> Any:
        if dims is None or not isinstance(value, Tensor):
            return value
        alias = value.data
        for dim, size in enumerate(dims):
            if size is not None:
                mark_unbacked(alias, dim, hint_override=alias.shape[dim], shape_id=size, min=1)
            elif self._dynamic and (dim < len(dims) - 1 or mask):
                maybe_mark_dynamic(alias, dim)
        return alias


def _is_mask(value: Any, lengths: Collection[int]) -> bool:
    """Whether the last dimension is a length, as of a mask ``[batch, 1, prompt]``, and does not hold channels."""
    return isinstance(value, Tensor) and value.dim() > 1 and value.shape[-2] == 1 and value.shape[-1] in lengths


def _contiguous(value: Any) -> Any:
    """A value in the order of its sizes; an expanded value stays as it is, because it would take more memory.

    The stride of a dimension of size 1 is of no effect, but compiled code is checked for it.
    """
    if not isinstance(value, Tensor) or 0 in value.stride():
        return value
    value = value.contiguous()
    if value.stride() != make_contiguous_strides_for(value.shape):
        value = value.view(-1).view(value.shape)
    return value


def _function(graph: fx.Graph) -> Code:
    """A graph that reads no tensors of a module, as a function whose first argument is not used."""
    code: Code = type(fx.GraphModule({}, graph, class_name="Block")).forward
    return code
