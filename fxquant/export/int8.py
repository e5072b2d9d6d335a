"""Writes the codes of a quantized model as vLLM-Omni reads int8 checkpoints: one scale per row, ranges at run time."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fxquant.export.checkpoints import linears, write_checkpoint
from fxquant.export.weights import class_weights, refuse_grids, require_codes
from fxquant.runtime.lora import refuse_loaded
from fxquant.runtime.model import quantized_model


def export_int8(model: nn.Module, folder: str | Path, *, original: nn.Module | None = None) -> Path:
    """Write a quantized model as a folder of diffusers with int8 weights, in the form that vLLM-Omni calls ``int8``.

    For each quantized linear the tensors are ``weight`` (int8 ``[out, in]``) and ``weight_scale`` (float32
    ``[out, 1]``). Everything else is float. ``quantization_config`` in ``config.json`` names the method, and the
    linears that stay float. vLLM-Omni rounds activations to int8 per token when the model runs.

    Args:
        model: What :func:`fxquant.compile` or :func:`fxquant.load` returned, with the backend ``fake-quant``.
        folder: A new or empty folder.
        original: The float model. Tensors that no call reads, because the class does not use them, are taken from it.

    Returns:
        The folder.

    Raises:
        ConfigurationError: If a layer has weight groups or a grid that is not symmetric about 0, or the graph is not
            that of the class; see :func:`~fxquant.export.weights.class_weights`.
        BackendError: If the model was lowered to another backend.
        CheckpointError: If the folder exists and is not empty.
    """
    model, _ = quantized_model(model, "export_int8")
    refuse_loaded(model, "vLLM-Omni's int8 form")
    require_codes(model, "vLLM-Omni's int8 form")
    found = class_weights(model, "vLLM-Omni's int8 form", original)
    refuse_grids(found, "vLLM-Omni's int8 form")
    tensors = dict(found.floats)
    for name, weight in found.codes.items():
        tensors[f"{name}.weight"] = weight.signed
        tensors[f"{name}.weight_scale"] = weight.scale.float()
    skeleton = model.architecture.skeleton
    config = {
        "quant_method": "int8",
        "activation_scheme": "dynamic",
        "ignored_layers": sorted(set(linears(skeleton)) - found.codes.keys()),
    }
    return write_checkpoint(skeleton, tensors, config, folder)
