"""Writes the graphs of a quantized model as OpenVINO IR."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from fxquant.disk.folders import whole_folder
from fxquant.errors import BackendError
from fxquant.export.limits import refuse_full, require
from fxquant.export.onnx import export_onnx

GRAPH_FILE = "model-{}.xml"


def export_openvino(model: nn.Module, folder: str | Path) -> tuple[Path, ...]:
    """Write a quantized model as OpenVINO IR, one ``model-<n>.xml`` with its ``.bin`` per kind of call.

    OpenVINO reads the ONNX form of :func:`~fxquant.export.onnx.export_onnx`, and keeps its quantization.

    Args:
        model: As for :func:`~fxquant.export.onnx.export_onnx`.
        folder: A new or empty folder.

    Returns:
        The ``.xml`` files.

    Raises:
        ConfigurationError: As for :func:`~fxquant.export.onnx.export_onnx`.
        BackendError: If OpenVINO cannot read the graph.
        MissingPackageError: If ``openvino``, ``onnx`` or ``onnxscript`` is not installed.
        CheckpointError: If the folder exists and is not empty.
    """
    require("openvino", "onnx", "onnxscript")
    import openvino

    folder, names = Path(folder).resolve(), []
    with tempfile.TemporaryDirectory() as scratch, whole_folder(folder, refuse_full) as written:
        for number, file in enumerate(export_onnx(model, Path(scratch) / "onnx").files):
            names.append(GRAPH_FILE.format(number))
            openvino.save_model(_read(openvino, file), written / names[-1], compress_to_fp16=False)
    return tuple(folder / name for name in names)


def _read(openvino: Any, file: Path) -> Any:
    try:
        return openvino.convert_model(file)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise BackendError(f"OpenVINO cannot read the graph: {first}; use --format onnx") from error
