"""Describes the arguments of a call as a :class:`~fxquant.capture.calls.CallSpec`, however the call was written.

Also finds what differs between a call and a spec, and warns if many graphs differ only in constants and numbers.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxquant.capture import constants
from fxquant.capture.calls import BATCH, Call, CallSpec, TensorSpec, is_same, lists_of
from fxquant.errors import CaptureError, SpeedWarning


def canonical_call(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], timestep: str | None
) -> Call:
    """Bring a call into one form, however it was written.

    Positional and keyword arguments are bound to the signature, and defaults are filled in. A timestep given as a
    Python number becomes a tensor: a number would be a constant of the graph, and every step would need its own graph.

    Raises:
        TypeError: As Python raises it, if the arguments do not fit the signature.
        CaptureError: If an input is neither a tensor nor a plain constant, is in a container that is not a dict, list
            or tuple, or has the name of another input.
    """
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            if value:
                raise CaptureError(
                    f"the model takes *{name}; give these inputs by keyword so that they can be told apart"
                )
        elif kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    number = constants.plain(arguments.get(timestep)) if timestep is not None else None
    if timestep is not None and isinstance(number, (int, float)) and not isinstance(number, bool):
        arguments[timestep] = torch.tensor(number, dtype=torch.float32 if isinstance(number, float) else torch.int64)
    flat, spec = pytree.tree_flatten_with_path(arguments)
    names = tuple(_readable(path) for path, _ in flat)
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise CaptureError(f"two inputs are called {twice!r}; a key of a dict among the inputs holds a dot: rename it")
    leaves = [leaf if isinstance(leaf, torch.Tensor) else constants.plain(leaf) for _, leaf in flat]
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, torch.Tensor) and not constants.is_constant(leaf):
            raise CaptureError(
                f"input {name!r} is a {type(leaf).__name__}; only tensors, numbers, strings, booleans, None, dtypes, "
                "devices, sizes and UUIDs, in dicts, lists and tuples, can be captured, as a file can store these. "
                f"{constants.advice(leaf)}"
            )
    structure = pytree.tree_unflatten(list(range(len(leaves))), spec)
    for name, part in structure.items():
        _check_containers(name, part)
    return Call(names, leaves, structure)


def _check_containers(name: str, structure: Any) -> None:
    """Refuse containers that a file cannot distinguish from plain ones. The model may treat them differently.

    Raises:
        CaptureError: Names the input.
    """
    if isinstance(structure, int):
        return
    if type(structure) not in (dict, OrderedDict, list, tuple):
        plain = "tuple" if isinstance(structure, tuple) else "list" if isinstance(structure, Sequence) else "dict"
        raise CaptureError(
            f"input {name!r} is a {type(structure).__name__}; only plain dicts, lists and tuples can be captured, "
            f"because a file cannot distinguish other containers from them. Give a plain {plain}"
        )
    if isinstance(structure, dict) and not all(isinstance(key, str) for key in structure):
        key = next(key for key in structure if not isinstance(key, str))
        raise CaptureError(
            f"input {name!r} has the key {key!r} ({type(key).__name__}), which a file would store as a string; give "
            "it keys that are strings, or a list"
        )
    for key, part in structure.items() if isinstance(structure, dict) else enumerate(structure):
        _check_containers(f"{name}.{key}", part)


def describe_call(call: Call, timestep: str | None = None, changing: Collection[str] = ()) -> CallSpec:
    """The spec of a call. A leading dimension is the batch if it equals that of the first tensor of rank 2 or more.

    There is no batch if that tensor is an item of a list with as many items as there are timesteps. Each item is then
    one sample without a batch axis, as the code of Wan and Z-Image takes it. Python floats are left open, and so are
    integers whose names are in ``changing``. Other integers are constants, as they usually count or name things.
    """
    first = next((i for i, leaf in enumerate(call.leaves) if isinstance(leaf, torch.Tensor) and leaf.dim() >= 2), None)
    batch = None if first is None else call.leaves[first].shape[0]
    step = call.leaf(timestep) if timestep is not None and timestep in call.names else None
    samples = len(step) if isinstance(step, torch.Tensor) and step.dim() == 1 else batch
    if samples != batch and any(first in numbers and len(numbers) == samples for numbers in lists_of(call.structure)):
        batch = None
    specs = tuple(
        TensorSpec(_open_batch(tuple(leaf.shape), batch), leaf.dtype)
        if isinstance(leaf, torch.Tensor)
        else TensorSpec.of_number(leaf)
        if type(leaf) is float or (type(leaf) is int and name in changing)
        else leaf
        for name, leaf in call.named
    )
    return CallSpec(call.names, specs, call.structure)


def changed_leaves(call: Call, other: CallSpec) -> list[str] | None:
    """Names of the constants and numbers that differ between a call and a spec; None if anything else differs."""
    if call.names != other.names:
        return None
    batch, found = other.batch_size(call.leaves), []
    for name, spec, leaf in zip(call.names, other.leaves, call.leaves, strict=True):
        if isinstance(spec, TensorSpec) and not spec.number:
            if not spec.fits(leaf, batch, values=False):
                return None
        elif not (spec.fits(leaf, batch) if isinstance(spec, TensorSpec) else is_same(leaf, spec)):
            if isinstance(leaf, torch.Tensor):
                return None
            found.append(name)
    return found


_MANY = 8  # Warn at this many graphs for calls that differ only in constants and numbers.


def warn_of_many(call: Call, specs: Sequence[CallSpec]) -> None:
    """Warn, once, if a call's graph is one of many that differ only in constants and numbers.

    Args:
        call: The call.
        specs: Specs of the calls that the graphs serve, including the spec of this call.
    """
    differences = [changed for spec in specs if (changed := changed_leaves(call, spec)) is not None]
    changing = {name for changed in differences for name in changed}
    if sum(map(bool, differences)) != _MANY - 1:
        return
    shown = ", ".join(f"{name}={leaf!r}" for name, leaf in call.named if name in changing)
    warnings.warn(
        f"{_MANY} graphs were captured for calls that differ in constants alone, the last for {shown}. Each graph "
        "takes the time of a capture. If the model computes with what changes, give it as a tensor. If the model "
        "ignores it, leave it out. Otherwise use the same values in several calls.",
        SpeedWarning,
        stacklevel=5,
    )


def _open_batch(shape: tuple[int, ...], batch: int | None) -> tuple[int | str, ...]:
    return (BATCH, *shape[1:]) if shape and shape[0] == batch else shape


def _readable(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
