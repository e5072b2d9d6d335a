"""Rounds the linears of a float model to float8 (e4m3) with one scale each, for formats that hold such weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import ConfigurationError
from fxquant.export.balance_report import BalanceReport
from fxquant.export.limits import refuse_fused
from fxquant.runtime.float_model import check_storage, check_weights, refuse_adapters

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
