"""Check that the files of a checkpoint belong together, before and after its model is built.

Before: the plan, the config and the header of the tensors must describe layers of the same sizes, so that no file makes
fxquant build layers that the other files do not hold. After: the tensors must be valid results of compilation (positive
scales, codes in range), and tensors that follow from the plan must have the values that the plan gives.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils import _pytree as pytree

from fxquant.errors import CheckpointError
from fxquant.ir.arguments import args
from fxquant.ir.dataflow import behind
from fxquant.ir.names import qualified_name
from fxquant.ir.tensors import get_tensor, weights_and_buffers
from fxquant.numerics.formats import FORMATS, bits_of
from fxquant.numerics.weights import stored_shapes
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.plan import Plan

_LARGEST_HEADER = 32 << 20
_SPARE_MODULES = 1000  # For parts of models that have no tensors, or that no call runs.
_MODULES_A_TENSOR = 20
_SPARE_ELEMENTS = 1 << 24
_LARGEST_NUMBER = 1 << 24
_TOLERANCE = 1e-6  # Relative; for scales, which another processor may round differently.


@dataclass(frozen=True)
class Header:
    """What a file says about one of its tensors.

    Attributes:
        dtype: The dtype, as safetensors names it.
        shape: The sizes.
    """

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def elements(self) -> int:
        """How many numbers the tensor holds."""
        total = 1
        for size in self.shape:
            total *= size
        return total


def read_headers(path: Path) -> dict[str, Header]:
    """Read the dtypes and shapes of the tensors of a file by name, without the tensors themselves.

    Raises:
        CheckpointError: If the file is not safetensors, or its header is larger than any header that fxquant writes.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        if length > _LARGEST_HEADER:
            raise CheckpointError(
                f"{path} cannot be read as safetensors: its header would have {length} bytes; copy the checkpoint again"
            )
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Header(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}; copy the checkpoint again") from error


def check_headers(plan: Plan, headers: Mapping[str, Header]) -> None:
    """Compare the layers of a plan with the tensors that a file says it holds.

    Raises:
        CheckpointError: Names the first tensor that does not fit.
    """
    fitting: dict[str, set[tuple[int, ...]]] = {}
    for name, layer in plan.quantized():
        for part, shape in _stored_shapes(layer).items():
            # A layer that runs several times may have its weight in several precisions.
            fitting.setdefault(f"{name.partition('@')[0]}.weight_{part}", set()).add(shape)
    for name, shapes in fitting.items():
        # If the model has a tensor of that name, or a layer runs in two precisions, further tensors get numbers.
        numbered = takewhile(headers.__contains__, (f"{name}_{number}" for number in count(2)))
        found = [other for other in (name, *numbered) if other in headers]
        if found and not any(headers[other].shape in shapes for other in found):
            raise CheckpointError(
                f"tensor {found[-1]!r} has shape {headers[found[-1]].shape}, and by the plan it has {min(shapes)}; "
                "the tensors and the plan belong to different models"
            )


def check_factors(plan: Plan) -> None:
    """Check that the factors of each balanced linear are there, and have its input channels. No other layer has shifts.

    The stored weights contain them already, so a model without them computes the same until a LoRA is loaded.

    Raises:
        CheckpointError: Names the first layer whose factors are missing or have another shape, or that the plan does
            not shift although there are shifts.
    """
    for name, layer in plan.layers.items():
        if f"{name}.shift" in plan.vectors and layer.shift is None:
            raise CheckpointError(
                f"there are shifts of layer {name!r}, which the plan does not shift; copy the checkpoint again"
            )
        if layer.kind != "linear" or layer.balance is None or not layer.balance.channels:
            continue
        factors, wanted = plan.vectors.get(name), tuple(layer.shape[1:])
        if factors is None or tuple(factors.shape) != wanted:
            held = "are missing" if factors is None else f"have shape {tuple(factors.shape)}, not {wanted}"
            raise CheckpointError(f"the balance factors of layer {name!r} {held}; copy the checkpoint again")


def _stored_shapes(layer: LayerPlan) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a quantized weight."""
    assert layer.format_of_weight is not None
    parts = stored_shapes(layer.format_of_weight, (layer.shape[0], layer.shape[1]), layer.group_size, layer.group_rows)
    return {part: shape for part, (_, shape) in parts.items()}


def check_config(config: Any, headers: Mapping[str, Header]) -> None:
    """Refuse a config with numbers that are too large to be sizes of a model with these tensors.

    Raises:
        CheckpointError: Names the number.
    """
    largest = max((size for header in headers.values() for size in header.shape), default=0)
    limit = max(_LARGEST_NUMBER, 64 * largest)
    for value in pytree.tree_leaves(config):
        if isinstance(value, int) and abs(value) > limit:
            raise CheckpointError(
                f"it holds the number {value}, but the largest size of any tensor of the checkpoint is {largest}"
            )


def check_skeleton(skeleton: nn.Module, plan: Plan) -> None:
    """Compare the linears of a model without weights with the plan.

    Raises:
        CheckpointError: Names the first linear that does not fit.
    """
    own = dict(weights_and_buffers(skeleton))
    for name, layer in plan.layers.items():
        weight = own.get(f"{name.partition('@')[0]}.weight")
        if weight is None or layer.kind != "linear":
            continue
        shape = [weight.shape[0], math.prod(weight.shape[1:])]
        if shape != layer.shape:
            raise CheckpointError(
                f"layer {name!r} of the model is {shape[0]} x {shape[1]}, and in the plan it is "
                f"{layer.shape[0]} x {layer.shape[1]}"
            )


@dataclass
class _Budget:
    """How many modules may be built, and how many numbers their parameters may hold."""

    modules: int
    elements: int
    built_modules: int = 0
    built_elements: int = 0

    def count(self, module: nn.Module) -> None:
        self.built_modules += 1
        self.built_elements += sum(tensor.numel() for tensor in module._parameters.values() if tensor is not None)
        for built, limit, what in (
            (self.built_modules, self.modules, "modules"),
            (self.built_elements, self.elements, "numbers in its parameters"),
        ):
            if built > limit:
                raise CheckpointError(
                    f"it describes a model far larger than the tensors of the checkpoint: more than {limit} {what}"
                )


_budget: ContextVar[_Budget | None] = ContextVar("fxquant_budget", default=None)


@contextmanager
def bounded(headers: Mapping[str, Header], layers: Iterable[LayerPlan] = ()) -> Iterator[None]:
    """Limit the size of a model that is built in this context (thread or task) by what a file holds.

    Args:
        headers: The tensors of the file.
        layers: The layers that the file holds as codes.

    Raises:
        CheckpointError: As soon as the model has far more modules, or numbers in parameters, than the file explains.
    """
    numbers = sum(layer.shape[0] * layer.shape[1] for layer in layers) + sum(h.elements for h in headers.values())
    token = _budget.set(_Budget(_SPARE_MODULES + _MODULES_A_TENSOR * len(headers), _SPARE_ELEMENTS + 8 * numbers))
    try:
        yield
    finally:
        _budget.reset(token)


def _count(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    budget = _budget.get()
    if budget is not None and module is not None:
        budget.count(module)


# The hook stays registered: another thread may iterate over torch's hooks while one is added or removed.
register_module_module_registration_hook(_count)


# --- tensors --------------------------------------------------------------------------------------------------------

_LOOKUPS = (
    "view",
    "reshape",
    "index_select",
    "select",
    "to",
    "_to_copy",
    "expand",
    "unsqueeze",
    "permute",
    "transpose",
)


def check_grids(module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
    """Check the scales and zero points of a graph before they are bound to it.

    Args:
        module: A quantized graph of fake tensors; only tensors that follow from the plan are real.
        tensors: The tensors by name.

    Raises:
        CheckpointError: If a scale is not finite and positive, a zero point is not a valid code, or one of them is not
            what follows from the plan. Names the tensor.
    """
    for node in module.graph.nodes:
        for what, name, top, format in _grids_of(node):
            found, expected = tensors.get(name), get_tensor(module, name)
            if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
                continue  # Binding the tensors reports this.
            if what == "scale" and not _are_scales(found, format):
                raise CheckpointError(f"tensor {name!r} holds scales that are not finite and positive")
            if what == "zero point" and found.numel() and not 0 <= int(found.min()) <= int(found.max()) <= top:
                raise CheckpointError(f"tensor {name!r} holds zero points outside of the codes 0 to {top}")
            if is_fake(expected) or torch.allclose(
                found.cpu().double(), expected.cpu().double(), rtol=_TOLERANCE, atol=0.0
            ):
                continue
            raise CheckpointError(f"tensor {name!r} is not what follows from the plan; they belong to different models")


def _are_scales(found: Tensor, format: str | None) -> bool:
    """Whether scales of a format, or of a backend's op, are finite and positive."""
    values = found if found.is_floating_point() or format is None else FORMATS[format].scale_values(found)
    return bool((values.isfinite() & (values > 0)).all())


def _grids_of(node: fx.Node) -> Iterator[tuple[str, str, int, str | None]]:
    """Yield each scale and zero point that an op reads from a tensor.

    Each is which of the two, its name, the largest code, and the name of the number format, None for a backend's op.
    """
    if not qualified_name(node.target).startswith("fxquant::"):
        return
    given = args(node).by_name()
    bits, top = given.get("bits"), given.get("qmax")
    formats = {side: given.get(f"{side}format") for side in ("", "x_", "w_", "a_", "b_")}
    for name, argument in given.items():
        held = _looked_up(argument)
        if held is None:
            continue
        format = formats.get(name.removesuffix("zero_point").removesuffix("global_scale").removesuffix("scale"))
        if name.endswith(("scale", "_global")) and "channel_affine" not in str(node.target):
            yield "scale", held, 0, None if "global" in name else format
        elif name.endswith("zero_point"):
            weight = name.startswith("w_") or "dequantize_weight" in str(node.target)
            if format is not None:
                yield "zero point", held, 2 ** bits_of(format) - 1, format
            else:  # An op of a backend.
                most = 2**bits - 1 if weight and bits is not None else (255 if top is None else top)
                yield "zero point", held, most, None


def _looked_up(argument: Any) -> str | None:
    """The name of the tensor that an argument is, or is looked up in; None if there is no such tensor."""
    source = behind(argument, _LOOKUPS)
    return str(source.target) if isinstance(source, fx.Node) and source.op == "get_attr" else None


def infinite_in(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold infinity. Masks hold it on purpose."""
    floats = ((name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point())
    return sorted(name for name, tensor in floats if bool(tensor.isinf().any()))


def check_finite(tensors: Mapping[str, Tensor], infinite: Iterable[str] | None) -> None:
    """Refuse NaN in all tensors, and infinity in tensors that are not known to hold it. Masks hold it on purpose.

    Args:
        tensors: The tensors by name.
        infinite: Names of the tensors that held infinity when the checkpoint was written. None if it does not list
            them; then infinity is not refused.

    Raises:
        CheckpointError: Names the tensor.
    """
    known = None if infinite is None else set(infinite)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel() or tensor.layout is not torch.strided:
            continue
        low, high = torch.aminmax(tensor)
        if bool(low.isnan()) or bool(high.isnan()):
            raise CheckpointError(f"tensor {name!r} holds NaN")
        if (known is not None and name not in known) and bool(low.isinf() | high.isinf()):
            raise CheckpointError(f"tensor {name!r} holds infinity")
