"""ComfyUI's single file: names, int8 codes and float8 weights, read back by diffusers and by ComfyUI's own kernels."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxquant
from fxquant.errors import ConfigurationError
from fxquant.export.comfyui import FILE, PREFIX, export_comfyui
from fxquant.export.float8 import IN_PLACE as FLOATS
from fxquant.export.weights import IN_PLACE
from tests.export.test_original_names import converted
from tests.tiny import calibrate, inputs, make_dit
from tests.zoo.models import ENTRIES

QKV = f"{PREFIX}joint_blocks.0.x_block.attn.qkv"


def entry(name: str) -> Any:
    return next(entry for entry in ENTRIES if entry.name == name)


def output(model: Any, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**call)[0]
    return found


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def marks(file: Path) -> dict[str, Any]:
    """What each quantized linear of a file says of itself; the header says the same."""
    tensors = load_file(file)
    found = {
        name.removesuffix(".comfy_quant"): json.loads(bytes(value.tolist()))
        for name, value in tensors.items()
        if name.endswith(".comfy_quant")
    }
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["_quantization_metadata"])["layers"] == found
    return found


def dequantized(file: Path) -> dict[str, Tensor]:
    """The weights by the definition of the format: codes times scale."""
    tensors = load_file(file)
    found = {}
    for name, value in tensors.items():
        if not name.endswith((".comfy_quant", ".weight_scale", ".input_scale")):
            scale = tensors.get(f"{name}_scale")
            found[name] = value if scale is None else value.float() * scale
    return found


# --- int8 ---


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], Path]:
    """A quantized SD3, a call of it, and its file."""
    one = entry("SD3Transformer2DModel")
    model, call = one.model(), one.call(seed=1, step=500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe = IN_PLACE.replace("precision=w8a8", "precision=w8a16")
        quantized = fxquant.compile(model, recipe=recipe, calibrate=lambda: model(**call), measure=0)
    return quantized, call, export_comfyui(quantized, tmp_path_factory.mktemp("sd3") / "out")


@pytest.mark.slow
def test_diffusers_reads_the_int8_file_of_sd3(sd3: Any, tmp_path: Path) -> None:
    quantized, call, file = sd3
    assert file.name == FILE
    save_file(dequantized(file), tmp_path / "single.safetensors")
    entry("SD3Transformer2DModel").model().save_config(tmp_path / "config")
    config = str(tmp_path / "config")
    read = diffusers.SD3Transformer2DModel.from_single_file(tmp_path / "single.safetensors", config=config)
    assert error(output(read, call), output(quantized, call)) < 1e-5


def test_projections_are_one_int8_linear(sd3: Any) -> None:
    _, _, file = sd3
    tensors, found = load_file(file), marks(file)
    assert found[QKV] == {"format": "int8_tensorwise"}
    weight, scale = tensors[f"{QKV}.weight"], tensors[f"{QKV}.weight_scale"]
    width = tensors[f"{QKV}.bias"].shape[0]
    assert (weight.dtype, weight.shape[0]) == (torch.int8, width)
    assert (scale.dtype, scale.shape) == (torch.float32, (width, 1))
    codes = {name.removesuffix(".weight") for name, value in tensors.items() if value.dtype is torch.int8}
    assert codes == found.keys()


def test_kernels_of_comfyui_read_the_codes(sd3: Any) -> None:
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    _, _, file = sd3
    tensors = load_file(file)
    weight, scale = tensors[f"{QKV}.weight"], tensors[f"{QKV}.weight_scale"]
    layout = kitchen.TensorWiseINT8Layout
    params = layout.Params(scale=scale, orig_dtype=torch.float32, orig_shape=tuple(weight.shape))
    held = kitchen.QuantizedTensor(weight, "TensorWiseINT8Layout", params)
    assert torch.equal(held.dequantize(), dequantized(file)[f"{QKV}.weight"])
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
    expected = x @ dequantized(file)[f"{QKV}.weight"].T
    assert error(nn.functional.linear(x, held), expected) < 0.02  # Activations are rounded per token.


# --- float8 ---


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "LTXVideoTransformer3DModel", "QwenImageTransformer2DModel"])
def test_float8_of_a_float_model(name: str, tmp_path: Path) -> None:
    one = entry(name)
    model, call = one.model(), one.call(seed=1, step=500)
    file = export_comfyui(model, tmp_path / "out", prefix="")
    found = marks(file)
    # Without ranges of activations, ComfyUI would round them with a scale of 1.
    assert found and all(mark["full_precision_matrix_mult"] for mark in found.values())
    read = one.model()
    read.load_state_dict(converted(name, dequantized(file)))
    assert 1e-4 < error(output(read, call), output(model, call)) < 0.2


def test_float8_of_fused_projections_has_one_scale(tmp_path: Path) -> None:
    model = entry("FluxTransformer2DModel").model()
    tensors = load_file(export_comfyui(model, tmp_path / "out", prefix=""))
    name = "single_blocks.0.linear1"
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
    assert weight.dtype is torch.float8_e4m3fn and scale.shape == ()
    block = model.single_transformer_blocks[0]
    parts = [block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp]
    expected = torch.cat([part.weight.detach() for part in parts])
    assert error(weight.float() * scale, expected) < 1 / 16
    assert torch.equal(tensors[f"{name}.bias"], torch.cat([part.bias.detach() for part in parts]))
    assert tensors["final_layer.linear.weight"].dtype is torch.float32


def test_float8_of_a_balanced_model_has_input_scales(tmp_path: Path) -> None:
    model = make_dit(1)
    balanced: Any = fxquant.balance(model, calibrate=calibrate(model))
    file = export_comfyui(balanced, tmp_path / "out", prefix="", names="class")
    tensors, found = load_file(file), marks(file)
    name = "transformer_blocks.0.attn1.to_q"
    assert found[name] == {"format": "float8_e4m3fn"}
    largest = {layer.name: layer.largest for layer in balanced.balance_report.layers}
    assert float(tensors[f"{name}.input_scale"]) == pytest.approx(largest[name] / 448)
    assert found["transformer_blocks.0.norm1.linear"] == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    assert "transformer_blocks.0.norm1.linear.input_scale" not in tensors
    seen: list[float] = []
    module = balanced.transformer_blocks[0].attn1.to_q
    module.register_forward_pre_hook(lambda _, given: seen.append(float(given[0].abs().max())))
    calibrate(balanced)()
    assert max(seen) == pytest.approx(largest[name], rel=1e-5)


def test_tied_weights_are_written_twice(tmp_path: Path) -> None:
    model = make_dit(2)
    first, second = (block.attn1 for block in model.transformer_blocks)
    second.to_q.weight = first.to_q.weight
    tensors = load_file(export_comfyui(model, tmp_path / "out", names="class"))
    names = [f"{PREFIX}transformer_blocks.{number}.attn1.to_q.weight" for number in (0, 1)]
    assert torch.equal(*(tensors[name].float() for name in names))


# --- float8 of a quantized model ---


def compiled(model: nn.Module, recipe: str) -> Any:
    return fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), measure=0)


@pytest.fixture(scope="module")
def eights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A DiT in fp8, one linear in int8 and one with float inputs, and its file."""
    overrides = "overrides=*.to_k=w8a16;*.to_v=wfp8a16-tensor"
    quantized = compiled(make_dit(1), FLOATS.replace("-tensor}", f"-tensor {overrides}}}"))
    return quantized, export_comfyui(quantized, tmp_path_factory.mktemp("dit") / "out", prefix="", names="class")


def test_float8_of_a_quantized_model(eights: tuple[Any, Path]) -> None:
    quantized, file = eights
    tensors, found = load_file(file), marks(file)
    q, k, v = (f"transformer_blocks.0.attn1.to_{side}" for side in "qkv")
    assert found[q] == {"format": "float8_e4m3fn"}
    assert found[k] == {"format": "int8_tensorwise"}
    assert found[v] == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    plain = {name: value for captured in quantized.captured for name, value in captured.module.state_dict().items()}
    for name in (q, v):
        assert torch.equal(tensors[f"{name}.weight"].view(torch.uint8), plain[f"{name}.weight_packed"])
        assert tensors[f"{name}.weight_scale"].shape == ()
        assert tensors[f"{name}.weight_scale"] == plain[f"{name}.weight_scale"].flatten()[0]
    assert tensors[f"{q}.input_scale"].shape == () and f"{v}.input_scale" not in tensors
    assert tensors[f"{k}.weight"].dtype == torch.int8


def test_the_file_computes_what_the_quantized_model_computes(eights: tuple[Any, Path]) -> None:
    """By the definition of the format: the class with decoded weights, whose linears round their inputs."""
    quantized, file = eights
    tensors = load_file(file)
    read = make_dit(1)
    read.load_state_dict(dequantized(file))
    for name, module in read.named_modules():
        if (scale := tensors.get(f"{name}.input_scale")) is not None:
            module.register_forward_pre_hook(
                lambda _, given, scale=scale: (
                    (given[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale,
                )
            )
    call = inputs(2)
    assert error(output(read, call), output(quantized, call)) < 1e-2  # A code at a tie moves by 6 %.


def test_kernels_of_comfyui_read_the_floats(eights: tuple[Any, Path]) -> None:
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    _, file = eights
    tensors, name = load_file(file), "transformer_blocks.0.attn1.to_q"
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
    params = kitchen.TensorCoreFP8Layout.Params(scale=scale, orig_dtype=torch.float32, orig_shape=tuple(weight.shape))
    held = kitchen.QuantizedTensor(weight, "TensorCoreFP8Layout", params)
    assert torch.equal(held.dequantize(), dequantized(file)[f"{name}.weight"])


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("wfp8afp8", r"float8 weights with several scales: transformer(?s:.)*precision=wfp8afp8-tensor"),
        ("wfp8a8-tensor", "float8 weights with inputs in int8: transformer"),
        ("wmxfp8amxfp8", "weights in the format mxfp8"),
    ],
)
def test_float8_that_the_layout_cannot_hold(precision: str, message: str, tmp_path: Path) -> None:
    quantized = compiled(make_dit(1, attention_head_dim=16), FLOATS.replace("wfp8afp8-tensor", precision))
    with pytest.raises(ConfigurationError, match=message):
        export_comfyui(quantized, tmp_path / "out", names="class")


def test_float8_with_ranges_of_tokens(tmp_path: Path) -> None:
    quantized = compiled(make_dit(1), FLOATS)
    for layer in quantized.plan.layers.values():
        if layer.activation is not None and layer.activation_format == "fp8":
            layer.activation = replace(layer.activation, method="dynamic")
    dynamic = fxquant.compile(make_dit(1), plan=quantized.plan, backend="fake-quant")
    with pytest.raises(ConfigurationError, match="inputs in float8 where each token has a range of its own"):
        export_comfyui(dynamic, tmp_path / "out", names="class")


def test_float8_of_layers_that_are_one_in_comfyui(tmp_path: Path) -> None:
    one = entry("SD3Transformer2DModel")
    model, call = one.model(), one.call(seed=1, step=500)
    recipe = FLOATS.replace("wfp8afp8", "wfp8a16")
    quantized = fxquant.compile(model, recipe=recipe, calibrate=lambda: model(**call), measure=0)
    with pytest.raises(ConfigurationError, match=r"attn\.qkv' as one linear with one scale, .*names='class'"):
        export_comfyui(quantized, tmp_path / "out")


# --- refusals ---


def test_refusals(tmp_path: Path) -> None:
    model = make_dit(1)
    with pytest.raises(ConfigurationError, match=r"names of a DiTTransformer2DModel are not known.*names='class'"):
        export_comfyui(model, tmp_path / "out")
    with pytest.raises(ConfigurationError, match="names='diffusers' is not known; choose 'comfyui' or 'class'"):
        export_comfyui(model, tmp_path / "out", names="diffusers")
    with pytest.raises(ConfigurationError, match="a str is not a model"):
        export_comfyui("model", tmp_path / "out")  # type: ignore[arg-type]
    peft = pytest.importorskip("peft")
    fused = entry("FluxTransformer2DModel").model()
    fused.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ConfigurationError, match="holds an adapter"):
        export_comfyui(fused, tmp_path / "out")
    fused = entry("FluxTransformer2DModel").model()
    fused.fuse_qkv_projections()
    with pytest.raises(ConfigurationError, match="unfuse_qkv_projections"):
        export_comfyui(fused, tmp_path / "out")
    assert not list(tmp_path.iterdir())
