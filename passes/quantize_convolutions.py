"""Replace convolutions by quantized ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.capture import LAYER
from fxquant.errors import ConfigurationError
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.passes._quantization import InputRange, RangeSearch, is_quantized, quantized_input, quantized_weight
from fxquant.pipeline import Pass, Tier, register_pass
from fxquant.plan import Plan


@register_pass
@dataclass(frozen=True)
class QuantizeConvolutions(Pass):
    """Quantize two-dimensional convolutions such as the patch embedding.

    Before::

        y = conv2d(x, W, bias, stride, padding)

    After::

        y = fxquant.conv2d(fxquant.quantize(x, s, z), s, z, W_packed, W_scale, W_zero_point, bias, ...)

    The weight is taken as a matrix ``[out, in * kh * kw]`` with one grid an output channel. For float activations the
    weight alone is stored in few bits. Attributes as in :class:`~fxquant.passes.quantize_linears.QuantizeLinears`.
    """

    name: ClassVar[str] = "quantize-convolutions"
    tier: ClassVar[Tier] = Tier.LOSSY
    requires: ClassVar[Stage] = Stage.QUANTIZED
    establishes: ClassVar[Stage] = Stage.QUANTIZED

    weight_range: RangeSearch = RangeSearch.MINMAX
    activation_range: InputRange = InputRange.MINMAX
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.activation_range is InputRange.DYNAMIC:
            raise ConfigurationError("quantize-convolutions: a convolution mixes tokens, so its input has one range")

    def run(self, graph: fx.Graph, plan: Plan, rewriter: Rewriter) -> None:
        for node in list(graph.nodes):
            if LAYER not in node.meta or "conv" not in str(node.target) or "fxquant" in str(node.target):
                continue
            layer = plan.layer(node.meta[LAYER])
            if layer.weight_bits is None or is_quantized(node.args[1]):
                continue
            weight = node.args[1]
            kernel = [int(size) for size in weight.meta["val"].shape[1:]]
            dtype = node.meta["val"].dtype
            with rewriter.before(node):
                packed = quantized_weight(node, plan, rewriter, self.weight_range, self.symmetric)
                if layer.activation_bits is None or node.target is not torch.ops.aten.conv2d.default:
                    if layer.activation_bits is not None:
                        raise ConfigurationError(
                            f"layer {node.meta[LAYER]}: quantized activations are only there for conv2d, not "
                            f"{node.target}; keep it float or give it w{layer.weight_bits}a16 in the overrides"
                        )
                    arguments = (*packed, layer.weight_bits, 0, layer.shape[1], dtype)
                    values = rewriter.call(torch.ops.fxquant.dequantize_weight.default, arguments, [weight, node])
                    shaped = rewriter.call(torch.ops.aten.view.default, (values, [layer.shape[0], *kernel]), [weight])
                    rewriter.redirect(node, weight, shaped)
                    continue
                options = _options(node)
                codes, scale, zero_point = quantized_input(node, node.args[0], plan, rewriter, self.activation_range)
                new = rewriter.call(
                    torch.ops.fxquant.conv2d.default,
                    (codes, scale, zero_point, *packed, options.pop("bias"), layer.weight_bits, kernel,
                     options["stride"], options["padding"], options["dilation"], options["groups"], dtype),
                    sources=[node],
                )  # fmt: skip
            rewriter.replace(node, new)


def _options(node: fx.Node) -> dict[str, Any]:
    """Arguments of a conv2d by name, pairs spelled out."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    found = {"bias": None, "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1} | given
    for name in ("stride", "padding", "dilation"):
        value = found[name]
        found[name] = [value, value] if isinstance(value, int) else list(value)
        found[name] *= 2 // len(found[name])
    return found
