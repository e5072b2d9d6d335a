"""Running a segment with quantized linears that have gradients: soft weights, and learned steps of activations.

The graph itself stays float and does not change. Where the ops of quantized graphs define no gradients, this module
uses straight-through estimates: rounding passes gradients on unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from fxquant.ir.ops.hadamard import hadamard
from fxquant.ir.ops.low_rank import low_rank
from fxquant.ir.tensors import get_tensor
from fxquant.numerics.grids import affine_parameters
from fxquant.reconstruction.cache import Values
from fxquant.reconstruction.segments import Segment

_AFFINE = torch.ops.fxquant.channel_affine.default

Lookup = Callable[[fx.Node], Any]
"""Value of a node of the segment that runs, or of one of its inputs or parameters."""

Compute = Callable[[fx.Node, tuple[Any, ...], dict[str, Any], Lookup], Any]
"""Takes a node, the values of its arguments and a lookup of other values; returns the value of the node."""


def run_segment(module: fx.GraphModule, segment: Segment, values: Mapping[fx.Node, Any], compute: Compute) -> Values:
    """Run the nodes of a segment; returns the values of its outputs.

    Args:
        module: Holds the parameters.
        segment: What to run.
        values: Values of its inputs.
        compute: Runs one node: :func:`as_it_is`, or a function that runs some nodes differently.
    """
    held: Values = dict(values)

    def value_of(node: fx.Node) -> Any:
        return get_tensor(module, str(node.target)) if node.op == "get_attr" else held[node]

    for node in segment.nodes:
        held[node] = compute(node, map_arg(node.args, value_of), map_arg(dict(node.kwargs), value_of), value_of)
        for source in segment.freed.get(node, ()):
            held.pop(source, None)
    return {node: held[node] for node in segment.outputs}


def as_it_is(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], value: Lookup) -> Any:
    """Run a node unchanged."""
    function: Any = _DIFFERENTIABLE.get(node.target, node.target)
    return function(*args, **kwargs)


def _copy(old: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(old.device, old.dtype).expand(old.shape)


def _affine(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    y = x * scale
    return (y if shift is None else y + shift).to(x.dtype)


_DIFFERENTIABLE: Mapping[Any, Callable[..., Tensor]] = {
    _AFFINE: _affine,
    torch.ops.aten.copy.default: _copy,
    torch.ops.fxquant.low_rank.default: low_rank,
    torch.ops.fxquant.hadamard.default: hadamard,
}
"""Ops without a derivative, and for each a function that computes the same with ops that have one."""


class LearnedSteps(nn.Module):
    """The grid of a layer's input, whose steps are learned and whose zero points do not change.

    Args:
        low: Lowest values, ``[bins]`` float64, one per bin of timesteps.
        high: Highest values, ``[bins]``.
        bits: Bits per code.
    """

    def __init__(self, low: Tensor, high: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.first, self.zero_point = (part.to(torch.float32) for part in affine_parameters(low, high, bits))
        # The logarithm of how much a step has grown, so that one learning rate suits steps of all sizes.
        self.growth = nn.Parameter(torch.zeros_like(self.first))

    def forward(self, x: Tensor, bins: Tensor | None) -> Tensor:
        """The dequantized value; ``bins`` has the bin of each sample, or is None for one bin."""
        step, zero = self.first * self.growth.exp(), self.zero_point
        if bins is not None:
            step, zero = (part[bins].reshape(-1, *[1] * (x.dim() - 1)) for part in (step, zero))
        codes = (round_through(x / step) + zero).clamp(0, 2**self.bits - 1)
        return ((codes - zero) * step).to(x.dtype)

    @torch.no_grad()
    def range(self) -> tuple[list[float], list[float]]:
        """Lowest and highest values of the learned grids, one per bin."""
        step, zero = (self.first * self.growth.exp()).double(), self.zero_point.double()
        return (-zero * step).tolist(), ((2**self.bits - 1 - zero) * step).tolist()


class TokenSteps(nn.Module):
    """A grid for each token, found at run time; nothing is learned."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor, bins: Tensor | None) -> Tensor:
        """The dequantized value."""
        low, high = torch.aminmax(x.detach().float(), dim=-1, keepdim=True)
        step, zero = (part.to(torch.float32) for part in affine_parameters(low, high, self.bits))
        codes = (round_through(x / step) + zero).clamp(0, 2**self.bits - 1)
        return ((codes - zero) * step).to(x.dtype)


def round_through(x: Tensor) -> Tensor:
    """Round; gradients pass unchanged."""
    return x + (x.round() - x).detach()
