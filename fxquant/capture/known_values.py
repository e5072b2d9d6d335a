"""What a model's code may do while it is traced that ``torch.export`` alone would lose or refuse.

Tracing runs the code on tensors without values. Code that asks for a value all the same, as
``lengths = mask.sum(1).tolist()`` does, can be followed where the value is known: it was made from sizes and constants,
or from an input whose value is given. The graph is then right for calls with that value of the input.
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
_MOST = 2**16  # Elements: lengths, masks and positions. What is larger decides nothing.
_READS = (
    *("item", "tolist", "numpy", "is_nonzero", "equal", "allclose"),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__"),
)
_TAKES_NUMBERS = (
    *("__getitem__", "__setitem__", "select", "narrow", "reshape", "view", "expand", "repeat", "tile", "split"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "repeat_interleave"),
)
_SELECTS = ("masked_select", "__getitem__")
_MAKES = ("zeros", "ones", "full", "arange", "linspace", "empty", "rand", "randn")
_RANDOM = ("rand", "normal", "bernoulli", "dropout", "empty", "multinomial")
_IN_PLACE = (
    *("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"),
    *("__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
)
_PRODUCTS = ("linear", "conv1d", "conv2d", "conv3d", "embedding")
_FAILURES = (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError)


_most_products: ContextVar[int | None] = ContextVar("fxquant_most_products", default=None)


@contextmanager
def at_most(layers: int) -> Iterator[None]:
    """Within it, the tracing of a model that runs far more than so many layers is stopped: it would take minutes.

    A model may run some parts that no output depends on, and of which a plan says nothing.

    Raises:
        CheckpointError: As soon as a model has run a quarter more, and some.
    """
    token = _most_products.set(layers + layers // 4 + 16)
    try:
        yield
    finally:
        _most_products.reset(token)


@dataclass(frozen=True)
class Known:
    """What a traced tensor holds.

    Attributes:
        value: The same tensor with its values, on the CPU. Views of it are views, as they are of the traced one.
        inputs: Names of the inputs that the values follow from.
    """

    value: Tensor
    inputs: frozenset[str]

    @property
    def memory(self) -> int:
        """Tells values apart that do not share memory."""
        return self.value.untyped_storage().data_ptr()


class Tracing(TorchFunctionMode):
    """Lets a model's code read the values of integer and boolean tensors that are known, and notes where they are from.

    It also reads ``tensor.data`` as ``tensor.detach()``, which shares memory likewise, but which tracing sees: what is
    written into ``.data`` would otherwise be lost from the graph, without a word.

    Attributes:
        read: Names of the inputs whose values the code has read; what was traced is right for these values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: set[str] = set()
        self._products = 0
        self._written: dict[int, frozenset[str]] = {}  # By memory, the inputs of what was written there.
        self._stale: set[int] = set()  # Memory that holds what is not known.

    @contextmanager
    def knowing(self, model: nn.Module, call: CallSpec, numbers: Mapping[str, float]) -> Iterator[None]:
        """Within it, calls of ``model`` are followed and know the values of some inputs.

        Args:
            model: The model that is traced.
            call: The inputs of the traced call; the values that it holds on to are known.
            numbers: Values of Python numbers among the inputs, by name; the code meets those as numbers.
        """
        values, numbers = call.held, {**numbers, **call.held_numbers}

        def enter(name: str, spec: Any, leaf: Any) -> Any:
            if not isinstance(spec, TensorSpec):
                return spec
            if name in values:
                setattr(leaf, _KNOWN, Known(values[name], frozenset([name])))
            return OpenNumber(leaf, numbers.get(name), lambda: self.read.add(name)) if spec.number else leaf

        def enter_all(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, call.mapped(kwargs, enter)

        self.read.clear()  # What an earlier trace of the same call has noted.
        self._written.clear()
        self._stale.clear()
        self._products = 0
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
            if isinstance(func, functools.partial):  # Made of several ops.
                return func(*args, **kwargs)
        if name in _PRODUCTS:
            self._count()
        if name in _READS:
            inputs = self._inputs(args, kwargs)
            if inputs is not None:
                self.read |= inputs
                return _on_values(func, args, kwargs)
        if name in _SELECTS and (selected := self._selected(name, func, args, kwargs)) is not None:
            return selected
        if name in _MAKES or name in _TAKES_NUMBERS:
            first = 0 if name in _MAKES else 1  # A method is called on the first one.
            args = (*args[:first], *pytree.tree_map(self._number, args[first:]))
            kwargs = pytree.tree_map(self._number, kwargs)
        result = func(*args, **kwargs)
        written = kwargs.get("out", args[0] if args and _writes(name) else None)
        if isinstance(written, Tensor) or any(map(is_followed, pytree.tree_leaves(result))):
            self._follow(func, args, kwargs, result, written)
        return result

    def _count(self) -> None:
        most = _most_products.get()
        self._products += 1
        if most is not None and self._products > most:
            raise CheckpointError(
                f"the model that is built for it runs more than {most} layers, far more than were quantized. It "
                "belongs to another model, or to another version of its class"
            )

    def _selected(self, name: str, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What a mask of known value selects, picked by positions: how much it is would be open otherwise."""
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

    def _places(self, part: Any, device: torch.device, shape: Any = None) -> list[Any]:
        """Positions that a mask of known value selects, one tensor an axis; anything else as it is."""
        if not _is_mask(part) or self._inputs(part) is None:
            return [part]
        self.read |= self._inputs(part) or frozenset()
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            value = _values(part) if shape is None else _values(part).expand(shape)
            places = [place.tolist() for place in value.nonzero(as_tuple=True)]
        return [torch.tensor(place, dtype=torch.int64, device=device) for place in places]

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any, written: Any) -> None:
        """Do the same with the values, where they are known."""
        inputs = self._inputs(args, kwargs)
        values: Any = None
        if any(word in getattr(func, "__name__", "") for word in _RANDOM):
            inputs = None
        if inputs is not None:
            try:
                values = _on_values(func, args, kwargs)
            except _FAILURES:  # An op that takes no tensors with values: what comes of it is not known.
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
        """The inputs that the values of these arguments follow from; None if a value is not known."""
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
        """A size or bound that is a tensor of known value as the number that it is."""
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
    """Call a function on what tensors hold, outside of tracing."""
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
    """Whether values of this are followed: those of integer and boolean tensors that are not large."""
    if not isinstance(leaf, Tensor) or leaf.is_floating_point() or leaf.is_complex():
        return False
    return all(isinstance(size, int) for size in leaf.shape) and leaf.numel() <= _MOST


def _is_mask(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype is torch.bool and leaf.dim() > 0


def _writes(name: str) -> bool:
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
