"""How a model is called: one call, and the structure, shapes and dtypes of all calls like it, with the batch left open.

A :class:`Call` holds the inputs of one call. A :class:`CallSpec` describes the calls that a captured graph was traced
for. Later calls are compared with it. It serializes to JSON, so that a checkpoint can capture its graphs again from
shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxquant.capture import constants
from fxquant.errors import CheckpointError

BATCH = "batch"
"""Stands in a shape for the batch dimension of a call."""

TRACED_BATCH = 2
"""Batch size of calls that graphs are traced with: 0 and 1 are special to torch.export; others leave the batch open."""

Constant = Any
"""An input that is a constant of the graph: one of the kinds that :mod:`fxquant.capture.constants` writes to a file."""


@dataclass(frozen=True, eq=False)
class Call:
    """The inputs of one call, in a form that does not depend on how the call was written.

    Attributes:
        names: One readable name per leaf, such as ``hidden_states`` or ``added_cond_kwargs.resolution``.
        leaves: The leaves: tensors and plain constants.
        structure: The dict of the arguments, with the number of each leaf in its place.
    """

    names: tuple[str, ...]
    leaves: Sequence[Any]
    structure: Any

    @property
    def named(self) -> list[tuple[str, Any]]:
        """Name and leaf of each input."""
        return list(zip(self.names, self.leaves, strict=True))

    def leaf(self, name: str) -> Any:
        """The leaf of a name, which must exist."""
        return self.leaves[self.names.index(name)]

    @property
    def device(self) -> torch.device:
        """The device of the first tensor; the CPU if there is none."""
        return next((leaf.device for leaf in self.leaves if isinstance(leaf, torch.Tensor)), torch.device("cpu"))

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the call."""
        filled: dict[str, Any] = pytree.tree_map(lambda number: self.leaves[number], self.structure)
        return filled

    def with_leaves(self, leaves: Sequence[Any]) -> Call:
        """The same call with other leaves."""
        return replace(self, leaves=leaves)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor input.

    Attributes:
        shape: Its sizes; the batch dimension is :data:`BATCH`.
        dtype: Its dtype.
        values: Its elements, row by row, if the model's code branches on them; the graph is then valid only for these
            values. Otherwise None.
        number: Whether calls give a Python number, which the graph reads as a 0-d float64 or int64 tensor.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype
    values: tuple[float, ...] | None = None
    number: bool = False

    @classmethod
    def of_number(cls, number: float) -> TensorSpec:
        """The spec of an input that is a Python number of the same type."""
        return cls((), torch.float64 if isinstance(number, float) else torch.int64, number=True)

    def knowing(self, tensor: torch.Tensor | float) -> TensorSpec:
        """The same spec, valid only for the values of ``tensor``."""
        if not isinstance(tensor, torch.Tensor):
            return replace(self, values=(tensor,))
        values = tuple(int(value) for value in tensor.flatten().tolist())
        return replace(self, shape=tuple(tensor.shape), values=values)

    def concrete(self, batch: int) -> tuple[int, ...]:
        """The shape at one batch size."""
        return tuple(batch if isinstance(size, str) else size for size in self.shape)

    def fits(self, tensor: Any, batch: int, values: bool = True) -> bool:
        """Whether ``tensor`` has this dtype, this shape at that batch size, and, if asked, these values."""
        if self.number:  # The value of a Python number is always known, also within torch.compile.
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
        note = " of these values" if self.values is not None else ""
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]{note}"


@dataclass(frozen=True)
class CallSpec:
    """The inputs of one kind of call: leaf names, and for each leaf a tensor's spec or the constant itself.

    Attributes:
        names: One readable name per leaf, such as ``hidden_states`` or ``added_cond_kwargs.resolution``.
        leaves: One entry per leaf: a :class:`TensorSpec` or a Python constant.
        structure: The pytree structure that the leaves fill, as nested dicts, lists and tuples of leaf numbers.
        fixed: Why only one batch size is valid, or None if the batch size is open.
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
        """The inputs that are items of a list or tuple, each with the name of that list or tuple."""
        names = [self.names[number] for numbers in lists_of(self.structure) for number in numbers]
        return {name: name.rpartition(".")[0] for name in names}

    @property
    def numbers(self) -> list[str]:
        """Names of the inputs that are Python numbers in calls and tensors in the graph."""
        return [name for name, spec in self.tensors if spec.number]

    @property
    def known_numbers(self) -> dict[str, float]:
        """Values of the Python numbers that the model's code branches on, by name."""
        return {name: spec.values[0] for name, spec in self.tensors if spec.number and spec.values is not None}

    def inputs(self, leaves: Sequence[Any]) -> list[torch.Tensor]:
        """The tensors that the graph reads in a call with these leaves."""
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
    def known(self) -> dict[str, torch.Tensor]:
        """Values of the tensor inputs that the model's code branches on, by name."""
        return {
            name: torch.tensor(spec.values, dtype=spec.dtype).reshape(spec.concrete(1))
            for name, spec in self.tensors
            if spec.values is not None and not spec.number
        }

    def knowing(self, names: Iterable[str], leaves: Sequence[Any]) -> CallSpec:
        """The same spec, valid only for the values that these inputs have in the call with these leaves."""
        chosen = set(names)
        known = tuple(
            spec.knowing(leaf) if name in chosen and isinstance(spec, TensorSpec) else spec
            for name, spec, leaf in zip(self.names, self.leaves, leaves, strict=True)
        )
        return replace(self, leaves=known)

    def at_batch(self, batch: int, reason: str | None) -> CallSpec:
        """The same spec, valid only for this batch size, with the reason for it."""
        fixed = (
            replace(leaf, shape=leaf.concrete(batch)) if isinstance(leaf, TensorSpec) else leaf for leaf in self.leaves
        )
        return replace(self, leaves=tuple(fixed), fixed=reason)

    def with_constants(self, names: Iterable[str], leaves: Sequence[Any]) -> CallSpec:
        """The same spec, with these inputs as constants that have the values of these leaves, not as tensors."""
        chosen = set(names)
        given = zip(self.names, self.leaves, leaves, strict=True)
        return replace(self, leaves=tuple(leaf if name in chosen else spec for name, spec, leaf in given))

    def knowing_numbers(self, numbers: Mapping[str, float]) -> CallSpec:
        """The same spec, valid only for these values of Python numbers, given by name."""
        leaves = tuple(
            leaf.knowing(numbers[name]) if name in numbers and isinstance(leaf, TensorSpec) else leaf
            for name, leaf in zip(self.names, self.leaves, strict=True)
        )
        return replace(self, leaves=leaves)

    def batch_size(self, leaves: Sequence[Any]) -> int:
        """The batch size of a call with these leaves: the length of the first input that has a batch dimension."""
        for spec, leaf in zip(self.leaves, leaves, strict=True):
            if isinstance(spec, TensorSpec) and BATCH in spec.shape and isinstance(leaf, torch.Tensor):
                dim = spec.shape.index(BATCH)
                return leaf.shape[dim] if dim < leaf.dim() else -1
        return 0

    def with_lists_fixed(self, leaves: Sequence[Any], timestep: str | None) -> CallSpec:
        """The same spec, but inputs with one axis, except the timestep, have no batch dimension.

        Such an input may be a list whose length happens to equal the batch size.
        """
        fixed = tuple(
            TensorSpec(tuple(leaf.shape), spec.dtype)
            if isinstance(spec, TensorSpec) and len(spec.shape) == 1 and name != timestep
            else spec
            for name, spec, leaf in zip(self.names, self.leaves, leaves, strict=True)
        )
        return replace(self, leaves=fixed)

    def assert_known(self, leaves: Sequence[Any]) -> None:
        """Raise, also from within a compiled graph, unless the inputs have the values that this spec holds."""
        for name, spec, leaf in zip(self.names, self.leaves, leaves, strict=True):
            if isinstance(spec, TensorSpec) and spec.values is not None and not spec.number:
                known = torch.tensor(list(spec.values), dtype=leaf.dtype, device=leaf.device)
                torch._assert_async(
                    (leaf.flatten() == known).all(),
                    f"the compiled graph is right for one value of {name}, and this call has another; call the model "
                    "without torch.compile to capture a graph for each value, or compile after a call with this value",
                )

    def fits(self, call: Call, values: bool = True) -> bool:
        """Whether a call can run the graph that was captured for this spec.

        Args:
            call: The call. Its structure counts too: a list, a tuple and a dict can hold leaves of the same names, or
                no leaves.
            values: Whether the inputs must have the values that the spec holds.
        """
        if call.names != self.names or call.structure != self.structure:
            return False
        batch = self.batch_size(call.leaves)
        for spec, leaf in zip(self.leaves, call.leaves, strict=True):
            if not (spec.fits(leaf, batch, values) if isinstance(spec, TensorSpec) else is_same(leaf, spec)):
                return False
        return True

    def arguments(self, make: Callable[[str, TensorSpec], Any]) -> dict[str, Any]:
        """Keyword arguments of such a call, with each tensor made by ``make(name, spec)``."""
        values = [
            make(name, leaf) if isinstance(leaf, TensorSpec) else leaf
            for name, leaf in zip(self.names, self.leaves, strict=True)
        ]
        filled: dict[str, Any] = pytree.tree_map(lambda number: values[number], self.structure)
        return filled

    def mapped(
        self, arguments: Mapping[str, Any], change: Callable[[str, TensorSpec | Constant, Any], Any]
    ) -> dict[str, Any]:
        """Keyword arguments of such a call, with each leaf replaced by ``change(name, spec, leaf)``."""
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


def is_same(left: Any, right: Any) -> bool:
    """Whether two constants have the same type and are equal; NaN equals itself."""
    if isinstance(left, torch.Tensor) or type(left) is not type(right):
        return False
    return bool(left == right or (left != left and right != right))


def lists_of(structure: Any) -> list[Sequence[int]]:
    """The lists and tuples of leaves in a structure."""
    if not isinstance(structure, (dict, list, tuple)):
        return []
    inner = structure.values() if isinstance(structure, dict) else structure
    found = [numbers for part in inner for numbers in lists_of(part)]
    if not isinstance(structure, dict) and structure and all(isinstance(part, int) for part in structure):
        found.append(structure)
    return found


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
