"""Writes the graphs of a quantized model as ONNX files with QuantizeLinear and DequantizeLinear nodes.

Codes of weights are stored as integers with their scales and zero points, per channel or in groups. Activations are
quantized with one static range. What ONNX cannot hold is refused, with the layers (:mod:`fxquant.export.limits`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional

from fxquant.capture.calls import BATCH, TRACED_BATCH
from fxquant.capture.exporting import export
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.threads import tracing_alone, without_autocast
from fxquant.disk.folders import whole_folder
from fxquant.errors import BackendError
from fxquant.export.limits import (
    doubles_of_graphs,
    format_of_weight,
    formats_of_graphs,
    ranges_of_graphs,
    refuse,
    refuse_full,
    require,
)
from fxquant.ir.arguments import args
from fxquant.ir.ops import dequantize_weight
from fxquant.ir.ops.low_rank import with_branch
from fxquant.ir.tensors import copy_graph, get_tensor, set_tensor
from fxquant.numerics import grids
from fxquant.numerics.formats import bits_of, top_of
from fxquant.numerics.hadamard import rotate
from fxquant.numerics.packing import unpack
from fxquant.runtime.given import quantized_model
from fxquant.runtime.lora import refuse_loaded

OPSET = 21
"""Version of the ONNX operators: the first with weights in groups."""

GRAPH_FILE = "model-{}.onnx"
_ops = torch.ops.fxquant
_WEIGHTS = (_ops.linear.default, _ops.conv2d.default, _ops.dequantize_weight.default)
_LARGEST = 1 << 30  # Bytes of tensors in one file; an ONNX file cannot exceed 2 GiB.


@dataclass(frozen=True)
class OnnxExport:
    """The result of an export.

    Attributes:
        files: The files, one per kind of call.
        inputs: For each file the names of its inputs, those of the model's ``forward``.
    """

    files: tuple[Path, ...]
    inputs: tuple[tuple[str, ...], ...]


def export_onnx(model: nn.Module, folder: str | Path) -> OnnxExport:
    """Write a quantized model as ONNX, one file per kind of call, with QuantizeLinear and DequantizeLinear nodes.

    The batch stays open where the model allows it. The result computes what the backend ``fake-quant`` computes, up to
    the rounding of floating-point sums.

    Args:
        model: What :func:`fxquant.compile` or :func:`fxquant.load` returned, with the backend ``fake-quant``.
        folder: A new or empty folder.

    Raises:
        ConfigurationError: If the model is not quantized, or a layer has something that ONNX cannot hold: ranges that
            depend on the timestep or the token, or float64. The message lists layers, and what would fit.
        BackendError: If the model was lowered to another backend, or the graph cannot be written.
        MissingPackageError: If ``onnx`` or ``onnxscript`` is not installed.
        CheckpointError: If the folder exists and is not empty.
    """
    model, _ = quantized_model(model, "export_onnx")
    refuse_loaded(model, "ONNX")
    require("onnx", "onnxscript")
    if model.backend is not None and model.backend.name != "fake-quant":
        raise BackendError(
            f"this model was lowered to the backend {model.backend.name}, whose ops ONNX does not have; load it with "
            'fxquant.load(folder, backend="fake-quant"), or compile it with that backend'
        )
    graphs = [captured.module.graph for captured in model.captured]
    refuse("ONNX", formats_of_graphs(graphs), "compile with integers and scales per channel or group, as in w8a8")
    refuse("ONNX", ranges_of_graphs(graphs), "compile with static ranges for all timesteps, such as smoothquant-w8a8")
    refuse("ONNX", doubles_of_graphs(graphs), "QuantizeLinear takes float32 at most: quantize the model in float32")
    files, inputs = [], []
    folder = Path(folder).resolve()
    with whole_folder(folder, refuse_full) as written:
        for number, captured in enumerate(model.captured):
            name = GRAPH_FILE.format(number)
            inputs.append(_write(captured, written / name))
            files.append(folder / name)
    return OnnxExport(tuple(files), tuple(inputs))


def _write(captured: CapturedGraph, path: Path) -> tuple[str, ...]:
    """Write one graph; returns the names of its inputs."""
    module, names = _Standard(_with_codes(captured.module)), tuple(name for name, _ in captured.call.tensors)
    example, shapes = [], []
    for _, spec in captured.call.tensors:
        example.append(torch.zeros(spec.concrete(TRACED_BATCH), dtype=spec.dtype))
        shapes.append({axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if size == BATCH})
    try:
        with tracing_alone(), without_autocast("cpu"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of the exporter, about itself.
            exported = export(module, example, {}, (tuple(shapes),))
            program = torch.onnx.export(
                exported, dynamo=True, opset_version=OPSET, input_names=names, optimize=False, verbose=False
            )
    except Exception as error:
        raise BackendError(
            f"the graph of the call {captured.call} cannot be written as ONNX: {type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0]}"
        ) from error
    assert program is not None
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    program.save(str(path), external_data=size > _LARGEST)
    return names


def _with_codes(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph whose ops read the codes of weights unpacked, one byte per code."""
    made = copy_graph(module)
    unpacked: dict[str, fx.Node] = {}
    for node in list(made.graph.nodes):
        if node.target not in _WEIGHTS or args(node).node("wq").op != "get_attr":
            continue
        packed, bits = args(node).node("wq"), bits_of(format_of_weight(node))
        name = f"{packed.target}_codes"
        if name not in unpacked:
            wq = get_tensor(made, str(packed.target))
            set_tensor(made, name, unpack(wq, bits, _inputs_of(node)))
            with made.graph.inserting_before(packed):
                unpacked[name] = made.graph.get_attr(name)
        node.replace_input_with(packed, unpacked[name])
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


def _inputs_of(node: fx.Node) -> int:
    """Number of codes per row of the weight of a quantized op."""
    if node.target is _ops.linear.default:
        return int(args(node).node("xq").meta["val"].shape[-1])
    return (
        int(args(node).in_features) if node.target is _ops.dequantize_weight.default else math.prod(args(node).kernel)
    )


class _Standard(nn.Module):
    """Runs a graph with ops that ONNX has in place of those of fxquant."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return _Translating(self.module).run(*inputs)


class _Translating(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        if n.target in _DIFFERENT:
            values, named = self.fetch_args_kwargs_from_env(n)
            return _DIFFERENT[n.target](*values, **named)
        if n.target not in _TRANSLATED:
            return super().run_node(n)
        values, named = self.fetch_args_kwargs_from_env(n)
        packed = n.target is _ops.dequantize_weight.default and args(n).node("wq").op != "get_attr"
        if packed:
            return dequantize_weight(*values, **named)
        arguments = n.target._schema.arguments  # type: ignore[union-attr]
        given = dict(zip((one.name for one in arguments), values, strict=False)) | named
        return _TRANSLATED[n.target](SimpleNamespace(**given))


def _squeeze(x: Tensor, dim: int | Sequence[int]) -> Tensor:
    """Drop those of these dimensions that have size 1. ONNX refuses to squeeze others, which torch leaves alone."""
    wanted = [dim] if isinstance(dim, int) else list(dim)
    for one in sorted({axis % x.dim() for axis in wanted}, reverse=True):
        if statically_known_true(x.shape[one] == 1):
            x = x.squeeze(one)
    return x


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """The source in the shape and dtype of x. torch's own translation leaves out the shape."""
    return source.to(x.dtype).expand(x.shape)


_DIFFERENT: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.squeeze.dim: _squeeze,
    torch.ops.aten.squeeze.dims: _squeeze,
    torch.ops.aten.copy.default: _copy,
}
"""Ops of torch whose translation to ONNX is not what they compute, each with a function that is."""


def _quantize(op: SimpleNamespace) -> Tensor:
    dtype, top = torch.uint8, top_of(op.format)
    inputs = (op.x, op.scale.reshape(()).to(op.x.dtype), op.zero_point.reshape(()).to(dtype))
    codes: Tensor = torch.onnx.ops.symbolic("QuantizeLinear", inputs, dtype=dtype, shape=op.x.shape, version=OPSET)
    if top == torch.iinfo(dtype).max:
        return codes
    # Codes of fewer bits; ONNX has no Clip for bytes that all runtimes support.
    return codes.to(torch.int32).clamp(0, top).to(dtype)


def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype, **options: int) -> Tensor:
    inputs = (codes, scale.to(dtype), zero_point.to(codes.dtype))
    found: Tensor = torch.onnx.ops.symbolic(
        "DequantizeLinear", inputs, dict(options), dtype=dtype, shape=codes.shape, version=OPSET
    )
    return found


def _weight(codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weight of codes ``[out, in]`` whose grids are ``[out, groups]``."""
    if group_size:
        return _dequantize(codes, scale, zero_point, dtype, axis=1, block_size=group_size)
    return _dequantize(codes, scale.flatten(), zero_point.flatten(), dtype, axis=0)


def _activation(codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    return _dequantize(codes, scale.reshape(()), zero_point.reshape(()), dtype)


def _linear(op: SimpleNamespace) -> Tensor:
    dtype = grids.compute_dtype(op.out_dtype)
    x = _activation(op.xq, op.x_scale, op.x_zero_point, dtype)
    y = functional.linear(x, _weight(op.wq, op.w_scale, op.w_zero_point, op.group_size, dtype))
    return (y if op.bias is None else y + op.bias.to(dtype)).to(op.out_dtype)


def _conv2d(op: SimpleNamespace) -> Tensor:
    dtype, bias = grids.compute_dtype(op.out_dtype), op.bias
    x = _activation(op.xq, op.x_scale, op.x_zero_point, dtype)
    weight = _weight(op.wq, op.w_scale, op.w_zero_point, 0, dtype).unflatten(1, op.kernel)
    y = functional.conv2d(x, weight, None, op.stride, op.padding, op.dilation, op.groups)
    if bias is not None:
        y = y + (bias.reshape(-1, 1, 1) if bias.dim() == 1 else bias).to(dtype)
    return y.to(op.out_dtype)


def _matmul(op: SimpleNamespace) -> Tensor:
    dtype = grids.compute_dtype(op.out_dtype)
    a = _activation(op.aq, op.a_scale, op.a_zero_point, dtype)
    b = _activation(op.bq, op.b_scale, op.b_zero_point, dtype)
    return torch.matmul(a, b).to(op.out_dtype)


def _stored_weight(op: SimpleNamespace) -> Tensor:
    return _weight(op.wq, op.scale, op.zero_point, op.group_size, op.dtype)


def _affine(op: SimpleNamespace) -> Tensor:
    dtype = grids.compute_dtype(op.x.dtype)
    y = op.x.to(dtype) * op.scale.to(dtype)
    return (y if op.shift is None else y + op.shift.to(dtype)).to(op.x.dtype)


def _hadamard(op: SimpleNamespace) -> Tensor:
    return rotate(op.x.to(grids.compute_dtype(op.x.dtype)), op.signs, op.block).to(op.x.dtype)


def _low_rank(op: SimpleNamespace) -> Tensor:
    return with_branch(op.y, op.x, op.a, op.b, op.offset, op.strength)


_TRANSLATED: dict[Any, Callable[[SimpleNamespace], Tensor]] = {
    _ops.quantize.default: _quantize,
    _ops.linear.default: _linear,
    _ops.conv2d.default: _conv2d,
    _ops.matmul.default: _matmul,
    _ops.dequantize_weight.default: _stored_weight,
    _ops.channel_affine.default: _affine,
    _ops.hadamard.default: _hadamard,
    _ops.low_rank.default: _low_rank,
}
"""For each op of fxquant a function of its arguments by the names in the op's schema; `wq` holds unpacked codes."""
