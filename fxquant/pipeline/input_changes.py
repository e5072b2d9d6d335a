"""Finds layers whose input a pass changed, by running the graph before and after the pass.

Statistics of calibration belong to the values that calibration saw. A pass of another package that changes such a value
has to declare how (:meth:`PassContext.transform_input`), or what later passes decide from the statistics would be wrong
without an error. fxquant's own passes declare their changes in the plan, as factors and shifts of channels;
``rotate-channels`` declares its rotations like a pass of another package, and is checked like it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxquant.errors import PassError
from fxquant.ir.arguments import source_of
from fxquant.ir.layers import LAYER_OPS
from fxquant.ir.meta import LAYER
from fxquant.ir.ops import recording
from fxquant.ir.tensors import copy_graph
from fxquant.numerics.sqnr import sqnr_db
from fxquant.planning.context import PassContext

if TYPE_CHECKING:
    from fxquant.pipeline.pipeline import Pass

log = logging.getLogger(__name__)

_SAME_DB = 26.0  # Inputs that agree at least this well are the same, apart from rounding.
_SAME_AFTER_QUANTIZING_DB = 6.0  # The same behind layers that a lossy pass quantized.
_ROWS = 64  # Rows of each value that are compared.


class InputWatch:
    """Keeps a graph from before a pass of another package, to find the layers whose input the pass changes.

    Args:
        step: The pass.
        module: The graph before the pass.
        context: What the pass is given.
    """

    def __init__(self, step: Pass, module: fx.GraphModule, context: PassContext) -> None:
        self.step = step
        self.context = context
        self.before = copy_graph(module)
        self.declared = {name: len(found) for name, found in context.transforms.items()}
        self.vectors = set(context.plan.vectors)

    def check(self, module: fx.GraphModule) -> None:
        """Compare what each layer read before the pass with what it reads after it.

        A layer whose input changed, and whose change was not declared, is noted in ``context.changed``.

        Raises:
            PassError: If a declared change is not what the graph computes.
        """
        try:
            call = self.context.inputs[0] if self.context.inputs else _example(module.graph)
            before, after = _rows(self.before, call), _rows(module, call)
        except Exception as error:  # The graph does not accept an example of its inputs, or a value is not finite.
            log.info("the inputs of layers before and after %s are not compared: %s", self.step, error)
            return
        lossy = self.step.tier.value == "lossy"
        enough = _SAME_AFTER_QUANTIZING_DB if lossy else _SAME_DB
        for name, rows in after.items():
            if name not in before:
                continue
            expected = before[name]
            added = self.context.transforms.get(name, [])[self.declared.get(name, 0) :]
            for transform in added:
                expected = transform.function(expected).double()
            if _agree(rows, expected, enough):
                continue
            if added:
                raise PassError(
                    f"pass {self.step} declares a transform of the input of layer {name!r} that is not what its graph "
                    f"computes: {_difference(rows, expected)}; the function of context.transform_input should map the "
                    "rows that the layer read before the pass to those that it reads after it"
                )
            factor = self.context.plan.vectors.get(name)
            if factor is not None and _agree(rows, expected / factor.double().cpu(), enough):
                continue  # Balanced, and in the plan.
            self.context.changed.setdefault(name, str(self.step))


def _agree(actual: Tensor, expected: Tensor, enough: float) -> bool:
    return actual.shape == expected.shape and sqnr_db(expected, actual) >= enough


def _difference(actual: Tensor, expected: Tensor) -> str:
    if actual.shape != expected.shape:
        return f"it gives {expected.shape[-1]} channels, and the layer reads {actual.shape[-1]}"
    return f"they agree to {sqnr_db(expected, actual):.1f} dB"


class _Reading(fx.Interpreter):
    """Runs a graph and keeps some rows of what each float layer reads."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if LAYER in n.meta and n.target in LAYER_OPS and n.target is not torch.ops.aten.embedding.default:
            value = self.env[source_of(n)]
            rows = value if n.target is torch.ops.aten.linear.default else value.movedim(1, -1)
            rows = rows.detach().reshape(-1, rows.shape[-1])
            self.found[str(n.meta[LAYER])] = rows[:: max(1, len(rows) // _ROWS)][:_ROWS].double().cpu()
        return super().run_node(n)


@torch.no_grad()
def _rows(module: fx.GraphModule, call: Sequence[Tensor]) -> dict[str, Tensor]:
    interpreter = _Reading(module)
    with recording(lambda *_: None), torch.random.fork_rng():
        torch.manual_seed(0)  # A model may drop out values in evaluation too: the same ones each time.
        interpreter.run(*call)
    if not all(bool(rows.isfinite().all()) for rows in interpreter.found.values()):
        raise PassError("a value is not finite")
    return interpreter.found


def _example(graph: fx.Graph) -> list[Tensor]:
    """Inputs of a graph: random floats, ones for integers and booleans; two samples where the batch is open."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for node in graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            shape = [size if isinstance(size, int) else int(size.node.hint) for size in value.shape]
            drawn = torch.rand(shape, generator=generator) if value.is_floating_point() else torch.ones(shape)
            found.append(drawn.to(value.device, value.dtype))
    return found
