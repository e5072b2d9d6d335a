"""How ``torch.compile`` compiles a model: one graph for all batch sizes, including a batch of one.

``torch.compile`` treats sizes as numbers on the first call. It turns sizes that change into symbols on the second call,
but never a size of 0 or 1. Sizes that are marked as unbacked are symbols from the first call on, but the marks are read
only where compilation begins. So compilation is made to begin at the graph. Choosing the graph, and all other Python
code, runs outside of it on real tensors. The marks are set on aliases of the inputs, never on the caller's tensors.
"""

from __future__ import annotations

import copy
import inspect
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.callback import callback_handler
from torch._dynamo.decorators import mark_static, mark_unbacked

from fxquant.capture.calls import BATCH
from fxquant.capture.graph import CapturedGraph
from fxquant.errors import SpeedWarning
from fxquant.ir.arguments import args
from fxquant.ir.ops.definition import define
from fxquant.pipeline.backend import Backend

_KEPT = "fxquant_opened"  # Key in a graph's ``meta`` for its code for open batches.
_GAVE_UP = "fxquant_batch_not_open"
_CONVOLUTIONS = {
    torch.ops.aten.conv1d.default: 1,
    torch.ops.aten.conv2d.default: 2,
    torch.ops.aten.conv3d.default: 3,
}

Code = Callable[..., tuple[Any, ...]]

CAN_MARK = "shape_id" in inspect.signature(mark_unbacked).parameters
"""Whether this version of torch can open several batch dimensions as one size."""

callback = torch._C._dynamo.eval_frame.get_eval_frame_callback
"""Gives what compiles the next Python frame, or None or False. Not wrapped: a wrapper would be such a frame itself."""

set_callback = torch._C._dynamo.eval_frame.set_eval_frame
"""Sets that callback again: after a failure torch compiles nothing more, even if the failure is caught."""


@dataclass(frozen=True)
class Call:
    """A call of a graph at which compilation is to begin.

    Attributes:
        captured: The graph.
        module: What holds its tensors.
        code: A function of its module and inputs.
        inputs: The inputs.
    """

    captured: CapturedGraph
    module: fx.GraphModule
    code: Code
    inputs: Sequence[Tensor]


def leave_alone(code: types.CodeType) -> None:
    """Run frames of this code as plain Python where compilation would begin at them; compile them within a compilation.

    ``torch.compiler.disable`` would also do the first, but would break the graph in the second case.
    """
    frames = torch._C._dynamo.eval_frame
    strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
    frames.set_code_exec_strategy(code, strategy)


def watch(backend: Backend | None) -> None:
    """Call the backend's ``compiling`` whenever something is compiled, until :func:`unwatch`."""
    if _has_to_tell(backend):
        callback_handler.register_start_callback(_Watcher(backend))  # type: ignore[arg-type]


def unwatch(backend: Backend | None) -> None:
    """Undo :func:`watch`."""
    if _has_to_tell(backend):
        callback_handler.remove_start_callback(_Watcher(backend))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Watcher:
    backend: Backend

    def __call__(self, _: object) -> None:
        self.backend.compiling()


def _has_to_tell(backend: Backend | None) -> bool:
    return backend is not None and type(backend).compiling is not Backend.compiling


def begin(captured: CapturedGraph, inputs: Sequence[Tensor]) -> Call:
    """Return what to compile for a call: batch dimensions are open, unless the user compiles with ``dynamic=False``.

    Batch dimensions are also left to torch while weights are trained, because the op for convolutions has no gradients.
    """
    wanted = torch._dynamo.config.automatic_dynamic_shapes and not captured.module.meta.get(_GAVE_UP)
    wanted = wanted and not quantizes_convolutions(captured.module.graph)
    if not (CAN_MARK and wanted and captured.call.batched) or _trains(captured.module, inputs):
        return Call(captured, captured.module, type(captured.module).forward, inputs)
    opened = []
    for (_, spec), tensor in zip(captured.call.tensors, inputs, strict=True):
        alias = tensor.data  # Not a view: the graph would contain the size of the base of the view.
        for dim, size in enumerate(spec.shape):
            if size == BATCH:
                mark_unbacked(alias, dim, hint_override=tensor.shape[dim], shape_id=BATCH, min=1)
            else:
                mark_static(alias, dim)  # Also with dynamic=True: the graph serves only calls of this size.
        opened.append(alias)
    return Call(captured, captured.module, _opened(captured.module), opened)


def begin_again(call: Call, error: Exception) -> Call:
    """Return the same call with its batch left to torch, after compiling it with an open batch failed.

    Raises:
        TorchDynamoException: The error itself, if the batch was not open.
    """
    if call.code is type(call.module).forward:
        raise error
    call.module.meta[_GAVE_UP] = True
    warnings.warn(
        f"torch.compile cannot compile this model for an open batch ({str(error).strip().splitlines()[0]}); it "
        "compiles a separate graph for a batch of one, and decides itself about other batch sizes",
        SpeedWarning,
        stacklevel=2,
    )
    return begin(call.captured, [tensor.data for tensor in call.inputs])  # Without marks.


def quantizes_convolutions(graph: fx.Graph) -> bool:
    """Whether the graph computes the weights of ATen convolutions; fusions of a backend need these convolutions."""
    return any(node.target in _CONVOLUTIONS and args(node).node("weight").op == "call_function" for node in graph.nodes)


def _trains(module: fx.GraphModule, inputs: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *module.parameters()))


def _opened(module: fx.GraphModule) -> Code:
    """The code of a graph in which convolutions report the same layout of their results at every batch size."""
    kept = module.meta.get(_KEPT)
    if kept is None or kept[0] is not module._code:
        graph = copy.deepcopy(module.graph)
        keep_layouts(graph)
        kept = module.meta[_KEPT] = module._code, type(fx.GraphModule(module, graph)).forward
    code: Code = kept[1]
    return code


def keep_layouts(graph: fx.Graph) -> None:
    """Replace ops whose results are not known from sizes alone: layouts of convolutions, lengths of repetitions."""
    for node in graph.nodes:
        if node.target in _CONVOLUTIONS:
            node.args, node.kwargs = _normal(node, _CONVOLUTIONS[node.target]), {}
            node.target = torch.ops.fxquant.convolution.default
        elif node.target is torch.ops.aten.repeat_interleave.self_int and args(node).dim is not None:
            node.args, node.kwargs = (args(node).self, args(node).repeats, args(node).dim), {}
            node.target = torch.ops.fxquant.repeat_interleave.default


def _normal(node: fx.Node, dims: int) -> tuple[Any, ...]:
    """The arguments of a convolution with all defaults filled in, and a number for each axis."""
    given = args(node)
    sizes = given.stride, given.padding, given.dilation
    each = [list(value) if isinstance(value, (list, tuple)) else [value] for value in sizes]
    return (given.input, given.weight, given.bias, *[value * (dims // len(value)) for value in each], given.groups)


# While torch's own convolution is traced, it reports the layout that the kernel for this batch size gives its result.
# For a batch of one, and for an unknown batch size, that layout may be wrong.
def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """``aten.convolution`` of `x`, `[batch, in, ...]`, with a contiguous result `[batch, out, ...]`."""
    none = [0] * len(stride)
    x = x.to(weight.dtype)  # Dtypes may differ under autocast, which does not apply inside the op.
    return torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, none, groups).contiguous()


def _fake_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(len(stride))
    ]
    return weight.new_empty((x.shape[0], weight.shape[0], *sizes))


define(
    "convolution(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt groups) -> Tensor",
    convolution,
    _fake_convolution,
)


# While torch's own op is traced with an open size, it reports a length that follows from no size.
def repeat_interleave(x: Tensor, repeats: int, dim: int) -> Tensor:
    """``aten.repeat_interleave`` of `x`, with ``repeats`` times the size of ``dim``."""
    return torch.ops.aten.repeat_interleave(x, repeats, dim)


def _fake_repeat_interleave(x: Tensor, repeats: int, dim: int) -> Tensor:
    sizes: list[Any] = [*x.shape]
    sizes[dim] = sizes[dim] * repeats
    return x.new_empty(sizes)


define("repeat_interleave(Tensor x, SymInt repeats, int dim) -> Tensor", repeat_interleave, _fake_repeat_interleave)
