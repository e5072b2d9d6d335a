"""Linears in the float format e4m3: an operator of this package, and the pass that inserts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.authoring import (
    Decision,
    Pass,
    PassContext,
    Rewriter,
    Stage,
    Tier,
    args,
    layer_input,
    linears_to_quantize,
    made_from,
    register_op,
    register_pass,
)

E4M3, LARGEST = torch.float8_e4m3fn, 448.0


@torch.library.custom_op("example_passes::round_e4m3", mutates_args=())
def round_e4m3(x: Tensor, scale: float) -> Tensor:
    """Round ``x / scale`` to e4m3 and multiply by the scale: the shape and dtype of ``x``."""
    return decode(encode(x, torch.tensor(scale)), torch.tensor(scale), x.dtype)


@torch.library.custom_op("example_passes::decode_e4m3", mutates_args=())
def decode_e4m3(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` of ``dtype`` from the bytes of e4m3 numbers, uint8 ``[out, in]``, and ``[out, 1]``."""
    return decode(codes, scale, dtype)


@round_e4m3.register_fake
def _(x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


@decode_e4m3.register_fake
def _(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


def encode(x: Tensor, scale: Tensor) -> Tensor:
    """The bytes of ``x / scale`` in e4m3, uint8; larger numbers are clamped."""
    return (x / scale).clamp(-LARGEST, LARGEST).to(E4M3).view(torch.uint8)


def decode(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that bytes in e4m3 stand for, times the scale."""
    return codes.view(E4M3).to(scale.dtype).mul(scale).to(dtype)


ops = torch.ops.example_passes
register_op(Stage.QUANTIZED, ops.round_e4m3)
register_op(Stage.QUANTIZED, ops.decode_e4m3)


@dataclass
class Float8(Decision, of="quantize-e4m3"):
    """The scale of a layer's input; its weight has one scale per output channel, which follows from the weight."""

    input_scale: float


@register_pass
@dataclass(frozen=True)
class QuantizeE4M3(Pass):
    """Quantize linears to the float format e4m3: 4 bits of exponent, 3 of mantissa, up to 448.

    Before::

        y = linear(x, W, bias)

    After::

        y = linear(round_e4m3(x, s), decode_e4m3(codes, scales), bias)

    It takes over the linears whose weights and inputs the recipe quantizes, before ``quantize-linears``. Their relative
    error is at most 1/16, except below ``2**-6 s``, where the absolute error is at most ``2**-10 s``.
    """

    name: ClassVar[str] = "quantize-e4m3"
    tier: ClassVar[Tier] = Tier.LOSSY
    requires: ClassVar[Stage] = Stage.QUANTIZED
    establishes: ClassVar[Stage] = Stage.QUANTIZED

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        decided = context.plan.decisions_of(Float8)
        for layer in linears_to_quantize(graph, context.plan, decided):
            name, node, x, weight = layer.name, layer.node, layer.input, layer.weight
            if name not in decided:
                decided[name] = Float8(float(layer_input(context, name).absmax.max().clamp(min=1e-30)) / LARGEST)
                layer.plan.weight_bits = layer.plan.activation_bits = None
                layer.plan.reason = f"{self.name} rounds its weight and its input to e4m3"
            values, history = rewriter.tensor(weight), rewriter.history(weight)
            scale = values.double().abs().amax(1, keepdim=True).clamp(min=1e-30).div(LARGEST).float()
            packed = [
                rewriter.constant(f"{name}.{what}", value, [weight], made_from(what, history))
                for what, value in (("e4m3", encode(values, scale)), ("e4m3_scale", scale))
            ]
            with rewriter.before(node):
                key = (x, decided[name].input_scale)
                if key not in rewriter.memo:
                    rewriter.memo[key] = rewriter.call(ops.round_e4m3.default, key, [x])
                decoded = rewriter.call(ops.decode_e4m3.default, (*packed, node.meta["val"].dtype), [weight])
            rewriter.redirect(node, args(node).node("weight"), decoded)
            rewriter.redirect(node, x, rewriter.memo[key])
