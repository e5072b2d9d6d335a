"""VAEs: their decoder and encoder are quantized, and they stay models of their class."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import CpuOffload, remove_hook_from_module
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline, PipelineQuantizationConfig

import fxquant
from fxquant.capture.whole import MARK
from fxquant.errors import (
    AlreadyCompiledError,
    BackendError,
    CalibrationError,
    ConfigurationError,
    DropInError,
    MissingTimestepError,
)
from fxquant.runtime import converting
from fxquant.runtime.model import GraphModel
from tests.tiny import make_dit, make_pipeline
from tests.vaes import decoded, encoded, images, latents, make_vae, psnr


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return make_vae()


@pytest.fixture(scope="module")
def both(vae: AutoencoderKL) -> Any:
    """Quantized for image-to-image: the calibration encodes and decodes."""
    return fxquant.compile_parts(vae, recipe="rtn-w8a8", calibrate=lambda: (encoded(vae), decoded(vae, batch=2)))


def test_it_stays_a_model_of_its_class(vae: AutoencoderKL, both: Any) -> None:
    assert type(both) is AutoencoderKL
    assert both is not vae
    assert type(vae.decoder) is not GraphModel, "the float model does not change"
    assert MARK not in vars(vae.decoder)
    assert type(both.decoder) is type(both.encoder) is GraphModel
    assert (both.dtype, both.config, both.num_parameters()) == (vae.dtype, vae.config, vae.num_parameters())
    assert both.get_memory_footprint() < 0.6 * vae.get_memory_footprint()
    assert both.post_quant_conv is vae.post_quant_conv
    assert both.decoder.plan.model_class == "diffusers:AutoencoderKL/decoder"


def test_convolutions_are_quantized_by_default(both: Any) -> None:
    for part in (both.decoder, both.encoder):
        layers = part.plan.layers.values()
        assert all((layer.weight_bits, layer.activation_bits) == (8, 8) for layer in layers)
        assert {layer.kind for layer in layers} == {"conv", "linear"}


@pytest.fixture(scope="module")
def fine(vae: AutoencoderKL) -> Any:
    """Only decoded, and only the weights are quantized."""
    return fxquant.compile_parts(vae, recipe="rtn-w8a16", calibrate=lambda: decoded(vae))


def test_images(vae: AutoencoderKL, both: Any, fine: Any) -> None:
    assert psnr(decoded(both, seed=1), decoded(vae, seed=1)) > 30
    assert psnr(encoded(both, seed=1), encoded(vae, seed=1)) > 30
    assert psnr(decoded(fine, seed=1), decoded(vae, seed=1)) > 45
    assert psnr(decoded(fine, size=12), decoded(vae, size=12)) > 45, "another size is another graph"
    assert torch.equal(encoded(fine), encoded(vae)), "nothing was encoded, so the encoder stays float"


def test_layers_blocks_keeps_the_first_and_the_last_convolution(vae: AutoencoderKL) -> None:
    made = fxquant.compile_parts(vae, recipe="rtn-w8a16", layers="blocks", calibrate=lambda: decoded(vae))
    assert [name for name, layer in made.decoder.plan.layers.items() if layer.weight_bits is None] == [
        "conv_in",
        "conv_out",
    ]


def test_tiles_and_slices(vae: AutoencoderKL, both: Any) -> None:
    expected = []
    for model in (copy.deepcopy(vae), copy.deepcopy(both)):
        model.enable_tiling()
        model.enable_slicing()
        model.tile_latent_min_size = model.tile_sample_min_size = 6
        model.tile_overlap_factor = 0
        expected.append((decoded(model, batch=2, size=12), encoded(model, size=12)))
    assert psnr(expected[1][0], expected[0][0]) > 30
    assert psnr(expected[1][1], expected[0][1]) > 30


def test_bfloat16_and_another_backend(vae: AutoencoderKL) -> None:
    half = copy.deepcopy(vae).to(torch.bfloat16)
    made = fxquant.compile_parts(half, recipe="rtn-w8a16", backend="native", calibrate=lambda: decoded(half))
    assert made.dtype is made.decoder.dtype is decoded(made).dtype is torch.bfloat16
    assert psnr(decoded(made).float(), decoded(half).float()) > 30


def test_chosen_parts(vae: AutoencoderKL) -> None:
    made = fxquant.compile_parts(vae, recipe="rtn-w8a16", parts=["encoder"], calibrate=lambda: encoded(vae))
    assert type(made.encoder) is GraphModel
    assert torch.equal(decoded(made), decoded(vae))
    with pytest.raises(CalibrationError, match="encoder of this AutoencoderKL"):
        fxquant.compile_parts(vae, recipe="rtn-w8a16", parts=["encoder"], calibrate=lambda: decoded(vae))
    with pytest.raises(ConfigurationError, match="parts names nothing; this AutoencoderKL has encoder, decoder"):
        fxquant.compile_parts(vae, recipe="rtn-w8a16", parts=[], calibrate=lambda: decoded(vae))
    with pytest.raises(ConfigurationError, match="has no part 'quant_conv'; it has encoder, decoder"):
        fxquant.compile_parts(vae, recipe="rtn-w8a16", parts=["quant_conv"], calibrate=lambda: decoded(vae))


def test_what_is_refused(vae: AutoencoderKL, both: Any) -> None:
    def compiled(model: Any, recipe: str = "rtn-w8a16", **options: Any) -> Any:
        return fxquant.compile_parts(model, recipe=recipe, calibrate=lambda: encoded(model), **options)

    with pytest.raises(CalibrationError, match=r"^decoder: calibrate returned without calling the decoder of"):
        compiled(vae)
    with pytest.raises(AlreadyCompiledError, match="the encoder and the decoder of this AutoencoderKL"):
        compiled(both)
    with pytest.raises(ConfigurationError, match="DiTTransformer2DModel is not a model with a method decode"):
        compiled(make_dit())
    with pytest.raises(ConfigurationError, match=r"fxquant\.compile_parts quantizes its decoder and its encoder"):
        fxquant.compile(vae, recipe="rtn-w8a16", calibrate=lambda: decoded(vae))
    with pytest.raises(ConfigurationError, match="plan belongs to one graph"):
        compiled(vae, plan=both.decoder.plan)
    with pytest.raises(MissingTimestepError, match="the model has no timestep"):
        fxquant.compile_parts(vae, recipe="htg-w8a8", calibrate=lambda: decoded(vae))
    half = make_vae(force_upcast=True).to(torch.float16)
    with pytest.raises(ConfigurationError, match=r"force_upcast.*Load it in bfloat16 or float32"):
        compiled(half)
    assert MARK not in vars(vae.decoder) and MARK not in vars(vae.encoder)


def test_what_the_model_refuses(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is half converted, and nothing is without effect."""
    before = both.post_quant_conv.weight.clone()
    with pytest.raises(ConfigurationError, match="computes in float16, bfloat16, float32 or float64"):
        both.to(torch.float8_e4m3fn)
    done: list[Any] = []
    convert = converting.converted

    def second_fails(*given: Any) -> Any:
        if done:
            raise BackendError("not this one")
        done.append(convert(*given))
        return done[0]

    monkeypatch.setattr(converting, "converted", second_fails)
    with pytest.raises(BackendError, match="not this one"):
        both.half()
    assert both.encoder.dtype is both.decoder.dtype is torch.float32
    with pytest.raises(ConfigurationError, match="no training mode"):
        both.train()
    assert not both.training and not both.post_quant_conv.training
    assert torch.equal(both.post_quant_conv.weight, before)
    for name in ("fuse_qkv_projections", "set_attn_processor", "enable_layerwise_casting", "add_adapter", "to_empty"):
        with pytest.raises(DropInError, match=f"has no {name}"):
            getattr(both, name)()
    assert both.to("cpu", torch.float32) is both
    with pytest.raises(ConfigurationError, match=r"give a part: model\.encoder or model\.decoder"):
        fxquant.report(both)


def test_a_vae_whose_decoder_has_another_name(vae: AutoencoderKL) -> None:
    """As that of ConsistencyDecoderVAE. It is not returned as if it were quantized."""
    model = copy.deepcopy(vae)
    model.decoder_unet = model.decoder
    del model.decoder
    with pytest.raises(ConfigurationError, match="called no part of this AutoencoderKL that can be quantized"):
        fxquant.compile_parts(model, recipe="rtn-w8a16", calibrate=lambda: model.decoder_unet(latents()))


def test_messages_about_models_with_one_entry(vae: AutoencoderKL, both: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"give a part of it: model\.encoder or model\.decoder"):
        fxquant.export_compressed_tensors(both, tmp_path / "out")
    with pytest.raises(ConfigurationError, match="balancing follows one call"):
        fxquant.balance(vae, calibrate=lambda: decoded(vae))
    with pytest.raises(ConfigurationError, match=r"this model went through torch\.compile; give the original"):
        fxquant.compile_parts(torch.compile(vae), recipe="rtn-w8a16", calibrate=lambda: decoded(vae))


def test_hooks_of_torch_on_a_part(vae: AutoencoderKL) -> None:
    """They run around the calls of the quantized part too, and of its copies."""
    model = copy.deepcopy(vae)
    handle = model.decoder.register_forward_hook(lambda *call: call[2] * 2)
    made = fxquant.compile_parts(model, recipe="rtn-w8a16", calibrate=lambda: decoded(model))
    for copied in (made, copy.copy(made), copy.deepcopy(made)):
        assert psnr(decoded(copied), decoded(model)) > 45
    own = copy.deepcopy(made)
    handle.remove()
    assert psnr(decoded(made), decoded(vae)) > 45
    assert psnr(decoded(own), 2 * decoded(vae)) > 45, "a deep copy has its own hooks"


# --- pipelines ---


def made_images(pipe: DiTPipeline, seed: int = 0) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    made = pipe(class_labels=[1, 2], num_inference_steps=2, generator=generator, output_type="np")
    return torch.as_tensor(made.images)


def test_one_run_for_the_transformer_and_the_vae() -> None:
    pipe, runs = make_pipeline(), []
    original, expected = pipe.vae, made_images(pipe)

    def calibrate() -> None:
        runs.append(made_images(pipe))

    with pytest.raises(CalibrationError, match=r"^vae\.decoder: calibrate returned without calling the decoder"):
        fxquant.compile_pipeline(
            pipe, recipe={"vae": "rtn-w8a8"}, calibrate=lambda: pipe.vae.encode(images(8)), measure=0
        )
    assert pipe.vae is original
    recipes = {"transformer": "rtn-w8a8", "vae": "rtn-w8a16"}
    made = fxquant.compile_pipeline(pipe, recipe=recipes, calibrate=calibrate, measure=0)
    assert len(runs) == 1
    assert type(made["transformer"]) is GraphModel
    assert pipe.vae is made["vae"] and type(pipe.vae) is AutoencoderKL
    assert (made_images(pipe) - expected).abs().max() < 0.05
    with pytest.raises(AlreadyCompiledError):
        fxquant.compile_pipeline(pipe, recipe={"vae": "rtn-w8a16"}, calibrate=calibrate)


def test_an_offloaded_pipeline(fine: Any) -> None:
    """Offloading moves the VAE with its parts."""
    pipe = make_pipeline()
    pipe.vae = copy.deepcopy(fine)
    expected = made_images(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(made_images(pipe), expected)
    pipe.remove_all_hooks()
    assert torch.equal(made_images(pipe), expected)
    moved = DiTPipeline.from_pipe(pipe)
    assert moved.vae is pipe.vae


def test_a_pipeline_that_is_offloaded_already() -> None:
    """The quantized VAE is offloaded in place of the float one; if quantizing fails, the float one still is."""
    pipe = make_pipeline()
    original, expected = pipe.vae, made_images(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(MissingTimestepError):
        fxquant.compile_pipeline(pipe, recipe={"vae": "htg-w8a8"}, calibrate=lambda: made_images(pipe))
    assert pipe.vae is original and type(original._hf_hook) is CpuOffload
    assert torch.equal(made_images(pipe), expected)
    both: dict[str, Any] = {"transformer": "rtn-w8a16", "vae": "rtn-w8a16"}
    fxquant.compile_pipeline(pipe, recipe=both, calibrate=lambda: made_images(pipe), measure=0)
    assert type(pipe.vae.decoder) is GraphModel and type(pipe.vae._hf_hook) is CpuOffload
    found = made_images(pipe)
    assert (found - expected).abs().max() < 0.05
    pipe.remove_all_hooks()
    assert torch.equal(made_images(pipe), found)


def test_a_vae_that_was_offloaded(vae: AutoencoderKL) -> None:
    """accelerate leaves the method of the float VAE among its attributes; the quantized VAE has its own."""
    model, image = copy.deepcopy(vae), images(8)
    cpu_offload_with_hook(model, "cpu")
    made = fxquant.compile_parts(model, recipe="rtn-w8a16", calibrate=lambda: model(image))
    assert type(made._hf_hook) is CpuOffload and not hasattr(model, "_hf_hook")
    remove_hook_from_module(made)
    model.forward = model.forward  # As accelerate leaves it.
    again = fxquant.compile_parts(model, recipe="rtn-w8a16", calibrate=lambda: model(image))
    with torch.no_grad():
        assert torch.equal(made(image).sample, again(image).sample)
        assert not torch.equal(made(image).sample, model(image).sample)


def test_methods_that_were_replaced_on_the_object(vae: AutoencoderKL) -> None:
    """A function that holds the float model would go on calling its float decoder."""
    model = copy.deepcopy(vae)
    decode = model.decode
    model.decode = functools.wraps(decode)(lambda latent: decode(latent * 1.0))
    with pytest.raises(ConfigurationError, match=r"the method 'decode' of this AutoencoderKL was replaced.*del model"):
        fxquant.compile_parts(model, recipe="rtn-w8a16", calibrate=lambda: decoded(model))
    model.decode = decode
    made = fxquant.compile_parts(model, recipe="rtn-w8a16", calibrate=lambda: decoded(model))
    assert not torch.equal(decoded(made), decoded(model))


def test_at_the_first_call(tmp_path: Path) -> None:
    """Each part is quantized when it is first called; until then the model is not saved."""
    make_pipeline().save_pretrained(tmp_path / "float")
    config = fxquant.FxQuantConfig("rtn-w8a16")
    parts = PipelineQuantizationConfig(quant_mapping={"vae": config})
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "float", quantization_config=parts)
    with pytest.raises(ConfigurationError, match="no part of this AutoencoderKL is quantized yet"):
        pipe.vae.save_pretrained(tmp_path / "early")
    calls: list[int] = []
    pipe.vae.decoder.register_forward_hook(lambda *_: calls.append(0))
    first = made_images(pipe)
    assert type(pipe.vae) is AutoencoderKL and type(pipe.vae.decoder) is GraphModel
    assert all(layer.weight_bits == 8 for layer in pipe.vae.decoder.plan.layers.values())
    assert type(pipe.vae.encoder) is not GraphModel
    assert torch.equal(made_images(pipe), first)
    assert len(calls) == 2, "the hook stays, and runs once in each call"
    fxquant.save_pipeline(pipe, tmp_path / "q")
    assert torch.equal(made_images(fxquant.load_pipeline(tmp_path / "q")), first)


def test_with_a_config_and_a_calibration(tmp_path: Path) -> None:
    make_vae().save_pretrained(tmp_path / "vae")
    read = AutoencoderKL.from_pretrained
    made = read(tmp_path / "vae", quantization_config=fxquant.FxQuantConfig("rtn-w8a8", calibrate=decoded))
    assert type(made) is AutoencoderKL and type(made.decoder) is GraphModel
    with pytest.raises(CalibrationError, match=r"dynamic-w8a8.* needs a calibration"):
        read(tmp_path / "vae", quantization_config=fxquant.FxQuantConfig("dynamic-w8a8"))
    with pytest.raises(ConfigurationError, match="a plan and statistics belong to one graph"):
        read(tmp_path / "vae", quantization_config=fxquant.FxQuantConfig(plan=made.decoder.plan))
    assert made.decode(latents(), return_dict=False)[0].shape == (1, 3, 8, 8)
