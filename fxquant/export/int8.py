"""Writes the codes of a quantized model as vLLM-Omni reads int8 checkpoints: one scale per row, ranges at run time."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fxquant.export.checkpoints import linears, write_checkpoint
from fxquant.export.weights import codes_for, rows_of

_FORM = "vLLM-Omni's int8 form"


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
    model, found = codes_for(model, "export_int8", _FORM, original)
    tensors = rows_of(found, _FORM)
    skeleton = model.architecture.skeleton
    config = {
        "quant_method": "int8",
        "activation_scheme": "dynamic",
        "ignored_layers": sorted(set(linears(skeleton)) - found.codes.keys()),
    }
    return write_checkpoint(skeleton, tensors, config, folder)
