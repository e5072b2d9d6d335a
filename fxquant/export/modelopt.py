"""Writes a balanced float model in float8, in the form that ModelOpt writes and SGLang-Diffusion and vLLM-Omni read.

Facts about the form: a quantized linear has ``weight`` (float8 e4m3 ``[out, in]``) and two float32 numbers,
``weight_scale`` and ``input_scale``. ``quantization_config`` in ``config.json`` has the method ``modelopt``, the
algorithm ``FP8`` and, under ``ignore``, the layers that stay float.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fxquant.errors import ConfigurationError
from fxquant.export.checkpoints import linears, write_checkpoint
from fxquant.export.float8 import float_tensors, input_scales, rounded
from fxquant.runtime.float_model import check_model


def export_modelopt(model: nn.Module, folder: str | Path) -> Path:
    """Write a model that :func:`fxquant.balance` made as a folder of diffusers with float8 (e4m3) weights.

    Linears that the balancing considered are written in float8, with static scales: those of their weights, and those
    with which all inputs that calibration saw fit. Everything else keeps its dtype.

    Args:
        model: What :func:`fxquant.balance` returned. Its report holds the ranges.
        folder: A new or empty folder.

    Returns:
        The folder.

    Raises:
        ConfigurationError: If the model has no such report, or not plain floating-point weights.
        NonFiniteError: If a weight holds NaN or infinity.
        CheckpointError: If the folder exists and is not empty.
    """
    check_model(model)
    tensors, scales = float_tensors(model), input_scales(model)
    found = [name for name in linears(model) if name in scales]
    if not found:
        raise ConfigurationError(
            f"float8 with static scales needs the ranges of activations, and this {type(model).__name__} has none; "
            "give export_modelopt what fxquant.balance returned"
        )
    for name in found:
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = rounded(tensors[f"{name}.weight"])
        tensors[f"{name}.input_scale"] = scales[name]
    ignored = sorted(set(linears(model)) - set(found))
    return write_checkpoint(
        model, tensors, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ignored}, folder
    )
