"""Whether a graph is right for all batch sizes, or only for that of the call that was traced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import sympy
from torch import SymInt, Tensor, fx
from torch.export import ExportedProgram

from fxquant.capture.calls import BATCH, CallSpec

log = logging.getLogger(__name__)

_MOST = 64  # The largest batch size for which conditions of the code are checked.
_MOST_TRACES = 4  # At other sizes, to see whether the conditions matter.


def is_batch_open(module: fx.GraphModule, call: CallSpec) -> bool:
    """Whether every batch dimension that the graph reads is still symbolic.

    The symbols may differ: for example, the batch of a mask is never compared with the batch of the masked values.
    """
    placeholders = (node for node in module.graph.nodes if node.op == "placeholder")
    return all(
        not str(node.meta["val"].shape[dim]).isdigit()
        for node, (_, spec) in zip(placeholders, call.tensors, strict=True)
        for dim, size in enumerate(spec.shape)
        if size == BATCH and node.users
    )


def serves_all(
    program: ExportedProgram, code: tuple[str, ...], again: Callable[[int], tuple[ExportedProgram, tuple[str, ...]]]
) -> bool:
    """Whether a graph with an open batch is right for all batch sizes.

    It is if the tracer met no condition on the size, or if traces at sizes that do not meet the conditions give the
    same graph. The strides of a reshaped value are compared without a consequence, for example.

    Args:
        program: What was traced.
        code: Text of its graph.
        again: Traces the same call at another batch size; returns the program and the text of its graph.

    Raises:
        CaptureError: If the call cannot be traced at a size.
    """
    left = set(range(1, _MOST + 1)) - batches_of(program)
    if left == {1}:
        return False
    for _ in range(_MOST_TRACES):
        left.discard(1)  # A trace at size 1 is always another graph: torch.export makes this size a constant.
        if not left:
            return True
        batch = min(left)
        other, its_code = again(batch)
        if its_code != code:
            log.info("the code takes another path at batch size %d", batch)
            return False
        left -= batches_of(other) | {batch}
    return not left


def batches_of(program: ExportedProgram) -> set[int]:
    """The batch sizes, among those up to 64, for which the traced path through the code is known to be the right one.

    Code that cuts the batch into pieces of eight, or that branches on its size, is traced along one path only. The
    tracer notes the conditions of that path.
    """
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
    sizes: Iterable[Any] = (size for value in values if isinstance(value, Tensor) for size in value.shape)
    first = next((size for size in sizes if isinstance(size, SymInt)), None)
    if first is None:
        return set(range(1, _MOST + 1))
    # Nothing but the batch has symbols; that of each input may have its own.
    conditions = {guard.expr for guard in first.node.shape_env.guards}
    return {
        size
        for size in range(1, _MOST + 1)
        if not any(
            each.xreplace(dict.fromkeys(each.free_symbols, sympy.Integer(size))) == sympy.false for each in conditions
        )
    }
