"""Keep NaN visible: a sample with a NaN in its inputs or its output becomes NaN as a whole.

Codes cannot hold NaN. In a float model, attention spreads a NaN over all tokens of its sample. A quantized model would
round the NaN to a code. Only tokens that carry the NaN past all layers would show it; the other tokens would look right
and be wrong. Checking inputs and outputs costs almost nothing compared with the model. Infinity needs no such check: it
is clamped to the largest code, as any number outside of the range is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxquant.capture.calls import BATCH, CallSpec

if TYPE_CHECKING:
    from fxquant.capture.graph import CapturedGraph


def showing_nans(captured: CapturedGraph, inputs: Sequence[Tensor], outputs: Sequence[Any]) -> Sequence[Any]:
    """Outputs of a graph, with NaN in place of samples that have a NaN; outputs of float graphs are unchanged."""
    return with_nans(captured.call, inputs, outputs) if captured.digest is not None else outputs


def with_nans(call: CallSpec, inputs: Sequence[Tensor], outputs: Sequence[Any]) -> Sequence[Any]:
    """Outputs of a call with NaN in place of samples that have a NaN in an input or an output.

    Args:
        call: The kind of call. If its batch is open, samples are along the first axis of tensors that have a batch. If
            the batch is not open, or an output has no batch, one NaN makes the whole output NaN.
        inputs: The tensor inputs of the call.
        outputs: Its outputs: tensors of any dtype, or other objects. Only floating-point tensors are checked.

    Returns:
        The same objects if there is no NaN and they are on the CPU, else new tensors.
    """
    batched = [bool(spec.shape) and spec.shape[0] == BATCH for _, spec in call.tensors]
    size = next((tensor.shape[0] for tensor, own in zip(inputs, batched, strict=True) if own), None)
    flags = [_flag(tensor, own) for tensor, own in zip(inputs, batched, strict=True) if tensor.is_floating_point()]
    floats = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    along = [size is not None and leaf.dim() > 0 and leaf.shape[0] == size for leaf in floats]
    flags += [_flag(leaf, own) for leaf, own in zip(floats, along, strict=True)]
    if not flags or not floats:
        return outputs
    flag = flags[-1]  # On the device of an output; inputs, such as the timestep, may be on another device.
    for other in flags[:-1]:
        flag = flag | other.to(flag.device)
    if flag.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(flag.any()):
        return outputs
    shown = {id(leaf): _shown(leaf, flag if own else flag.any(), own) for leaf, own in zip(floats, along, strict=True)}
    return [shown.get(id(leaf), leaf) for leaf in outputs]


def _flag(tensor: Tensor, batched: bool) -> Tensor:
    """Which samples hold a NaN, bool ``[batch]`` or ``[1]``."""
    found = tensor.isnan()
    return found.flatten(1).any(1) if batched and tensor.dim() > 1 else found if batched else found.any().reshape(1)


def _shown(leaf: Tensor, flag: Tensor, batched: bool) -> Tensor:
    shape = [-1] + [1] * (leaf.dim() - 1) if batched else [1] * leaf.dim()
    return torch.where(flag.reshape(shape), torch.full_like(leaf, torch.nan), leaf)
