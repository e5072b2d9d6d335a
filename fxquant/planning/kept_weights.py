"""Quantized weights as parts of a job that is kept (:mod:`fxquant.disk.finished_work`), and what rounding made."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fxquant.disk.finished_work import Part, digest_of_tensor
from fxquant.numerics.formats import FORMATS
from fxquant.numerics.weights import QuantizedWeight, group_count
from fxquant.planning.context import PassContext

_FIELDS = ("packed", "scale", "zero_point", "global_scale")

WORTH_KEEPING = 0.02
"""Seconds that a layer takes at least to be worth a file, which takes about a millisecond."""


def part_of_weights(weights: Mapping[str, QuantizedWeight]) -> Part:
    """Tensors and JSON values that stand for weights."""
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        held = {field: getattr(weight, field) for field in _FIELDS}
        tensors |= {f"{name}.{field}": tensor for field, tensor in held.items() if tensor is not None}
    grids = {name: [weight.format, weight.group_size, weight.in_features] for name, weight in weights.items()}
    return Part(tensors, grids)


def weights_of_part(part: Part, device: torch.device | str = "cpu") -> dict[str, QuantizedWeight]:
    """The weights that :func:`part_of_weights` wrote, on a device."""
    held = {name: tensor.to(device) for name, tensor in part.tensors.items()}
    found = {}
    for name, (format, group_size, in_features) in part.data.items():
        packed, scale, zero_point, global_scale = (held.get(f"{name}.{field}") for field in _FIELDS)
        if packed is None or scale is None:
            raise ValueError(f"the codes or the scales of {name} are missing")
        found[name] = QuantizedWeight(packed, scale, zero_point, format, group_size, in_features, global_scale)
    return found


def check_weight(part: Part, name: str, shape: Sequence[int]) -> None:
    """Refuse a part that does not hold the codes of a weight of this shape.

    Raises:
        ValueError: The codes or scales have another shape or dtype, or are not finite.
        FxquantError: There is no such number format.
    """
    weight = weights_of_part(part)[name]
    if weight.packed.dtype != torch.uint8 or weight.in_features != shape[1] or len(weight.packed) != shape[0]:
        raise ValueError(f"it does not hold the codes of a weight of shape {list(shape)}")
    without_values = weights_of_part(part, "meta")[name]  # Its values would take as much memory as the float weight.
    if tuple(without_values.dequantize(torch.float32).shape) != tuple(shape):
        raise ValueError(f"its codes and scales do not make a weight of shape {list(shape)}")
    dtypes = FORMATS[weight.format].scale_dtype, torch.float32
    for scale, dtype in zip((weight.scale, weight.global_scale), dtypes, strict=True):
        if scale is not None and not (scale.dtype in (dtype, torch.float64) and scale.isfinite().all()):
            raise ValueError(f"its scales are not finite numbers of dtype {dtype}")
    rows, groups = weight.scale.shape
    if groups != group_count(shape[1], weight.group_size) or not rows or shape[0] % rows:
        raise ValueError(f"its scales of shape {[rows, groups]} are not those of a weight of shape {list(shape)}")
    zeros = weight.zero_point
    if zeros is not None and (zeros.dtype != torch.uint8 or zeros.shape != weight.scale.shape):
        raise ValueError(f"its zero points are {zeros.dtype} {list(zeros.shape)}")


def kept(
    context: PassContext,
    room: str,
    name: str,
    weight: Tensor,
    made_from: Callable[[], Mapping[str, str]],
    compute: Callable[[], Part],
    check: Callable[[Part], object],
) -> Part:
    """A result for one layer: one that was kept, or a new one, which is kept if it took long enough.

    Args:
        context: Its ``workspace`` keeps results; without one nothing is kept.
        room: Names what kind of result it is, such as ``rounding``.
        name: Name of the result.
        weight: The weight of the layer, from which it is computed.
        made_from: Gives what else it depends on (:meth:`FinishedWork.part`). Not called if nothing is kept.
        compute: Computes it.
        check: Raises an error if a part that was kept is of another shape, dtype or form (:meth:`FinishedWork.part`).
    """
    if context.workspace is None:
        return compute()
    work = context.workspace.room(room)
    given = {"weights": digest_of_tensor(weight), **made_from()}
    if len(context.plan.calls) > 1:  # Graphs of one model may fold different factors into a weight.
        name = f"{name}~{given['weights'][:8]}"

    def read(part: Part) -> Part:
        check(part)
        return part

    found = work.load(name, given, read)
    if found is None:
        began = time.perf_counter()
        found = compute()
        if time.perf_counter() - began >= WORTH_KEEPING:
            work.save(name, given, found.tensors, found.data)
    return found
