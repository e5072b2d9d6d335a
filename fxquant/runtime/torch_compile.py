"""How ``torch.compile`` meets a model: it compiles one graph for all batch sizes, that of one sample included.

``torch.compile`` sees sizes as numbers on the first call, makes those that change symbols on the second, and never a
symbol of a 0 or 1. Sizes that are marked as unbacked are symbols from the first call on; but marks are read where
compilation begins. So compilation is made to begin at the graph: choosing it, and everything else that is Python,
happens outside, on real tensors, and the marks go onto aliases of the inputs, never onto the caller's tensors.
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
from fxquant.ir.ops.definition import define
from fxquant.pipeline.backend import Backend

_KEPT = "fxquant_opened"  # Key of a graph's ``meta`` for its code for open batches.
_GAVE_UP = "fxquant_batch_not_open"
_CAN_MARK = "shape_id" in inspect.signature(mark_unbacked).parameters
_CONVOLUTIONS = {
    torch.ops.aten.conv1d.default: 1,
    torch.ops.aten.conv2d.default: 2,
    torch.ops.aten.conv3d.default: 3,
}

Code = Callable[..., tuple[Any, ...]]

callback = torch._C._dynamo.eval_frame.get_eval_frame_callback
"""What compiles the next frame of Python, or None or False. Not wrapped, for the wrapper would be such a frame."""

set_callback = torch._C._dynamo.eval_frame.set_eval_frame
"""Sets it again: torch compiles nothing more once it has failed, even if the failure is caught."""


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
    """Let frames of this code run as Python where compilation would begin at them, but not where they are within it.

    ``torch.compiler.disable`` would do the first as well, but break graphs around the second.
    """
    frames = torch._C._dynamo.eval_frame
    strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
    frames.set_code_exec_strategy(code, strategy)


def watch(backend: Backend | None) -> None:
    """Ask a backend what it has to tell whenever something is compiled, until :func:`unwatch`."""
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
    """What to compile for a call: batch dimensions are open, unless the user compiles with ``dynamic=False``.

    They are also left as torch treats them while weights are trained, as the op for convolutions knows no gradients.
    """
    wanted = torch._dynamo.config.automatic_dynamic_shapes and not captured.module.meta.get(_GAVE_UP)
    wanted = wanted and not _quantizes_convolutions(captured.module.graph)
    if not (_CAN_MARK and wanted and captured.call.batched) or _trains(captured.module, inputs):
        return Call(captured, captured.module, type(captured.module).forward, inputs)
    opened = []
    for (_, spec), tensor in zip(captured.call.tensors, inputs, strict=True):
        alias = tensor.data  # No view of the tensor: the size of what it were a view of would stand in the graph.
        for dim, size in enumerate(spec.shape):
            if size == BATCH:
                mark_unbacked(alias, dim, hint_override=tensor.shape[dim], shape_id=BATCH, min=1)
            else:
                mark_static(alias, dim)  # Also with dynamic=True: the graph serves calls of this size alone.
        opened.append(alias)
    return Call(captured, captured.module, _opened(captured.module), opened)


def begin_again(call: Call, error: Exception) -> Call:
    """The same call with its batch left to torch, if it was open and could not be compiled like that.

    Raises:
        TorchDynamoException: The error itself, if the batch was not open.
    """
    if call.code is type(call.module).forward:
        raise error
    call.module.meta[_GAVE_UP] = True
    warnings.warn(
        f"torch.compile cannot leave the batch of this model open ({str(error).strip().splitlines()[0]}); it compiles "
        "a further graph for a batch of one, and for others as it sees fit",
        SpeedWarning,
        stacklevel=2,
    )
    return begin(call.captured, [tensor.data for tensor in call.inputs])  # Without marks.


def _quantizes_convolutions(graph: fx.Graph) -> bool:
    """Whether weights of ATen's convolutions are computed, as fusions of a backend want to see them in its graph."""
    return any(node.target in _CONVOLUTIONS and node.args[1].op != "get_attr" for node in graph.nodes)


def _trains(module: fx.GraphModule, inputs: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *module.parameters()))


def _opened(module: fx.GraphModule) -> Code:
    """The code of a graph with convolutions that say the same of their results at every batch size."""
    kept = module.meta.get(_KEPT)
    if kept is None or kept[0] is not module._code:
        graph = copy.deepcopy(module.graph)
        keep_layouts(graph)
        kept = module.meta[_KEPT] = module._code, type(fx.GraphModule(module, graph)).forward
    code: Code = kept[1]
    return code


def keep_layouts(graph: fx.Graph) -> None:
    """Put in place of convolutions, whose results lie as their kernels leave them, ones with results in order."""
    for node in graph.nodes:
        if node.target in _CONVOLUTIONS:
            node.args = _normal(node.args, _CONVOLUTIONS[node.target])
            node.target = torch.ops.fxquant.convolution.default


def _normal(args: tuple[Any, ...], dims: int) -> tuple[Any, ...]:
    """The arguments of a convolution with all defaults filled in, and a number for each axis."""
    defaults: tuple[Any, ...] = (None, 1, 0, 1, 1)
    x, weight, bias, stride, padding, dilation, groups = args + defaults[len(args) - 2 :]
    each = [list(value) if isinstance(value, (list, tuple)) else [value] for value in (stride, padding, dilation)]
    return (x, weight, bias, *[value * (dims // len(value)) for value in each], groups)


# torch's own convolution says of its result, while it is traced, that it lies as the kernel for this batch size leaves
# it; of one sample, and of a number that is not known, that may be wrong.
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
    x = x.to(weight.dtype)  # They may differ under autocast, which does not reach inside.
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
