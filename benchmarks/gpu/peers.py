"""The alternative to fxquant: torchao, each configuration run in the fastest way that its documentation describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.job import Job
from benchmarks.gpu.systems import Made

_NEEDS = ("torchao",)
_LEAST_ROWS = 17
"""The least rows that the integer product of CUDA accepts."""


def peer_makings() -> Iterator[Made]:
    """One per configuration."""
    yield Made("torchao int8 dynamic", partial(_quantized, config=_int8_dynamic, rows=_LEAST_ROWS), 15.0, _NEEDS)
    yield Made("torchao int8 static", _int8_static, 15.0, _NEEDS)
    for name in ("tensor", "row"):
        make = partial(_quantized, config=partial(_fp8_dynamic, name))
        yield Made(f"torchao fp8 dynamic, per {name}", make, 15.0, _NEEDS, _lacks_fp8)
    yield Made("torchao int4 weight-only", partial(_quantized, config=_int4, multiple=128), 5.0, _NEEDS, _lacks_int4)


def _int8_dynamic() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _fp8_dynamic(granularity: str) -> Any:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, PerTensor

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow() if granularity == "row" else PerTensor())


def _int4() -> Any:
    from torchao.quantization import Int4WeightOnlyConfig

    # The layout of the kernel that is part of torch; other layouts need another package of kernels.
    return Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")


def _lacks_fp8(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "torchao supports it only on GPUs"
    return "the device cannot multiply 8-bit floats" if torch.cuda.get_device_capability(device) < (8, 9) else None


def _lacks_int4(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "its kernel runs only on GPUs"


def _quantized(job: Job, config: Callable[[], Any], rows: int = 1, multiple: int = 16) -> nn.Module:
    from torchao.quantization import quantize_

    model = job.model()
    chosen = set(_inputs(job, model, rows, multiple))
    quantize_(model, config(), filter_fn=lambda layer, name: name in chosen)
    return model


def _int8_static(job: Job) -> nn.Module:
    """Quantize each layer with the largest magnitude of its own inputs in calibration."""
    try:
        from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor, quantize_
    except ImportError:
        raise RuntimeError("the installed torchao has no static int8 configuration") from None

    model = job.model()
    for name, largest in _inputs(job, model, _LEAST_ROWS, 16).items():
        config = Int8StaticActivationInt8WeightConfig(
            act_quant_scale=(largest.float() / 127.5).clamp(min=1e-12),
            granularity=[PerTensor(), PerRow()],
        )
        quantize_(model, config, filter_fn=lambda layer, found, name=name: found == name)
    return model


def _inputs(job: Job, model: nn.Module, rows: int, multiple: int) -> dict[str, Tensor]:
    """Largest input magnitudes of the linears that a configuration accepts, with as many axes as the inputs.

    Args:
        job: The job to run.
        model: The model to quantize.
        rows: The least rows of inputs that a layer must have.
        multiple: Input channels must be a multiple of it; output channels must be a multiple of 16.
    """
    found: dict[str, Tensor] = {}

    def record(name: str, layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if x.numel() // layer.in_features >= rows:
            largest = x.abs().amax(tuple(range(x.dim())), keepdim=True)
            found[name] = largest if name not in found else torch.maximum(found[name], largest)

    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: record(name, layer, inputs))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.in_features % multiple == 0 and layer.out_features % 16 == 0
    ]
    try:
        job.calibrate(model)
    finally:
        for hook in hooks:
            hook.remove()
    return found
