"""Replace convolutions by quantized ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.errors import ConfigurationError
from fxquant.ir.arguments import args
from fxquant.ir.meta import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.passes._inputs import InputRange, quantized_input
from fxquant.passes._quantization import is_quantized, quantized_weight
from fxquant.passes._rounders import RangeSearch
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.plan import Plan

aten = torch.ops.aten

_ONE_DIMENSION = (aten.conv1d.default, aten.conv1d.padding)


@register_pass
@dataclass(frozen=True)
class QuantizeConvolutions(Pass):
    """Quantize convolutions of one and two dimensions, such as the patch embedding.

    Before::

        y = conv2d(x, W, bias, stride, padding)

    After::

        y = fxquant.conv2d(fxquant.quantize(x, s, z), s, z, W_packed, W_scale, W_zero_point, bias, ...)

    The weight is treated as a matrix ``[out, in * kh * kw]`` with one grid per output channel. A conv1d becomes a
    conv2d over an image of one row; ``padding="same"`` becomes explicit numbers. With float activations only the weight
    is stored in few bits, also the weight of a conv3d. The attributes are those of
    :class:`~fxquant.passes.quantize_linears.QuantizeLinears`.
    """

    name: ClassVar[str] = "quantize-convolutions"
    tier: ClassVar[Tier] = Tier.LOSSY
    requires: ClassVar[Stage] = Stage.QUANTIZED
    establishes: ClassVar[Stage] = Stage.QUANTIZED
    keeps_inputs: ClassVar[bool] = True

    weight_range: RangeSearch = RangeSearch.MINMAX
    activation_range: InputRange = InputRange.MINMAX
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.activation_range is InputRange.DYNAMIC:
            raise ConfigurationError(
                "quantize-convolutions: a convolution mixes tokens, so its input has one range; choose minmax, "
                "percentile or mse"
            )

    def check_graph(self, graph: fx.Graph, plan: Plan) -> None:
        for node in graph.nodes:
            if LAYER in node.meta and plan.layer(node.meta[LAYER]).activation_bits is not None:
                _refuse(node, plan)

    def decides(self, name: str, layer: LayerPlan) -> bool:
        """Whether the pass quantizes a layer."""
        return layer.kind == "conv" and layer.weight_bits is not None

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        for node in list(graph.nodes):
            if LAYER not in node.meta or "conv" not in str(node.target) or "fxquant" in str(node.target):
                continue
            layer = context.plan.layer(node.meta[LAYER])
            weight = args(node).node("weight")
            if layer.weight_bits is None or is_quantized(weight):
                continue
            kernel = [int(size) for size in weight.meta["val"].shape[1:]]
            dtype = node.meta["val"].dtype
            if layer.activation_bits is not None:
                _refuse(node, context.plan)
            with rewriter.before(node):
                w = quantized_weight(node, context, rewriter, self.weight_range, self.symmetric)
                if layer.activation_bits is None:
                    arguments = (w.codes, w.scale, w.zero_point, w.format, 0, layer.shape[1], dtype)
                    values = rewriter.call(
                        torch.ops.fxquant.dequantize_weight.default, arguments, [weight, node], layer=True
                    )
                    shaped = rewriter.call(aten.view.default, (values, [layer.shape[0], *kernel]), [weight], layer=True)
                    rewriter.redirect(node, weight, shaped)
                    continue
                options = _options(node)
                x = _padded(node, options["pad"], rewriter)
                if node.target in _ONE_DIMENSION:  # An image of one row.
                    x = rewriter.call(aten.unsqueeze.default, (x, -2), [node], layer=True)
                    kernel.insert(1, 1)
                q = quantized_input(node, x, context, rewriter, self.activation_range)
                new = rewriter.call(
                    torch.ops.fxquant.conv2d.default,
                    (*q[:3], *w[:3], options["bias"], q.format, w.format, kernel,
                     options["stride"], options["padding"], options["dilation"], options["groups"], dtype),
                    sources=[node], layer=True)  # fmt: skip
                if node.target in _ONE_DIMENSION:
                    new = rewriter.call(aten.squeeze.dim, (new, -2), [node], layer=True)
            rewriter.replace(node, new)


def _refuse(node: fx.Node, plan: Plan) -> None:
    """Raise ConfigurationError if there is no quantized op for a convolution."""
    name = node.meta[LAYER]
    why = None
    if node.target in (aten.conv3d.default, aten.conv3d.padding):
        why = "quantized activations are only supported for conv1d and conv2d, not for conv3d"
    elif args(node).node("input").meta["val"].dim() < args(node).node("weight").meta["val"].dim():
        why = "its input has no batch axis, which quantized activations need"
    if why is not None:
        raise ConfigurationError(
            f"layer {name}: {why}; keep it float, or quantize only its weight: "
            f"assign-precision{{overrides={name}=w{plan.layer(name).weight_bits}a16}}"
        )


def _padded(node: fx.Node, pad: list[int], rewriter: Rewriter) -> fx.Node:
    """The input of a convolution, with the zeros that only one side needs. Zero has an exact code."""
    x = args(node).node("input")
    return rewriter.call(aten.constant_pad_nd.default, (x, pad), [node], layer=True) if any(pad) else x


def _options(node: fx.Node) -> dict[str, Any]:
    """Arguments of a convolution as conv2d arguments, by name; ``pad`` is for ``constant_pad_nd`` on the input."""
    found = args(node).by_name()
    sizes = found["weight"].meta["val"].shape[2:]
    rank = len(sizes)
    for name in ("stride", "dilation"):
        found[name] = _each(found[name], rank)
    pad = [0] * 2 * rank
    if isinstance(found["padding"], str):
        same = found["padding"] == "same"
        total = [step * (int(size) - 1) * same for size, step in zip(sizes, found["dilation"], strict=True)]
        found["padding"] = [both // 2 for both in total]
        # An odd total puts its last zero at the end. constant_pad_nd takes the last axis first.
        pad = [end for both in reversed(total) for end in (0, both % 2)]
    else:
        found["padding"] = _each(found["padding"], rank)
    if rank == 1:
        for name, neutral in (("stride", 1), ("padding", 0), ("dilation", 1)):
            found[name] = [neutral, *found[name]]
    return {**found, "pad": pad}


def _each(value: int | Sequence[int], rank: int) -> list[int]:
    """One number per dimension. A single number applies to all dimensions."""
    given = [value] if isinstance(value, int) else list(value)
    return given * (rank // len(given))
