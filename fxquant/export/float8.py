"""Linears in float8 (e4m3) with one scale each, for formats that hold such weights: rounded here or before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.errors import ConfigurationError
from fxquant.export.balance_report import BalanceReport
from fxquant.export.limits import ranges_of_graphs, refuse, refuse_fused
from fxquant.export.weights import IN_PLACE as INTEGERS_IN_PLACE
from fxquant.export.weights import Codes
from fxquant.ir.arguments import args
from fxquant.ir.tensors import get_tensor
from fxquant.runtime.float_model import check_storage, check_weights, refuse_adapters
from fxquant.runtime.model import GraphModel

FORMAT = "fp8"
"""The number format whose codes are float8 (e4m3)."""

IN_PLACE = INTEGERS_IN_PLACE.replace("precision=w8a8", "precision=wfp8afp8-tensor")
"""A recipe whose result these formats hold."""

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def float_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of a float model's state dict, on the CPU.

    Raises:
        ConfigurationError: If it is not a model with plain floating-point weights: it has adapters, fused projections,
            weights without values, or weights that another package quantized.
        NonFiniteError: If a weight holds NaN or infinity.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"a {type(model).__name__} is not a model; give pipe.transformer")
    refuse_adapters(model)
    refuse_fused(model)
    check_storage(model)
    check_weights(model)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def linears_in_blocks(model: nn.Module) -> list[str]:
    """Names of the linears that are inside of numbered blocks.

    Raises:
        ConfigurationError: If there are none.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name in linears if any(part.isdecimal() for part in name.split("."))]
    if not found:
        raise ConfigurationError(f"no linear of this {type(model).__name__} is inside of a numbered block")
    return found


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as float8 codes and their scale, float32 without dimensions: ``weight = codes * scale``."""
    weight = weight.float()
    scale = (weight.abs().max() / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def input_scales(model: nn.Module) -> dict[str, Tensor]:
    """For each linear whose inputs :func:`fxquant.balance` has seen, the scale with which all of them fit float8.

    Empty for other models.
    """
    report = getattr(model, "balance_report", None)
    layers = report.layers if isinstance(report, BalanceReport) else ()
    return {layer.name: torch.tensor(layer.largest / LARGEST) for layer in layers if layer.largest > 0}


def scales_of(
    model: GraphModel, weights: Mapping[str, Codes], format_name: str
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """For each linear of the format ``fp8``, the scale of its weight and that of its input, float32 without dimensions.

    The scale of the input is None if the input stays float.

    Args:
        model: A quantized model with the backend ``fake-quant``.
        weights: Its weights of this format, by layer.
        format_name: Name of the format that is written, for messages.

    Raises:
        ConfigurationError: If a weight has several scales, or an input another format or no scale that holds for all
            calls. The message lists the layers, and a precision that fits.
    """
    reasons: dict[str, list[str]] = {}
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    unfit = ranges_of_graphs([captured.module.graph for captured in model.captured])
    moving = {name: reason for reason, names in unfit.items() for name in names}
    inputs = dict(part for captured in model.captured for part in _inputs(captured.module))
    for name, weight in weights.items():
        format, scale = inputs.get(name, (None, None))
        if weight.scale.numel() != 1:
            reasons.setdefault("float8 weights with several scales", []).append(name)
        elif name in moving:
            reasons.setdefault(f"inputs in float8 where {moving[name]}", []).append(name)
        elif format not in (None, FORMAT):
            reasons.setdefault(f"float8 weights with inputs in {format}", []).append(name)
        else:
            found[name] = weight.scale.float().reshape(()), None if scale is None else scale.float().reshape(())
    refuse(format_name, reasons, f"use one scale per weight and one range for all calls, such as\n  {IN_PLACE}")
    return found


def _inputs(module: fx.GraphModule) -> Iterator[tuple[str, tuple[str, Tensor | None]]]:
    """The linears with quantized inputs, with the format of the input and its scale, if there is one for all calls."""
    for node in module.graph.nodes:
        if node.target is torch.ops.fxquant.linear.default:
            given = args(node)
            scale = given.node("x_scale")
            held = get_tensor(module, str(scale.target)) if scale.op == "get_attr" else None
            yield str(given.node("wq").target).removesuffix(".weight_packed"), (str(given.x_format), held)
