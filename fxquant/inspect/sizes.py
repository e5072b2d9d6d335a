"""How many bytes layers take: from snapshots of their nodes, or, without a graph, from the plan."""

from __future__ import annotations

import torch

from fxquant.inspect.snapshots import Snapshot
from fxquant.numerics.packing import packed_size
from fxquant.numerics.weights import stored_bytes
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.plan import Plan


def weight_bytes(layer: LayerPlan, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a layer's weight before and after, with scales and zero points, as checkpoints store it.

    Args:
        layer: The layer.
        dtype: Dtype of the float model.
    """
    rows, columns = layer.shape
    before = rows * columns * dtype.itemsize
    format = layer.format_of_weight
    if format is None:
        return before, before
    if layer.group_size < 1 or columns % layer.group_size == 0:
        return before, stored_bytes(format, (rows, columns), layer.group_size, layer.group_rows)
    # A plan that was edited by hand: a scale for each group that has begun.
    codes, groups = rows * packed_size(columns, format.bits), -(-columns // layer.group_size)
    return before, codes + groups * (stored_bytes(format, (rows, columns), 0, layer.group_rows) - codes)


def dtype_of_plan(plan: Plan) -> torch.dtype:
    """Dtype of the float model, as its recorded calls show it: that of the first floating-point input."""
    specs = (spec for call in plan.calls for _, spec in call.tensors)
    return next((spec.dtype for spec in specs if spec.dtype.is_floating_point), torch.float32)


def bytes_of(nodes: Snapshot, layer: str) -> int:
    """Bytes of the stored tensors that belong to a layer, also of those that other layers read too."""
    return sum(state.num_bytes or 0 for state in nodes if state.kind == "tensor" and layer in state.roles)


def shared_with(nodes: Snapshot, layer: str) -> tuple[str, ...]:
    """The other layers that read some of the same stored tensors."""
    found: dict[str, None] = {}
    for state in nodes:
        if state.kind == "tensor" and layer in state.roles:
            found.update(dict.fromkeys(state.roles))
    return tuple(name for name in found if name != layer)
