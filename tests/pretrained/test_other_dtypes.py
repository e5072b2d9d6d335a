"""Checkpoints that are read in another dtype than the one that they were quantized in, as by ``.to(dtype)``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTTransformer2DModel, WanTransformer3DModel
from torch import Tensor
from transformers import T5Config, T5EncoderModel

import fxquant
from fxquant.errors import ConfigurationError
from fxquant.runtime.model import GraphModel
from fxquant.testing import tiny_wan
from tests.adapters.loras import lora, relative
from tests.tiny import calibrate, inputs, make_dit, make_pipeline
from tests.vaes import decoded, encoded, make_vae, psnr

HALF = torch.bfloat16


@torch.no_grad()
def call(model: Any) -> Tensor:
    """What a DiT makes of the inputs of its dtype."""
    given = inputs()
    made: Tensor = model(**{**given, "hidden_states": given["hidden_states"].to(model.dtype)}).sample
    return made


@torch.no_grad()
def call_wan(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, prompt = (torch.randn(1, *size, generator=generator) for size in ((4, 2, 8, 8), (4, 16)))
    given = {"hidden_states": latents.to(model.dtype), "encoder_hidden_states": prompt.to(model.dtype)}
    made: Tensor = model(timestep=torch.tensor([500]), **given).sample
    return made


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    model = make_dit()
    return fxquant.compile(model, recipe="ptq4dit-w4a8", calibrate=calibrate(model), measure=0)


@pytest.fixture(scope="module")
def vae() -> Any:
    model = make_vae()
    return fxquant.compile_parts(model, recipe="rtn-w8a8", calibrate=lambda: decoded(model, batch=1))


@pytest.fixture(scope="module")
def folder(quantized: GraphModel, vae: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose transformer has a LoRA, and whose VAE is quantized too."""
    pipe = make_pipeline(copy.deepcopy(quantized))
    adapter = lora(make_dit(), targets=("to_q", "net.2"), size=0.3)
    pipe.transformer.load_lora_adapter(adapter, prefix="transformer", adapter_name="style")
    pipe.transformer.set_adapters("style", 0.8)
    pipe.vae = vae
    place = tmp_path_factory.mktemp("saved") / "pipeline"
    fxquant.save_pipeline(pipe, place)
    return place


@pytest.mark.slow
def test_the_bits_are_those_of_a_converted_model(folder: Path, tmp_path: Path) -> None:
    part = folder / "transformer"
    expected = call(fxquant.load(part).to(HALF))
    for model in (
        DiTTransformer2DModel.from_pretrained(part, torch_dtype=HALF),
        GraphModel.from_pretrained(part, torch_dtype=HALF),
    ):
        assert type(model) is GraphModel and model.dtype is HALF
        assert torch.equal(call(model), expected)
    model.save_pretrained(tmp_path / "half")
    assert torch.equal(call(fxquant.load(tmp_path / "half")), expected)
    back = fxquant.load(tmp_path / "half", dtype=torch.float32)
    assert relative(call(back), expected.float()) < 0.05


@pytest.mark.slow
def test_for_another_backend(folder: Path) -> None:
    part = folder / "transformer"
    expected = call(fxquant.load(part, backend="native").to(HALF))
    assert torch.equal(call(fxquant.load(part, backend="native", dtype=HALF)), expected)


@pytest.mark.slow
def test_vaes(folder: Path, vae: Any) -> None:
    expected = copy.deepcopy(vae).to(HALF)
    assert psnr(decoded(expected).float(), decoded(vae)) > 30
    for model in (
        AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=HALF),
        fxquant.load(folder / "vae", dtype=HALF, backend="fake-quant"),
    ):
        assert (model.dtype, model.decoder.dtype, model.quant_conv.weight.dtype) == (HALF, HALF, HALF)
        assert torch.equal(decoded(model), decoded(expected))
        assert torch.equal(encoded(model), encoded(expected))


@pytest.mark.slow
def test_pipelines(folder: Path) -> None:
    """A dtype may be given per part; the others are read in float32, as by diffusers."""
    dtypes: list[Any] = [HALF, {"transformer": torch.float16, "vae": HALF}, {"transformer": HALF}]
    loads = [fxquant.load_pipeline, DiffusionPipeline.from_pretrained, fxquant.load_pipeline]
    wanted = [(HALF, HALF), (torch.float16, HALF), (HALF, torch.float32)]
    for load, dtype, (transformer, vae) in zip(loads, dtypes, wanted, strict=True):
        pipe = load(folder, dtype=dtype)
        assert (pipe.transformer.dtype, pipe.vae.dtype, pipe.vae.decoder.dtype) == (transformer, vae, vae)


@pytest.mark.slow
def test_text_encoders(tmp_path: Path) -> None:
    """transformers reads the second projection of T5 in float32 for float16, and not for bfloat16."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    encoder, tokens = T5EncoderModel(config).eval(), torch.arange(8)[None]
    made = fxquant.compile(encoder, recipe="rtn-w8a16", calibrate=lambda: encoder(tokens), timestep=None, measure=0)
    made.save_pretrained(tmp_path / "t5")
    expected = encoder(tokens).last_hidden_state
    for dtype, kept in ((HALF, HALF), (torch.float16, torch.float32)):
        model = GraphModel.from_pretrained(tmp_path / "t5", dtype=dtype)
        found = model(tokens).last_hidden_state
        assert torch.equal(found, copy.deepcopy(made).to(dtype)(tokens).last_hidden_state)
        assert relative(found.float(), expected) < 0.05
        wo = model.architecture.skeleton.get_parameter("encoder.block.0.layer.1.DenseReluDense.wo.weight")
        assert (model.dtype, wo.dtype) == (dtype, kept)


@pytest.mark.slow
def test_layers_that_a_class_keeps_in_float32(tmp_path: Path) -> None:
    """They are read in float32 as those of the float model, whether a model is quantized already or not."""
    model = tiny_wan()
    model.save_pretrained(tmp_path / "float")
    made = fxquant.compile(model, recipe="rtn-w8a16", calibrate=lambda: call_wan(model), measure=0)
    made.save_pretrained(tmp_path / "made")
    read = WanTransformer3DModel.from_pretrained
    floating = read(tmp_path / "float", torch_dtype=HALF)
    waiting = read(tmp_path / "float", torch_dtype=HALF, quantization_config=fxquant.FxQuantConfig("rtn-w8a16"))
    before = read(tmp_path / "made", torch_dtype=HALF)
    dtypes = {name: tensor.dtype for name, tensor in floating.named_parameters()}
    assert set(dtypes.values()) == {HALF, torch.float32}
    assert {name: tensor.dtype for name, tensor in waiting.named_parameters()} == dtypes
    for quantized in (before, waiting, made.to(HALF)):
        found = call_wan(quantized)
        assert {name: tensor.dtype for name, tensor in quantized.architecture.skeleton.named_parameters()} == dtypes
        assert relative(found.float(), call_wan(floating).float()) < 0.05
    assert torch.equal(found, call_wan(before))


def test_what_is_refused(quantized: GraphModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read."""
    known = "float16, bfloat16, float32 or float64, not in"
    for load in (DiTTransformer2DModel.from_pretrained, fxquant.load):
        with pytest.raises(ConfigurationError, match=known):
            load(folder / "transformer", torch_dtype=torch.float8_e4m3fn)
    with pytest.raises(ConfigurationError, match=known):
        AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float8_e4m3fn)
    monkeypatch.setattr("fxquant.storage.diffusers_io.load", lambda *_, **__: pytest.fail("something was read"))
    for name in ("dtype", "torch_dtype"):
        with pytest.raises(ConfigurationError, match=known):
            fxquant.load_pipeline(folder, **{name: {"vae": torch.float8_e4m3fn, "default": HALF}})
        with pytest.raises(
            ConfigurationError, match=r"part 'transformer' computes in torch\.float32, not in .*bfloat16"
        ):
            fxquant.load_pipeline(folder, transformer=quantized, **{name: HALF})
