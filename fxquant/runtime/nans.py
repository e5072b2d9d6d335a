"""NaN stays visible: codes cannot hold it, so a sample that has one in its inputs or its output is NaN as a whole.

A float model spreads a NaN through attention over all tokens of its sample. A quantized one would round it to a code
on the way, and only the tokens would show it that carry it past all layers; the others would look right and be wrong.
Looking at inputs and outputs costs next to nothing beside the model. Infinity needs no such care: it is clamped to the
largest code, as any number outside of the range is.
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
    """What a graph put out, with NaN in place of samples that it has seen NaN in; float graphs are left alone."""
    return with_nans(captured.call, inputs, outputs) if captured.digest is not None else outputs


def with_nans(call: CallSpec, inputs: Sequence[Tensor], outputs: Sequence[Any]) -> Sequence[Any]:
    """Outputs of a call with NaN in place of samples that have a NaN in an input or an output.

    Args:
        call: The kind of call. Where its batch is open, samples lie along the first axis of what has a batch; where it
            is not, or an output has none, one NaN makes the whole of it NaN.
        inputs: The tensor inputs of the call.
        outputs: Its outputs: tensors of any dtype, of which those of floats are looked at, or anything else.

    Returns:
        The same objects if there is no NaN and they are on a processor, else new tensors.
    """
    batched = [bool(spec.shape) and spec.shape[0] == BATCH for _, spec in call.tensors]
    size = next((tensor.shape[0] for tensor, own in zip(inputs, batched, strict=True) if own), None)
    flags = [_flag(tensor, own) for tensor, own in zip(inputs, batched, strict=True) if tensor.is_floating_point()]
    floats = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    along = [size is not None and leaf.dim() > 0 and leaf.shape[0] == size for leaf in floats]
    flags += [_flag(leaf, own) for leaf, own in zip(floats, along, strict=True)]
    if not flags or not floats:
        return outputs
    flag = flags[-1]  # On the device of an output; inputs, such as the timestep, may be on another.
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
