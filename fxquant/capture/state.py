"""Finds, replaces, restores and compares what a model keeps besides its parameters and buffers.

Such state is in attributes of modules, and in plain objects with attributes of their own.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree

from fxquant.ir.tensors import CONSTANT, weights_and_buffers

OWN = frozenset(vars(nn.Module()))
"""The attributes that torch keeps in every module."""

HOLLOW = "_fxquant_hollow"
"""Attribute that marks a tensor in place of one with unknown values, and a model with such tensors."""

_DEEP = 4  # Deepest level of nested objects that is examined.
_NO_STATE = (Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


def is_plain_object(value: Any) -> bool:
    """Whether a value has attributes and is not a module, tensor, container, class, function or Python module."""
    return hasattr(value, "__dict__") and not isinstance(value, (nn.Module, list, tuple, dict, set, *_NO_STATE))


def attributes(holder: Any) -> dict[str, Any]:
    """The attributes of a module or a plain object, without those that torch keeps in every module."""
    return {key: value for key, value in vars(holder).items() if not (isinstance(holder, nn.Module) and key in OWN)}


def plain_objects(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and plain objects that modules keep, such as an object that makes rotary tables.

    Such an object is an attribute, is in a list, tuple or dict that is an attribute, or is in an attribute of another
    such object.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        found = [(f"{path}.{key}", value, 0) for key, value in attributes(module).items()]
        while found:
            name, value, depth = found.pop()
            for number, leaf in enumerate(pytree.tree_leaves(value)):
                if not is_plain_object(leaf) or id(leaf) in seen or depth > _DEEP:
                    continue
                seen.add(id(leaf))
                here = name if leaf is value else f"{name}_{number}"
                yield here.removeprefix("."), leaf
                found += [(f"{here}.{key}", inner, depth + 1) for key, inner in attributes(leaf).items()]


def holders(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Everything in a model that has attributes: its modules and the plain objects that they keep, with their names."""
    yield from model.named_modules()
    yield from plain_objects(model)


def tensors_kept(holder: Any) -> Iterator[tuple[str, int | None, Tensor]]:
    """The tensors in attributes of a module or a plain object: name of the attribute, place in it, and tensor.

    The place is a number if the attribute is a list, tuple or dict, and None if the attribute is the tensor itself.
    """
    for key, value in attributes(holder).items():
        for number, leaf in enumerate(pytree.tree_leaves(value)):
            if isinstance(leaf, Tensor):
                yield key, None if leaf is value else number, leaf


def replace_tensors(holder: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Put ``change(tensor)`` in place of each tensor that :func:`tensors_kept` finds."""
    for key, value in attributes(holder).items():
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            vars(holder)[key] = pytree.tree_map_only(Tensor, change, value)


def detached(model: nn.Module) -> dict[int, Tensor]:
    """Detached copies of tensors that a model keeps and that gradients flow through, by id, as a memo of ``deepcopy``.

    ``deepcopy`` refuses such tensors. ``torch.nn.utils.weight_norm`` keeps the weight of its last call as such a
    tensor, and a table in a cache may be one too.
    """
    held = (value for part in _containers(model) for value in (part.values() if isinstance(part, dict) else part))
    return {id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf}


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """On exit, undo changes to attributes, lists and dicts of a model and of plain objects in it.

    A model that fills a cache in its first call would fill the cache with tensors of a trace, and the next call would
    read them.
    """
    containers = list(_containers(model))
    before = [list(held.items()) if isinstance(held, dict) else list(held) for held in containers]
    try:
        yield
    finally:
        for held, was in zip(containers, before, strict=True):
            now = list(held.items()) if isinstance(held, dict) else list(held)
            if not _is_same(now, was):
                held.clear()
                held.update(was) if isinstance(held, dict) else held.extend(was)


def _containers(model: nn.Module) -> Iterator[Any]:
    """Every dict and list that a model holds, including the dicts of attributes."""
    found: list[Any] = [model]
    seen: set[int] = set()
    while found:
        value = found.pop()
        if id(value) in seen or isinstance(value, (str, bytes, int, float, *_NO_STATE)) or value is None:
            continue
        seen.add(id(value))
        if isinstance(value, (dict, list)):
            yield value
            found += value.values() if isinstance(value, dict) else value
        elif isinstance(value, (tuple, set, frozenset)):
            found += value
        elif hasattr(value, "__dict__"):
            found.append(vars(value))


def _is_same(now: list[Any], was: list[Any]) -> bool:
    def parts(items: list[Any]) -> list[int]:
        return [id(part) for item in items for part in (item if isinstance(item, tuple) else (item,))]

    return parts(now) == parts(was)


def frozen(value: Any, depth: int = 0) -> Any:
    """A snapshot of a value to compare with. Later changes of the attribute do not affect the snapshot."""
    if isinstance(value, Tensor):
        return value if isinstance(value, nn.Parameter) else value.detach().clone()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy()) if value.dtype.kind in "biuf" else _Same(value)
    if isinstance(value, nn.Module) or depth > _DEEP:
        return _Same(value)
    if isinstance(value, Mapping):
        return {key: frozen(leaf, depth + 1) for key, leaf in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [type(value).__name__, *(frozen(leaf, depth + 1) for leaf in value)]
    if isinstance(value, (int, float, complex, str, bytes, type(None))):
        return value
    if type(value).__module__ != "builtins" and isinstance(getattr(value, "__dict__", None), dict):
        return [_Same(type(value)), frozen(vars(value), depth + 1)]  # For example, an attention processor.
    return _Same(value)


class _Same:
    """Equal to another instance that holds the same object, or an equal object that cannot change, such as a device."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or type(other.value) is not type(self.value):
            return False
        return other.value is self.value or (type(self.value).__hash__ is not None and other.value == self.value)

    __hash__ = None  # type: ignore[assignment]


def is_equal(left: Any, right: Any) -> bool:
    """Whether two results of :func:`frozen` are equal. Tensors must be equal to the bit; NaN equals NaN."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        alike = (left.shape, left.dtype, left.device) == (right.shape, right.dtype, right.device)
        return left is right or (
            alike and bool(torch.eq(left, right).logical_or(left.ne(left) & right.ne(right)).all())
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(is_equal(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(is_equal, left, right))
    return bool(left == right)


def replace_kept_tensors(model: nn.Module, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Put ``change(name, tensor)`` in place of each tensor that :func:`kept_tensors` finds."""
    made: dict[int, torch.Tensor] = {}
    for name, tensor in kept_tensors(model):
        if id(tensor) not in made:  # A tensor that several attributes hold stays one tensor.
            made[id(tensor)] = change(name, tensor)
            if hasattr(tensor, HOLLOW):
                setattr(made[id(tensor)], HOLLOW, True)
    for _, holder in holders(model):
        replace_tensors(holder, lambda tensor: made.get(id(tensor), tensor))


def kept_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The tensors that modules and plain objects keep in attributes, lists and dicts, with a name for each.

    Tensors that are also parameters or buffers are left out. If an attribute of a module is a tensor, its name is the
    one under which ``torch.export`` reads it.
    """
    owned = {id(tensor) for _, tensor in weights_and_buffers(model)}
    found = []
    for path, module in model.named_modules():
        for key, number, tensor in tensors_kept(module):
            found.append((f"{path}.{key}" if number is None else f"{path}.{key}_{number}", tensor))
    for path, kept_object in plain_objects(model):
        for key, number, tensor in tensors_kept(kept_object):
            found.append((f"{path}.{CONSTANT}{key}_{number or 0}", tensor))
    return [(name.removeprefix("."), tensor) for name, tensor in found if id(tensor) not in owned]


def hollow_out(model: nn.Module) -> None:
    """Replace fake tensors in attributes of modules and plain objects by zeros: torch.export accepts none there."""

    def hollow(_: str, tensor: torch.Tensor) -> torch.Tensor:
        if not is_fake(tensor):
            return tensor
        zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
        setattr(zeros, HOLLOW, True)
        return zeros

    replace_kept_tensors(model, hollow)
    setattr(model, HOLLOW, True)


def cast(skeleton: nn.Module, dtype: torch.dtype, others: Mapping[str, torch.dtype]) -> None:
    """Give a skeleton the dtypes of the model that was compiled, whatever dtypes its class makes."""
    replace_kept_tensors(
        skeleton, lambda name, kept: kept.to(others.get(name, kept.dtype)) if kept.is_floating_point() else kept
    )
    made: dict[int, Tensor] = {}
    for name, tensor in weights_and_buffers(skeleton):
        wanted = others.get(name, dtype)
        if not tensor.is_floating_point() or tensor.dtype == wanted:
            continue
        path, _, leaf = name.rpartition(".")
        owner = skeleton.get_submodule(path)
        if id(tensor) not in made:  # A tensor that has several names stays one tensor.
            new = tensor.detach().to(wanted)
            made[id(tensor)] = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
        (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = made[id(tensor)]  # type: ignore[assignment]
