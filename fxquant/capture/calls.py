"""How a model is called: the inputs' structure, shapes and dtypes, with the batch left open.

A :class:`CallSpec` is what a captured graph was traced for and what a later call is compared with. It serializes to
JSON, so that a checkpoint can capture its graphs anew from shapes alone.
"""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxquant.capture import constants
from fxquant.errors import CaptureError, CheckpointError, SpeedWarning

BATCH = "batch"
"""Stands in a shape for the batch dimension of a call."""

Constant = Any
"""What a graph is captured for as it is: one of the kinds that :mod:`fxquant.capture.constants` writes to a file."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor input.

    Attributes:
        shape: Its sizes; the batch dimension reads :data:`BATCH`.
        dtype: Its dtype.
        values: Its elements, row by row, if the model's code branches on them, so that a graph is right for these
            alone; otherwise None.
        number: Whether calls give a Python number, a float64 or int64 one, which the graph reads as a 0-d tensor.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype
    values: tuple[float, ...] | None = None
    number: bool = False

    @classmethod
    def of_number(cls, number: float) -> TensorSpec:
        """The spec of inputs that are numbers like this one."""
        return cls((), torch.float64 if isinstance(number, float) else torch.int64, number=True)

    def holding(self, tensor: torch.Tensor | float) -> TensorSpec:
        """The spec of calls in which this input holds what ``tensor`` does."""
        if not isinstance(tensor, torch.Tensor):
            return replace(self, values=(tensor,))
        values = tuple(int(value) for value in tensor.flatten().tolist())
        return replace(self, shape=tuple(tensor.shape), values=values)

    def concrete(self, batch: int) -> tuple[int, ...]:
        """The shape at one batch size."""
        return tuple(batch if isinstance(size, str) else size for size in self.shape)

    def fits(self, tensor: Any, batch: int, values: bool = True) -> bool:
        """Whether ``tensor`` has this dtype, this shape at that batch size, and, if asked, these values."""
        if self.number:  # What a number is, is known at once, also within torch.compile.
            if type(tensor) is not (float if self.dtype.is_floating_point else int):
                return False
            return self.values is None or is_same(tensor, self.values[0])
        if not isinstance(tensor, torch.Tensor):
            return False
        if tensor.dtype != self.dtype or tuple(tensor.shape) != self.concrete(batch):
            return False
        return not values or self.values is None or tensor.flatten().tolist() == list(self.values)

    def __str__(self) -> str:
        if self.number:
            return "any number" if self.values is None else f"{self.values[0]}"
        held = " of these values" if self.values is not None else ""
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]{held}"


@dataclass(frozen=True)
class CallSpec:
    """The inputs of one kind of call: leaf names, and for each leaf a tensor's spec or the constant itself.

    Attributes:
        names: One readable name a leaf, such as ``hidden_states`` or ``added_cond_kwargs.resolution``.
        leaves: One entry a leaf: a :class:`TensorSpec` or a Python constant.
        structure: The pytree structure that the leaves fill, as nested dicts, lists and tuples of leaf numbers.
        fixed: Why the batch size is that of one call alone, or None where it is open.
    """

    names: tuple[str, ...]
    leaves: tuple[TensorSpec | Constant, ...]
    structure: Any
    fixed: str | None = field(default=None, compare=False)

    @property
    def tensors(self) -> list[tuple[str, TensorSpec]]:
        """Name and spec of each tensor input, in the order of the graph's placeholders."""
        return [(n, leaf) for n, leaf in zip(self.names, self.leaves, strict=True) if isinstance(leaf, TensorSpec)]

    @property
    def items(self) -> dict[str, str]:
        """The inputs that are items of a list or tuple, with the name of that."""
        names = [self.names[number] for numbers in _lists(self.structure) for number in numbers]
        return {name: name.rpartition(".")[0] for name in names}

    @property
    def numbers(self) -> list[str]:
        """Names of the inputs that are Python numbers to calls, and tensors to the graph."""
        return [name for name, spec in self.tensors if spec.number]

    @property
    def held_numbers(self) -> dict[str, float]:
        """Those of these numbers by which the model's code decides, and what they are."""
        return {name: spec.values[0] for name, spec in self.tensors if spec.number and spec.values is not None}

    def inputs(self, leaves: Sequence[Any]) -> list[torch.Tensor]:
        """The tensors that a graph for such calls reads, from the leaves of one of them."""
        return [
            torch.tensor(leaf, dtype=spec.dtype) if spec.number else leaf
            for spec, leaf in zip(self.leaves, leaves, strict=True)
            if isinstance(spec, TensorSpec)
        ]

    @property
    def batched(self) -> bool:
        """Whether any input has an open batch dimension."""
        return any(BATCH in spec.shape for _, spec in self.tensors)

    @property
    def held(self) -> dict[str, torch.Tensor]:
        """The tensor inputs of which the values matter, with these, by name."""
        return {
            name: torch.tensor(spec.values, dtype=spec.dtype).reshape(spec.concrete(1))
            for name, spec in self.tensors
            if spec.values is not None and not spec.number
        }

    def holding(self, names: Iterable[str], leaves: Sequence[Any]) -> CallSpec:
        """The spec of calls in which these inputs hold what they hold in the call with these leaves."""
        chosen = set(names)
        held = tuple(
            spec.holding(leaf) if name in chosen and isinstance(spec, TensorSpec) else spec
            for name, spec, leaf in zip(self.names, self.leaves, leaves, strict=True)
        )
        return replace(self, leaves=held)

    def at_batch(self, batch: int, reason: str | None) -> CallSpec:
        """The spec of calls of this batch size alone, for this reason."""
        fixed = (
            replace(leaf, shape=leaf.concrete(batch)) if isinstance(leaf, TensorSpec) else leaf for leaf in self.leaves
        )
        return replace(self, leaves=tuple(fixed), fixed=reason)

    def with_constants(self, names: Iterable[str], leaves: Sequence[Any]) -> CallSpec:
        """The spec of calls in which these inputs are what they are in the call with these leaves, and no tensors."""
        chosen = set(names)
        given = zip(self.names, self.leaves, leaves, strict=True)
        return replace(self, leaves=tuple(leaf if name in chosen else spec for name, spec, leaf in given))

    def holding_numbers(self, numbers: Mapping[str, float]) -> CallSpec:
        """The spec of calls in which these inputs are these numbers."""
        held = tuple(
            leaf.holding(numbers[name]) if name in numbers and isinstance(leaf, TensorSpec) else leaf
            for name, leaf in zip(self.names, self.leaves, strict=True)
        )
        return replace(self, leaves=held)

    def batch_size(self, leaves: Sequence[Any]) -> int:
        """The batch size of a call with these leaves: the length of the first input that has a batch dimension."""
        for spec, leaf in zip(self.leaves, leaves, strict=True):
            if isinstance(spec, TensorSpec) and BATCH in spec.shape and isinstance(leaf, torch.Tensor):
                dim = spec.shape.index(BATCH)
                return leaf.shape[dim] if dim < leaf.dim() else -1
        return 0

    def with_lists_fixed(self, leaves: Sequence[Any], timestep: str | None) -> CallSpec:
        """The same spec, but that an input of one axis is no batch: it may be a list that happens to be as long."""
        fixed = tuple(
            TensorSpec(tuple(leaf.shape), spec.dtype)
            if isinstance(spec, TensorSpec) and len(spec.shape) == 1 and name != timestep
            else spec
            for name, spec, leaf in zip(self.names, self.leaves, leaves, strict=True)
        )
        return replace(self, leaves=fixed)

    def assert_held(self, leaves: Sequence[Any]) -> None:
        """Raise, also from within a compiled graph, unless the inputs have the values that this spec holds on to."""
        for name, spec, leaf in zip(self.names, self.leaves, leaves, strict=True):
            if isinstance(spec, TensorSpec) and spec.values is not None and not spec.number:
                held = torch.tensor(list(spec.values), dtype=leaf.dtype, device=leaf.device)
                torch._assert_async(
                    (leaf.flatten() == held).all(),
                    f"the compiled graph is right for one value of {name}, and this call has another; call the model "
                    "without torch.compile, which captures a graph for each, or compile one after such a call",
                )

    def fits(self, names: tuple[str, ...], leaves: Sequence[Any], structure: Any, values: bool = True) -> bool:
        """Whether a call with these leaves can run the graph that was captured for this spec.

        Args:
            names: Names of the leaves.
            leaves: The leaves.
            structure: What holds their numbers. A list, a tuple and a dict can hold leaves of the same names, or none.
            values: Whether inputs whose values the spec holds on to are to have these.
        """
        if names != self.names or structure != self.structure:
            return False
        batch = self.batch_size(leaves)
        for spec, leaf in zip(self.leaves, leaves, strict=True):
            if not (spec.fits(leaf, batch, values) if isinstance(spec, TensorSpec) else is_same(leaf, spec)):
                return False
        return True

    def arguments(self, make: Callable[[str, TensorSpec], Any]) -> dict[str, Any]:
        """Keyword arguments of this kind, each tensor made by ``make(name, spec)``."""
        values = [
            make(name, leaf) if isinstance(leaf, TensorSpec) else leaf
            for name, leaf in zip(self.names, self.leaves, strict=True)
        ]
        filled: dict[str, Any] = pytree.tree_map(lambda number: values[number], self.structure)
        return filled

    def mapped(
        self, arguments: Mapping[str, Any], change: Callable[[str, TensorSpec | Constant, Any], Any]
    ) -> dict[str, Any]:
        """Keyword arguments of this kind, each leaf replaced by ``change(name, spec, leaf)``."""
        changed = dict(arguments)
        for key in self.structure.keys() & arguments.keys():
            numbers, tree = pytree.tree_flatten(self.structure[key])
            leaves = zip(numbers, pytree.tree_leaves(arguments[key]), strict=True)
            new = [change(self.names[number], self.leaves[number], leaf) for number, leaf in leaves]
            changed[key] = pytree.tree_unflatten(new, tree)
        return changed

    def __str__(self) -> str:
        shown = [f"{name}: {leaf}" for name, leaf in zip(self.names, self.leaves, strict=True)]
        return "(" + ", ".join(shown) + ")"

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values; :meth:`from_json` reads them back."""
        leaves = [
            {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
            | ({} if leaf.values is None else {"values": list(leaf.values)})
            | ({"number": True} if leaf.number else {})
            if isinstance(leaf, TensorSpec)
            else {"constant": constants.to_json(leaf)}
            for leaf in self.leaves
        ]
        fixed = {} if self.fixed is None else {"fixed": self.fixed}
        return {"names": list(self.names), "leaves": leaves, "structure": _encode(self.structure), **fixed}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CallSpec:
        """Read a spec back.

        Raises:
            CheckpointError: If the data is not what :meth:`to_json` writes.
        """
        try:
            leaves = tuple(
                constants.from_json(leaf["constant"])
                if "constant" in leaf
                else TensorSpec(
                    tuple(leaf["shape"]),
                    getattr(torch, leaf["dtype"]),
                    tuple(leaf["values"]) if "values" in leaf else None,
                    bool(leaf.get("number", False)),
                )
                for leaf in data["leaves"]
            )
            return cls(tuple(data["names"]), leaves, _decode(data["structure"]), data.get("fixed"))
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the recorded call of the model cannot be read: {error!r}") from error


def canonical_call(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], timestep: str | None
) -> tuple[tuple[str, ...], list[Any], Any]:
    """Bring a call into one form, however it was written.

    Positional and keyword arguments are bound to the signature and defaults filled in. A timestep given as a Python
    number becomes a tensor, for a number would be baked into the graph and every step would need a graph of its own.

    Returns:
        Leaf names, leaf values and the structure that holds the leaf numbers.

    Raises:
        TypeError: As Python's own, if the arguments do not fit the signature.
        CaptureError: If an input is neither a tensor nor a plain constant, or stands in containers that are neither
            dicts, lists nor tuples.
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
    leaves = [leaf if isinstance(leaf, torch.Tensor) else constants.plain(leaf) for _, leaf in flat]
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, torch.Tensor) and not constants.is_constant(leaf):
            raise CaptureError(
                f"input {name!r} is a {type(leaf).__name__}; only tensors, numbers, strings, booleans, None, dtypes, "
                "devices, sizes and UUIDs, in dicts, lists and tuples, can be captured, for a file can tell what these "
                f"are. {constants.advice(leaf)}"
            )
    structure = pytree.tree_unflatten(list(range(len(leaves))), spec)
    for name, part in structure.items():
        _check_containers(name, part)
    return names, leaves, structure


def _check_containers(name: str, structure: Any) -> None:
    """Refuse containers that a file could not tell from plain ones, and that the model may treat in another way.

    Raises:
        CaptureError: Says which input it is.
    """
    if isinstance(structure, int):
        return
    if type(structure) not in (dict, OrderedDict, list, tuple):
        plain = "tuple" if isinstance(structure, tuple) else "list" if isinstance(structure, Sequence) else "dict"
        raise CaptureError(
            f"input {name!r} is a {type(structure).__name__}; only plain dicts, lists and tuples can be captured, for "
            f"a file cannot tell others from them. Give a plain {plain}"
        )
    if isinstance(structure, dict) and not all(isinstance(key, str) for key in structure):
        key = next(key for key in structure if not isinstance(key, str))
        raise CaptureError(
            f"input {name!r} has the key {key!r} ({type(key).__name__}), of which a file makes a string; give it keys "
            "that are strings, or a list"
        )
    for key, part in structure.items() if isinstance(structure, dict) else enumerate(structure):
        _check_containers(f"{name}.{key}", part)


def describe_call(
    names: tuple[str, ...],
    leaves: Sequence[Any],
    structure: Any,
    timestep: str | None = None,
    changing: Collection[str] = (),
) -> CallSpec:
    """The spec of a call: a leading dimension equal to that of the first tensor of rank 2 or more is the batch.

    There is none if that tensor is one of a list with as many items as there are timesteps: a sample without an axis
    for the batch, such as Wan's and Z-Image's own code take. Python floats are left open, and so are the integers of
    the names in ``changing``; others count or name things as a rule.
    """
    first = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.dim() >= 2), None)
    batch = None if first is None else leaves[first].shape[0]
    step = leaves[names.index(timestep)] if timestep in names else None
    samples = len(step) if isinstance(step, torch.Tensor) and step.dim() == 1 else batch
    if samples != batch and any(first in numbers and len(numbers) == samples for numbers in _lists(structure)):
        batch = None
    specs = tuple(
        TensorSpec(_open_batch(tuple(leaf.shape), batch), leaf.dtype)
        if isinstance(leaf, torch.Tensor)
        else TensorSpec.of_number(leaf)
        if type(leaf) is float or (type(leaf) is int and name in changing)
        else leaf
        for name, leaf in zip(names, leaves, strict=True)
    )
    return CallSpec(names, specs, structure)


def is_same(left: Any, right: Any) -> bool:
    """Whether two constants are of one type and equal; NaN equals itself."""
    if isinstance(left, torch.Tensor) or type(left) is not type(right):
        return False
    return bool(left == right or (left != left and right != right))


def changed_leaves(names: tuple[str, ...], leaves: Sequence[Any], call: CallSpec) -> list[str] | None:
    """Which constants and numbers of a call are others than those of a kind of call; None if more than that differs."""
    if names != call.names:
        return None
    batch, found = call.batch_size(leaves), []
    for name, spec, leaf in zip(names, call.leaves, leaves, strict=True):
        if isinstance(spec, TensorSpec) and not spec.number:
            if not spec.fits(leaf, batch, values=False):
                return None
        elif not (spec.fits(leaf, batch) if isinstance(spec, TensorSpec) else is_same(leaf, spec)):
            if isinstance(leaf, torch.Tensor):
                return None
            found.append(name)
    return found


_MANY = 8  # Graphs for calls that differ in constants and numbers alone, at which somebody should be told.


def warn_of_many(names: tuple[str, ...], leaves: Sequence[Any], calls: Sequence[CallSpec]) -> None:
    """Warn, once, if a call's graph is one of many that differ in constants and numbers alone.

    Args:
        names: Names of the leaves of the call.
        leaves: The leaves.
        calls: What the graphs serve, that of this call among them.
    """
    differences = [changed for call in calls if (changed := changed_leaves(names, leaves, call)) is not None]
    changing = {name for changed in differences for name in changed}
    if sum(map(bool, differences)) != _MANY - 1:
        return
    shown = ", ".join(f"{name}={leaf!r}" for name, leaf in zip(names, leaves, strict=True) if name in changing)
    warnings.warn(
        f"{_MANY} graphs were captured for calls that differ in constants alone, the last for {shown}. Each takes the "
        "time of a capture. Give what changes as a tensor, if the model computes with it; leave it out, if the model "
        "ignores it; or let calls share values.",
        SpeedWarning,
        stacklevel=5,
    )


def _lists(structure: Any) -> list[Sequence[int]]:
    """The lists and tuples of leaves in a structure."""
    if not isinstance(structure, (dict, list, tuple)):
        return []
    inner = structure.values() if isinstance(structure, dict) else structure
    found = [numbers for part in inner for numbers in _lists(part)]
    if not isinstance(structure, dict) and structure and all(isinstance(part, int) for part in structure):
        found.append(structure)
    return found


def _open_batch(shape: tuple[int, ...], batch: int | None) -> tuple[int | str, ...]:
    return (BATCH, *shape[1:]) if shape and shape[0] == batch else shape


def _readable(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def _encode(structure: Any) -> Any:
    if isinstance(structure, dict):
        return {"dict": {key: _encode(value) for key, value in structure.items()}}
    if isinstance(structure, (list, tuple)):
        return {type(structure).__name__: [_encode(value) for value in structure]}
    return structure


def _decode(data: Any) -> Any:
    if isinstance(data, int):
        return data
    if "dict" in data:
        return {key: _decode(value) for key, value in data["dict"].items()}
    kind = "list" if "list" in data else "tuple"
    values = [_decode(value) for value in data[kind]]
    return values if kind == "list" else tuple(values)
