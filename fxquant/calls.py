"""How a model is called: the inputs' structure, shapes and dtypes, with the batch left open.

A :class:`CallSpec` is what a captured graph was traced for and what a later call is compared with. It serializes to
JSON, so that a checkpoint can capture its graphs anew from shapes alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxquant.errors import CaptureError, CheckpointError

BATCH = "batch"
"""Stands in a shape for the batch dimension of a call."""

Constant = None | bool | int | float | str


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor input.

    Attributes:
        shape: Its sizes; the batch dimension reads :data:`BATCH`.
        dtype: Its dtype.
        values: Its elements, row by row, if the model's code branches on them, so that a graph is right for these
            alone; otherwise None.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype
    values: tuple[int, ...] | None = None

    def holding(self, tensor: torch.Tensor) -> TensorSpec:
        """The spec of calls in which this input holds what ``tensor`` does."""
        values = tuple(int(value) for value in tensor.flatten().tolist())
        return TensorSpec(tuple(tensor.shape), self.dtype, values)

    def concrete(self, batch: int) -> tuple[int, ...]:
        """The shape at one batch size."""
        return tuple(batch if isinstance(size, str) else size for size in self.shape)

    def fits(self, tensor: torch.Tensor, batch: int, values: bool = True) -> bool:
        """Whether ``tensor`` has this dtype, this shape at that batch size, and, if asked, these values."""
        if tensor.dtype != self.dtype or tuple(tensor.shape) != self.concrete(batch):
            return False
        return not values or self.values is None or tensor.flatten().tolist() == list(self.values)

    def __str__(self) -> str:
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
    def batched(self) -> bool:
        """Whether any input has an open batch dimension."""
        return any(BATCH in spec.shape for _, spec in self.tensors)

    @property
    def held(self) -> dict[str, torch.Tensor]:
        """The inputs of which the values matter, with these, by name."""
        return {
            name: torch.tensor(spec.values, dtype=spec.dtype).reshape(spec.concrete(1))
            for name, spec in self.tensors
            if spec.values is not None
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
            TensorSpec(leaf.concrete(batch), leaf.dtype, leaf.values) if isinstance(leaf, TensorSpec) else leaf
            for leaf in self.leaves
        )
        return replace(self, leaves=tuple(fixed), fixed=reason)

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
            if isinstance(spec, TensorSpec) and spec.values is not None:
                held = torch.tensor(list(spec.values), dtype=leaf.dtype, device=leaf.device)
                torch._assert_async(
                    (leaf.flatten() == held).all(),
                    f"the compiled graph is right for one value of {name}, and this call has another; call the model "
                    "without torch.compile, which captures a graph for each, or compile one after such a call",
                )

    def fits(self, names: tuple[str, ...], leaves: Sequence[Any], values: bool = True) -> bool:
        """Whether a call with these leaves can run the graph that was captured for this spec.

        Args:
            names: Names of the leaves.
            leaves: The leaves.
            values: Whether inputs whose values the spec holds on to are to have these.
        """
        if names != self.names:
            return False
        batch = self.batch_size(leaves)
        for spec, leaf in zip(self.leaves, leaves, strict=True):
            if isinstance(spec, TensorSpec):
                if not (isinstance(leaf, torch.Tensor) and spec.fits(leaf, batch, values)):
                    return False
            elif isinstance(leaf, torch.Tensor) or type(leaf) is not type(spec) or leaf != spec:
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

    def tensors_in(self, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors among keyword arguments of this kind, by the names of their leaves."""
        found = {}
        for key in self.structure.keys() & arguments.keys():
            numbers, leaves = pytree.tree_leaves(self.structure[key]), pytree.tree_leaves(arguments[key])
            for number, leaf in zip(numbers, leaves, strict=True):
                if isinstance(leaf, torch.Tensor):
                    found[self.names[number]] = leaf
        return found

    def __str__(self) -> str:
        shown = [f"{name}: {leaf}" for name, leaf in zip(self.names, self.leaves, strict=True)]
        return "(" + ", ".join(shown) + ")"

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values; :meth:`from_json` reads them back."""
        leaves = [
            {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
            | ({} if leaf.values is None else {"values": list(leaf.values)})
            if isinstance(leaf, TensorSpec)
            else {"constant": leaf}
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
                leaf["constant"]
                if "constant" in leaf
                else TensorSpec(
                    tuple(leaf["shape"]),
                    getattr(torch, leaf["dtype"]),
                    tuple(leaf["values"]) if "values" in leaf else None,
                )
                for leaf in data["leaves"]
            )
            return cls(tuple(data["names"]), leaves, _decode(data["structure"]), data.get("fixed"))
        except (KeyError, TypeError, AttributeError) as error:
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
        CaptureError: If an input is neither a tensor nor a plain constant.
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
    number = arguments.get(timestep) if timestep is not None else None
    if timestep is not None and isinstance(number, (int, float)) and not isinstance(number, bool):
        arguments[timestep] = torch.tensor(number, dtype=torch.float32 if isinstance(number, float) else torch.int64)
    flat, spec = pytree.tree_flatten_with_path(arguments)
    names = tuple(_readable(path) for path, _ in flat)
    leaves = [leaf for _, leaf in flat]
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, (torch.Tensor, type(None), bool, int, float, str)):
            raise CaptureError(
                f"input {name!r} is a {type(leaf).__name__}; only tensors, numbers, strings, booleans and None, "
                f"in dicts, lists and tuples, can be captured. Pass it in one of these forms."
            )
    return names, leaves, pytree.tree_unflatten(list(range(len(leaves))), spec)


def describe_call(names: tuple[str, ...], leaves: Sequence[Any], structure: Any) -> CallSpec:
    """The spec of a call: a leading dimension equal to that of the first tensor of rank 2 or more is the batch."""
    batch = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() >= 2), None)
    specs = tuple(
        TensorSpec(_open_batch(tuple(leaf.shape), batch), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in leaves
    )
    return CallSpec(names, specs, structure)


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
