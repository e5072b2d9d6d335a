"""Python numbers among a model's inputs, as the model's code gets them during a trace.

If a number is written into the graph, the graph is valid for this number only. So the graph gets a 0-d tensor, and the
code gets an :class:`OpenNumber`, which behaves like a number. What the code computes with it becomes ops of the graph.
If the code branches on it, compares it, counts with it or prints it, the code gets the value of this call, and the
dependence of the graph on this value is recorded.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_TAKE_TENSORS = {
    *("add", "add_", "sub", "sub_", "subtract", "mul", "mul_", "multiply", "div", "div_", "divide", "true_divide"),
    *("rsub", "rdiv", "rmul", "pow", "pow_", "gt", "ge", "lt", "le", "eq", "ne", "where", "clamp", "clamp_min"),
    *("clamp_max", "maximum", "minimum", "fill_", "masked_fill", "floor_divide", "remainder", "fmod"),
    *(
        f"__{p}{name}__"
        for name in ("add", "sub", "mul", "div", "truediv", "pow", "floordiv", "mod")
        for p in ("", "r", "i")
    ),
    *("__gt__", "__ge__", "__lt__", "__le__", "__eq__", "__ne__"),
}
"""Functions of torch that give the same result for a 0-d tensor as for a number."""
_FILLED = {"full": 1, "full_like": 1, "new_full": 2}
_SCALAR_ONLY = ("alpha", "value", "rounding_mode")


class UnknownNumberError(ValueError):
    """The code branches on a number that the graph must leave open."""


class OpenNumber:
    """A number that a graph leaves open. To ``isinstance`` it is a ``float`` or an ``int``.

    Args:
        tensor: Stands for the number in the graph: 0-d, float64 or int64.
        value: The number in the call that is traced; None if the graph must be valid for any number.
        read: Called when the value is read.
    """

    __slots__ = ("_read", "tensor", "value")
    __array_ufunc__ = None  # Otherwise numpy arrays would treat it as an object.

    def __init__(self, tensor: Tensor, value: Any, read: Callable[[], None]) -> None:
        self.tensor = tensor
        self.value = value
        self._read = read

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return float if self._is_float() else int

    def _is_float(self) -> bool:
        return self.tensor.is_floating_point()

    def read(self) -> Any:
        """The value of this call. From now on, the graph is valid for this value only.

        Raises:
            UnknownNumberError: If the graph must be valid for other values too.
        """
        if self.value is None:
            raise UnknownNumberError("the code branches on a number that is to be an input of the graph")
        self._read()
        return self.value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(self.__class__, name):
            raise AttributeError(f"{self.__class__.__name__!r} object has no attribute {name!r}")
        return getattr(self.read(), name)

    def _combined(self, op: Callable[[Any, Any], Any], other: Any, swapped: bool = False) -> Any:
        if isinstance(other, Tensor):
            return NotImplemented
        if type(other) is not OpenNumber and not isinstance(other, (int, float, torch.SymInt, torch.SymFloat)):
            return NotImplemented
        theirs = other.value if type(other) is OpenNumber else other
        if op is operator.pow and not (isinstance(other, float) or self._is_float()):
            return self._compared(lambda mine, power: op(power, mine) if swapped else op(mine, power), other)
        real = op is operator.truediv or isinstance(other, (float, torch.SymFloat)) or self._is_float()
        pair = [_operand(number, real) for number in (self, other)]
        values = [self.value, theirs]
        if swapped:
            pair.reverse()
            values.reverse()
        value = None if self.value is None or theirs is None else op(*values)
        if isinstance(value, complex):
            return self._compared(lambda mine, power: op(power, mine) if swapped else op(mine, power), other)
        return OpenNumber(op(*pair), value, functools.partial(_read_all, (self, other)))

    def _compared(self, op: Callable[[Any, Any], Any], other: Any) -> Any:
        if isinstance(other, Tensor):
            return NotImplemented
        return op(self.read(), other.read() if type(other) is OpenNumber else other)

    def __neg__(self) -> OpenNumber:
        return OpenNumber(-self.tensor, None if self.value is None else -self.value, self._read)

    def __pos__(self) -> OpenNumber:
        return self

    def __abs__(self) -> OpenNumber:
        return OpenNumber(self.tensor.abs(), None if self.value is None else abs(self.value), self._read)

    def __hash__(self) -> int:
        return hash(self.read())

    def __repr__(self) -> str:
        return "an open number" if self.value is None else repr(self.read())

    def __format__(self, spec: str) -> str:
        return format(self.read(), spec)

    def __index__(self) -> int:
        return operator.index(self.read())

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.read(), digits)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        return func(*pytree.tree_map(as_read, args), **pytree.tree_map(as_read, kwargs or {}))


def _read_all(numbers: tuple[Any, ...]) -> None:
    for number in numbers:
        if type(number) is OpenNumber:
            number.read()


def _operand(number: Any, real: bool) -> Any:
    if type(number) is not OpenNumber:
        return number
    return number.tensor.double() if real and not number.tensor.is_floating_point() else number.tensor


def _arithmetic(op: Callable[[Any, Any], Any], swapped: bool) -> Callable[[OpenNumber, Any], Any]:
    return lambda self, other: self._combined(op, other, swapped)


def _comparison(op: Callable[[Any, Any], Any]) -> Callable[[OpenNumber, Any], Any]:
    return lambda self, other: self._compared(op, other)


def _reading(function: Callable[[Any], Any]) -> Callable[[OpenNumber], Any]:
    return lambda self: function(self.read())


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(OpenNumber, f"__{_name}__", _arithmetic(getattr(operator, f"__{_name}__"), False))
    setattr(OpenNumber, f"__r{_name}__", _arithmetic(getattr(operator, f"__{_name}__"), True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(OpenNumber, f"__{_name}__", _comparison(getattr(operator, _name)))
_READINGS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "int": int,
    "bool": bool,
    "complex": complex,
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
}
for _name, _function in _READINGS.items():
    setattr(OpenNumber, f"__{_name}__", _reading(_function))


def as_read(leaf: Any) -> Any:
    """Replace an open number, also in a slice, by its value in this call; return anything else unchanged."""
    if isinstance(leaf, slice):
        return slice(as_read(leaf.start), as_read(leaf.stop), as_read(leaf.step))
    return leaf.read() if type(leaf) is OpenNumber else leaf


def are_among(leaves: list[Any]) -> bool:
    """Whether there is an open number among leaves."""
    return any(
        type(part) is OpenNumber
        for leaf in leaves
        for part in ((leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (leaf,))
    )


def call(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Replace the open numbers in a call of a torch function by tensors, or by their values in this call.

    Returns:
        The function, its arguments and its keyword arguments.
    """
    name = getattr(func, "__name__", "")
    if name in _FILLED and _only_at(args, kwargs, _FILLED[name]):
        return functools.partial(_filled, func, _FILLED[name]), args, dict(kwargs)
    if name in ("tensor", "as_tensor") and all(_is_scalar(leaf) for leaf in pytree.tree_leaves(args[0])):
        return functools.partial(_made, func), args, dict(kwargs)
    if name in _TAKE_TENSORS and not are_among([kwargs.get(key) for key in _SCALAR_ONLY]):
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        as_tensor = functools.partial(_beside, tensors)
        return func, pytree.tree_map(as_tensor, args), pytree.tree_map(as_tensor, dict(kwargs))
    return func, pytree.tree_map(as_read, args), pytree.tree_map(as_read, dict(kwargs))


def _beside(tensors: list[Tensor], leaf: Any) -> Any:
    """Convert an open number to a tensor that affects the dtype of the result as a number would."""
    if type(leaf) is not OpenNumber:
        return leaf
    if any(tensor.dim() and (tensor.is_floating_point() or tensor.is_complex()) for tensor in tensors):
        return leaf.tensor
    one = 1.0 if leaf._is_float() else 1
    dtypes = [torch.result_type(tensor, one) for tensor in tensors]
    return leaf.tensor.to(functools.reduce(torch.promote_types, dtypes)) if dtypes else leaf.tensor


def _only_at(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int) -> bool:
    """Whether the fill value is an open number, and the only one in the call."""
    value = args[position] if len(args) > position else kwargs.get("fill_value")
    others = [*args[:position], *args[position + 1 :], *(kwargs[key] for key in kwargs if key != "fill_value")]
    return type(value) is OpenNumber and not are_among(pytree.tree_leaves(others))


def _filled(func: Any, position: int, *args: Any, **kwargs: Any) -> Tensor:
    value = args[position] if len(args) > position else kwargs["fill_value"]
    zero = 0.0 if value._is_float() else 0
    if len(args) > position:
        made = func(*args[:position], zero, *args[position + 1 :], **kwargs)
    else:
        made = func(*args, **{**kwargs, "fill_value": zero})
    filled: Tensor = made + value.tensor.to(made.dtype)
    return filled


def _is_scalar(leaf: Any) -> bool:
    return type(leaf) is OpenNumber or isinstance(leaf, (bool, int, float))


def _made(func: Any, data: Any, **kwargs: Any) -> Tensor:
    """A tensor of numbers, some of which are open."""
    plain = pytree.tree_map(lambda leaf: (0.0 if leaf._is_float() else 0) if type(leaf) is OpenNumber else leaf, data)
    made = func(plain, **kwargs)
    parts = [
        leaf.tensor.to(made.device, made.dtype) if type(leaf) is OpenNumber else made.reshape(-1)[number]
        for number, leaf in enumerate(pytree.tree_leaves(data))
    ]
    return torch.stack(parts).reshape(made.shape)
