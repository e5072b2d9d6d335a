"""Alternatives to fxquant, each run in the fastest way that its own documentation describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cpu.systems import Run, Stored, System
from benchmarks.models import Task, cast
from benchmarks.shapes import Call

_MODEL = "model.xml"


def peer_systems() -> Iterator[System]:
    """Torchao, SDNQ, quanto and OpenVINO."""
    yield System("torchao int8 dynamic, bf16, compiled", _torchao_dynamic, needs=("torchao",))
    for dynamic in (True, False):
        name = f"torchao pt2e x86 {'dynamic' if dynamic else 'static'}, frozen"
        yield System(name, _torchao_pt2e(dynamic), needs=("torchao",), main=True)
    yield System("SDNQ int8 dynamic, bf16, compiled", _sdnq, needs=("sdnq", "openvino"))
    yield System("quanto int8 static, bf16, compiled", _quanto, needs=("optimum.quanto",))
    plain, quantized = Stored("openvino", _openvino), Stored("openvino-int8", _openvino_int8)
    yield System("OpenVINO fp32", _infer("f32"), plain, ("openvino",))
    yield System("OpenVINO + NNCF int8, f32 rest", _infer("f32"), quantized, ("openvino", "nncf"), main=True)
    yield System("OpenVINO + NNCF int8, bf16 rest", _infer("bf16"), quantized, ("openvino", "nncf"), main=True)


def _torchao_dynamic(task: Task, folder: Path) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = task.model(torch.bfloat16)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    module = torch.compile(model)
    return lambda call: module(**cast(call, torch.bfloat16))[0]


def _torchao_pt2e(dynamic: bool) -> Callable[[Task, Path], Run]:
    def start(task: Task, folder: Path) -> Run:
        # The import registers fusions; without them this is slow.
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        config = x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic)
        quantizer = x86.X86InductorQuantizer().set_global(config)
        exported = torch.export.export(task.model(), (), task.timed, strict=False).module()
        prepared = prepare_pt2e(exported, quantizer)
        task.calibrate(prepared)
        module = torch.compile(convert_pt2e(prepared))
        with torch._inductor.config.patch(freezing=True):  # Compilation reads this setting, in the first call.
            module(**task.timed)
        return lambda call: module(**call)[0]

    return start


def _sdnq(task: Task, folder: Path) -> Run:
    from sdnq import sdnq_post_load_quant

    # On CPUs it multiplies codes by OpenVINO, if that is installed.
    quantized = sdnq_post_load_quant(task.model(torch.bfloat16), weights_dtype="int8", use_quantized_matmul=True)
    module = torch.compile(quantized)
    return lambda call: module(**cast(call, torch.bfloat16))[0]


def _quanto(task: Task, folder: Path) -> Run:
    from optimum.quanto import Calibration, freeze, qint8, quantize

    model = task.model(torch.bfloat16)
    quantize(model, weights=qint8, activations=qint8)
    with Calibration():
        task.calibrate(model, torch.bfloat16)
    freeze(model)
    torch._dynamo.config.recompile_limit = 1024  # Each of its linears is compiled; beyond the limit they run eagerly.
    module = torch.compile(model)
    return lambda call: module(**cast(call, torch.bfloat16))[0]


class Positional(nn.Module):
    """A model with positional tensor inputs, as OpenVINO expects them."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self.names = [name for name, value in call.items() if isinstance(value, Tensor)]
        self.rest = {name: value for name, value in call.items() if not isinstance(value, Tensor)}

    def forward(self, *tensors: Tensor) -> Tensor:
        output: Tensor = self.model(**dict(zip(self.names, tensors, strict=True)), **self.rest)[0]
        return output


def tensors_of(call: Call) -> tuple[Tensor, ...]:
    return tuple(value for value in call.values() if isinstance(value, Tensor))


def _converted(task: Task) -> Any:
    import openvino

    module = Positional(task.model(), task.timed).eval()
    return openvino.convert_model(torch.export.export(module, tensors_of(task.timed), strict=False))


def _openvino(task: Task, folder: Path) -> None:
    import openvino

    openvino.save_model(_converted(task), folder / _MODEL, compress_to_fp16=False)


def _openvino_int8(task: Task, folder: Path) -> None:
    import nncf
    import openvino

    inputs = [[tensor.numpy() for tensor in tensors_of(call)] for call in task.calls]
    quantized = nncf.quantize(
        _converted(task),
        nncf.Dataset(inputs, list),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(inputs),
    )
    openvino.save_model(quantized, folder / _MODEL, compress_to_fp16=False)


def _infer(rest: str) -> Callable[[Task, Path], Run]:
    def start(task: Task, folder: Path) -> Run:
        import openvino

        options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": rest}
        compiled = openvino.Core().compile_model(folder / _MODEL, "CPU", options)
        request = compiled.create_infer_request()

        def run(call: Call) -> Tensor:
            found = request.infer([tensor.numpy() for tensor in tensors_of(call)], share_inputs=True)
            return torch.from_numpy(next(iter(found.values())).copy())

        return run

    return start
