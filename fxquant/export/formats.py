"""The forms in which ``fxquant export --format`` writes a quantized model, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxquant.export.comfyui import export_comfyui
from fxquant.export.compressed_tensors import export_compressed_tensors
from fxquant.export.int8 import export_int8
from fxquant.export.onnx import export_onnx
from fxquant.export.openvino import export_openvino

FORMATS: dict[str, Callable[..., Any]] = {
    "onnx": export_onnx,
    "openvino": export_openvino,
    "compressed-tensors": export_compressed_tensors,
    "comfyui": export_comfyui,
    "int8": export_int8,
}
"""Each takes the quantized model and a new folder."""
