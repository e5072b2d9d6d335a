"""Quantized weights as parts of a job that is kept (:mod:`fxquant.disk.finished_work`), and what rounding made."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxquant.disk.finished_work import Part, digest_of_tensor
from fxquant.numerics.weights import QuantizedWeight
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
        assert packed is not None and scale is not None
        found[name] = QuantizedWeight(packed, scale, zero_point, format, group_size, in_features, global_scale)
    return found


def kept(
    context: PassContext,
    room: str,
    name: str,
    weight: Tensor,
    made_from: Callable[[], Mapping[str, str]],
    compute: Callable[[], Part],
) -> Part:
    """A result for one layer: one that was kept, or a new one, which is kept if it took long enough.

    Args:
        context: Its ``workspace`` keeps results; without one nothing is kept.
        room: Names what kind of result it is, such as ``rounding``.
        name: Name of the result.
        weight: The weight of the layer, from which it is computed.
        made_from: Gives what else it depends on (:meth:`FinishedWork.part`). Not called if nothing is kept.
        compute: Computes it.
    """
    if context.workspace is None:
        return compute()
    work = context.workspace.room(room)
    given = {"weights": digest_of_tensor(weight), **made_from()}
    if len(context.plan.calls) > 1:  # Graphs of one model may fold different factors into a weight.
        name = f"{name}~{given['weights'][:8]}"
    found = work.load(name, given)
    if found is None:
        began = time.perf_counter()
        found = compute()
        if time.perf_counter() - began >= WORTH_KEEPING:
            work.save(name, given, found.tensors, found.data)
    return found
