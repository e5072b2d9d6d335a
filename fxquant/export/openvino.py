"""Writes the graphs of a quantized model as OpenVINO IR."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from fxquant.disk.folders import whole_folder
from fxquant.errors import BackendError, WriteError
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
        WriteError: If it cannot be written.
    """
    require("openvino", "onnx", "onnxscript")
    import openvino

    folder, names = Path(folder).resolve(), []
    with whole_folder(folder, refuse_full) as written:
        scratch = written / "onnx"  # On the disk of the result: a model may not fit into the folder of temporary files.
        for number, file in enumerate(export_onnx(model, scratch).files):
            names.append(GRAPH_FILE.format(number))
            _write(openvino, _read(openvino, file), written / names[-1], folder)
        shutil.rmtree(scratch)
    return tuple(folder / name for name in names)


def _write(openvino: Any, graph: Any, file: Path, folder: Path) -> None:
    try:
        openvino.save_model(graph, file, compress_to_fp16=False)
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        raise WriteError(f"{folder} cannot be written: {first}; check the disk, or choose another place") from error


def _read(openvino: Any, file: Path) -> Any:
    try:
        return openvino.convert_model(file)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise BackendError(f"OpenVINO cannot read the graph: {first}; use --format onnx") from error
