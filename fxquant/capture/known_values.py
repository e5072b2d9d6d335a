"""Lets a model's code do things during a trace that ``torch.export`` alone would lose or refuse.

Tracing runs the code on tensors without values. Some code still asks for a value, such as
``lengths = mask.sum(1).tolist()``. It can be traced if the value is known: the value was made from sizes and constants,
or from an input whose value is given. The graph is then valid for calls with that value of the input.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from fxquant.capture import open_numbers
from fxquant.capture.calls import CallSpec, TensorSpec
from fxquant.capture.open_numbers import OpenNumber
from fxquant.errors import CheckpointError

_KNOWN = "_fxquant_known"
_MOST = 2**16  # Elements of followed tensors: lengths, masks, positions. Code does not branch on larger ones.
_READS = (
    *("item", "tolist", "numpy", "is_nonzero", "equal", "allclose"),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__"),
)
_TAKES_NUMBERS = (
    *("__getitem__", "__setitem__", "select", "narrow", "reshape", "view", "expand", "repeat", "tile", "split"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "repeat_interleave"),
)
_SELECTS = ("masked_select", "__getitem__")
_COUNTS = ("nonzero", "argwhere", "unique", "unique_consecutive", "repeat_interleave")
_MAKES = ("zeros", "ones", "full", "arange", "linspace", "empty", "rand", "randn")
_RANDOM = ("rand", "normal", "bernoulli", "dropout", "empty", "multinomial")
_IN_PLACE = (
    *("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"),
    *("__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
)
_PRODUCTS = ("linear", "conv1d", "conv2d", "conv3d", "embedding")
_FAILURES = (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError)


_most_layers: ContextVar[int | None] = ContextVar("fxquant_most_layers", default=None)


@contextmanager
def at_most(layers: int) -> Iterator[None]:
    """Within this context, stop traces of models that run far more than ``layers`` layers: they would take minutes.

    A model may run some more layers, as parts that no output depends on are not in the plan. A layer counts once,
    however often it runs: some models call one per frame, or per sample of a list. Products with computed weights do
    not count: they are not layers of a plan.

    Raises:
        CheckpointError: As soon as a model runs more than ``layers + layers // 4 + 16`` layers.
    """
    token = _most_layers.set(layers + layers // 4 + 16)
    try:
        yield
    finally:
        _most_layers.reset(token)


@dataclass(frozen=True)
class Known:
    """What a traced tensor holds.

    Attributes:
        value: The same tensor with its values, on the CPU. A view of the traced tensor has a view of ``value``.
        inputs: Names of the inputs that the values depend on.
    """

    value: Tensor
    inputs: frozenset[str]

    @property
    def memory(self) -> int:
        """Identifies the memory of the value: values that share memory have the same number."""
        return self.value.untyped_storage().data_ptr()


class Tracing(TorchFunctionMode):
    """Lets a model's code read known values of integer and boolean tensors, and records which inputs they depend on.

    It also replaces ``tensor.data`` by ``tensor.detach()``. Both share the tensor's memory, but tracing sees only
    ``detach``. Writes into ``.data`` would otherwise be missing from the graph without any message.

    Attributes:
        read: Names of the inputs whose values the code has read. The trace is valid for these values only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: set[str] = set()
        self._layers: set[int] = set()  # Parameters that were weights of products so far, by their ids.
        self._written: dict[int, frozenset[str]] = {}  # By memory, the inputs of the values written there.
        self._stale: set[int] = set()  # Memory that holds values that are not known.

    @contextmanager
    def knowing(self, model: nn.Module, call: CallSpec, numbers: Mapping[str, float]) -> Iterator[None]:
        """Within this context, follow calls of ``model``, with the values of some inputs known.

        Args:
            model: The model that is traced.
            call: The inputs of the traced call. The values that this spec holds are known.
            numbers: Values of Python numbers among the inputs, by name. The code gets them as numbers.
        """
        values, numbers = call.known, {**numbers, **call.known_numbers}

        def enter(name: str, spec: Any, leaf: Any) -> Any:
            if not isinstance(spec, TensorSpec):
                return spec
            if name in values:
                setattr(leaf, _KNOWN, Known(values[name], frozenset([name])))
            return OpenNumber(leaf, numbers.get(name), lambda: self.read.add(name)) if spec.number else leaf

        def enter_all(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, call.mapped(kwargs, enter)

        self.read.clear()  # Recorded by an earlier trace of the same call.
        self._written.clear()
        self._stale.clear()
        self._layers.clear()
        handle = model.register_forward_pre_hook(enter_all, with_kwargs=True)
        try:
            with self:
                yield
        finally:
            handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        if open_numbers.are_among(pytree.tree_leaves((args, kwargs))):
            func, args, kwargs = open_numbers.call(func, args, kwargs)
            if isinstance(func, functools.partial):  # A replacement made of several ops.
                return func(*args, **kwargs)
        if name in _PRODUCTS:
            self._count(args[1] if len(args) > 1 else kwargs.get("weight"))
        if name in _READS:
            inputs = self._inputs(args, kwargs)
            if inputs is not None:
                self.read |= inputs
                return _on_values(func, args, kwargs)
        if name in _SELECTS and (selected := self._selected(name, func, args, kwargs)) is not None:
            return selected
        if name in _COUNTS and (counted := self._counted(name, func, args, kwargs)) is not None:
            return counted
        if name in _MAKES or name in _TAKES_NUMBERS:
            first = 0 if name in _MAKES else 1  # The first argument of a method is its tensor.
            args = (*args[:first], *pytree.tree_map(self._number, args[first:]))
            kwargs = pytree.tree_map(self._number, kwargs)
        result = func(*args, **kwargs)
        written = kwargs.get("out", args[0] if args and _writes(name) else None)
        if isinstance(written, Tensor) or any(map(is_followed, pytree.tree_leaves(result))):
            self._follow(func, args, kwargs, result, written)
        return result

    def _count(self, weight: Any) -> None:
        most = _most_layers.get()
        if isinstance(weight, nn.Parameter):
            self._layers.add(id(weight))
        if most is not None and len(self._layers) > most:
            raise CheckpointError(
                f"the model that was built runs more than {most} layers, far more than were quantized. The plan "
                "belongs to another model, or to another version of its class"
            )

    def _selected(self, name: str, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What a mask with known values selects, by positions: otherwise the number of elements would be unknown."""
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if not any(_is_mask(part) and self._inputs(part) is not None for part in index):
                return None
            return func(args[0], tuple(place for part in index for place in self._places(part, args[0].device)))
        source, mask = (*args, *kwargs.values())[:2] if len(args) + len(kwargs) == 2 else (None, None)
        if name != "masked_select" or not _is_mask(mask) or self._inputs(mask) is None:
            return None
        shape = torch.broadcast_shapes(source.shape, mask.shape)
        return source.expand(shape)[tuple(self._places(mask, source.device, shape))]

    def _counted(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an op whose size depends on known values: otherwise its size would be unknown."""
        if name == "repeat_interleave" and (len(args) + len(kwargs) > 1 or "repeats" in kwargs):
            return self._repeated(func, args, kwargs)
        inputs = self._inputs(args, kwargs)
        if inputs is None:
            return None
        self.read |= inputs
        device = next(leaf.device for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor))
        values = _on_values(func, args, kwargs)
        return pytree.tree_map_only(Tensor, lambda value: self._constant(value, device, inputs), values)

    def _repeated(self, func: Any, args: Any, kwargs: Any) -> Any:
        """``repeat_interleave`` with a known number of repetitions of each item, by the positions of the items."""
        source, repeats, dim = (*args, None, None)[:3]
        source, repeats, dim = (kwargs.get(*item) for item in (("input", source), ("repeats", repeats), ("dim", dim)))
        if not (isinstance(source, Tensor) and isinstance(repeats, Tensor) and repeats.numel() > 1):
            return None
        inputs = self._inputs(repeats)
        if inputs is None:
            return None
        self.read |= inputs
        places = _on_values(lambda counts: torch.arange(len(counts)).repeat_interleave(counts), (repeats,), {})
        flat = source.flatten() if dim is None else source
        result = flat.index_select(dim or 0, self._constant(places, source.device, inputs))
        if is_followed(result):
            self._follow(func, args, kwargs, result, None)
        return result

    def _constant(self, value: Tensor, device: torch.device, inputs: frozenset[str]) -> Tensor:
        """A tensor of the trace with known values."""
        made = torch.tensor(value.tolist(), dtype=value.dtype, device=device).reshape(value.shape)
        setattr(made, _KNOWN, Known(value, inputs))
        return made

    def _places(self, part: Any, device: torch.device, shape: Any = None) -> list[Any]:
        """Positions that a mask with known values selects, one tensor per axis. Any other index does not change."""
        if not _is_mask(part) or self._inputs(part) is None:
            return [part]
        self.read |= self._inputs(part) or frozenset()
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            value = _values(part) if shape is None else _values(part).expand(shape)
            places = [place.tolist() for place in value.nonzero(as_tuple=True)]
        return [torch.tensor(place, dtype=torch.int64, device=device) for place in places]

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any, written: Any) -> None:
        """Run the same op on the values, if they are known."""
        inputs = self._inputs(args, kwargs)
        values: Any = None
        if any(word in getattr(func, "__name__", "") for word in _RANDOM):
            inputs = None
        if inputs is not None:
            try:
                values = _on_values(func, args, kwargs)
            except _FAILURES:  # The op does not accept tensors with values: its result is not known.
                inputs = None
        if isinstance(written, Tensor) and (target := getattr(written, _KNOWN, None)) is not None:
            if inputs is None:
                self._stale.add(target.memory)
            else:
                self._written[target.memory] = self._written.get(target.memory, frozenset()) | inputs
        if inputs is not None:
            for leaf, value in zip(pytree.tree_leaves(result), pytree.tree_leaves(values), strict=True):
                if is_followed(leaf) and leaf is not written:
                    setattr(leaf, _KNOWN, Known(value, inputs))

    def _inputs(self, *arguments: Any) -> frozenset[str] | None:
        """The inputs that the values of these arguments depend on; None if a value is not known."""
        found: frozenset[str] = frozenset()
        for leaf in _leaves(arguments):
            if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                return None
            if isinstance(leaf, Tensor):
                known = self._known(leaf)
                if known is None:
                    return None
                found |= known.inputs | self._written.get(known.memory, frozenset())
        return found

    def _known(self, tensor: Tensor) -> Known | None:
        known: Known | None = getattr(tensor, _KNOWN, None)
        return known if known is not None and known.memory not in self._stale else None

    def _number(self, leaf: Any) -> Any:
        """Convert a size or bound that is a tensor with a known value to a number; return anything else unchanged."""
        if isinstance(leaf, slice):
            return slice(self._number(leaf.start), self._number(leaf.stop), self._number(leaf.step))
        if not isinstance(leaf, Tensor) or leaf.dim() or leaf.dtype is torch.bool or leaf.is_floating_point():
            return leaf
        inputs = self._inputs(leaf)
        if inputs is None:
            return leaf
        self.read |= inputs
        return int(_values(leaf))


def _on_values(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function on the known values of tensors, outside of tracing."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        return func(*pytree.tree_map(_values, args), **pytree.tree_map(_values, kwargs))


def _values(leaf: Any) -> Any:
    if isinstance(leaf, slice):
        return slice(_values(leaf.start), _values(leaf.stop), _values(leaf.step))
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return getattr(leaf, _KNOWN).value if isinstance(leaf, Tensor) else leaf


def _leaves(tree: Any) -> Iterator[Any]:
    for leaf in pytree.tree_leaves(tree):
        yield from (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (leaf,)


def is_followed(leaf: Any) -> bool:
    """Whether the values of a leaf are followed: only those of integer and boolean tensors that are not large."""
    if not isinstance(leaf, Tensor) or leaf.is_floating_point() or leaf.is_complex():
        return False
    return all(isinstance(size, int) for size in leaf.shape) and leaf.numel() <= _MOST


def _is_mask(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype is torch.bool and leaf.dim() > 0


def _writes(name: str) -> bool:
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
