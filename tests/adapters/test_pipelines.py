"""Pipelines load, weigh, switch and delete LoRAs of a quantized transformer as of a float one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, ModelMixin
from torch import Tensor

import fxquant
from fxquant.errors import AdapterError
from fxquant.ir.histories import History
from fxquant.numerics.sqnr import sqnr_db
from fxquant.runtime.lora import adapters_of
from fxquant.runtime.model import GraphModel
from tests.adapters.fluxes import ENTRY, MODEL, images, make_pipe
from tests.adapters.loras import lora

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "proj_mlp", "norm.linear")
FIRST, SECOND = lora(MODEL, targets=TARGETS), lora(MODEL, rank=2, seed=5, targets=("to_q", "to_v"))


@pytest.fixture(scope="module")
def base() -> GraphModel:
    pipe = make_pipe(MODEL)
    return fxquant.compile(MODEL, recipe="ptq4dit-w8a8", calibrate=lambda: images(pipe), measure=0)


@pytest.fixture
def pipe(base: GraphModel) -> Iterator[FluxPipeline]:
    yield make_pipe(base)
    base.unload_lora()


@pytest.fixture
def floating() -> FluxPipeline:
    return make_pipe(ENTRY.model())


@pytest.mark.slow
def test_the_life_of_loras_in_a_pipeline(pipe: FluxPipeline, floating: FluxPipeline) -> None:
    plain, base = images(pipe), sqnr_db(images(floating), images(pipe))
    assert base > 40

    def check(**options: Any) -> None:
        assert pipe.get_list_adapters() == floating.get_list_adapters()
        assert pipe.get_active_adapters() == floating.get_active_adapters()
        assert sqnr_db(images(floating, **options), images(pipe, **options)) > base - 3

    for one in (pipe, floating):
        one.load_lora_weights(FIRST, adapter_name="a")
    assert sqnr_db(images(floating), plain) < base - 6
    check()
    for one in (pipe, floating):
        one.load_lora_weights(SECOND, adapter_name="b")
        one.set_adapters(["a", "b"], adapter_weights=[0.5, -0.7])
    check()
    before = images(pipe)
    adapters = adapters_of(pipe.transformer)
    assert adapters is not None
    check(joint_attention_kwargs={"scale": 0.3})
    check(joint_attention_kwargs={"scale": 1.7})
    assert len(adapters.captured) == 1  # A scale is no kind of call of its own.
    assert torch.equal(images(pipe), before)
    for one in (pipe, floating):
        one.set_adapters("b", adapter_weights={"transformer": 0.9})
    check()
    pipe.disable_lora()
    assert torch.equal(images(pipe), plain)
    for one in (pipe, floating):
        one.disable_lora()
        one.enable_lora()
        one.delete_adapters("b")
        one.set_adapters("a")
    check()
    for one in (pipe, floating):
        one.enable_lora_hotswap(target_rank=8, check_compiled="ignore")
        one.load_lora_weights(FIRST, adapter_name="a", hotswap=True)
    check()
    for one in (pipe, floating):
        one.unload_lora_weights()
    assert torch.equal(images(pipe), plain)
    check()


def test_what_pipelines_cannot_do_to_it_raises(pipe: FluxPipeline) -> None:
    with pytest.raises(AdapterError, match="cannot be fused into the codes"):
        pipe.fuse_lora()
    pipe.load_lora_weights(FIRST, adapter_name="a")
    before = images(pipe)
    for fuse in (pipe.fuse_lora, pipe.unfuse_lora):
        with pytest.raises(AdapterError, match="cannot be fused into the codes"):
            fuse()
    pipe.set_lora_device(["a"], "cpu")
    with pytest.raises(AdapterError, match=r"move with the model, which is on cpu, and not to meta"):
        pipe.set_lora_device(["a"], "meta")
    assert torch.equal(images(pipe), before)


def test_keys_of_kohya_and_xlabs(pipe: FluxPipeline, floating: FluxPipeline) -> None:
    """Diffusers converts them, with its own converters, before the model sees them."""
    generator = torch.Generator().manual_seed(0)
    width = MODEL.config.num_attention_heads * MODEL.config.attention_head_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    kohya = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": random(4, width),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": random(3 * width, 4),
        "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(2.0),
        "lora_unet_single_blocks_0_linear2.lora_down.weight": random(4, 5 * width),
        "lora_unet_single_blocks_0_linear2.lora_up.weight": random(width, 4),
        "lora_unet_single_blocks_0_linear2.alpha": torch.tensor(2.0),
    }
    xlabs = {
        "double_blocks.0.processor.qkv_lora1.down.weight": random(4, width),
        "double_blocks.0.processor.qkv_lora1.up.weight": random(3 * width, 4),
    }
    for keys in (kohya, xlabs):
        for one in (pipe, floating):
            one.load_lora_weights(dict(keys), adapter_name="a")
        expected = images(floating)
        found = sqnr_db(expected, images(pipe))
        for one in (pipe, floating):
            one.unload_lora_weights()
        assert found > max(40, sqnr_db(expected, images(floating)) + 10)


def test_a_control_lora_is_refused_by_name(pipe: FluxPipeline) -> None:
    before, width = images(pipe), MODEL.config.num_attention_heads * MODEL.config.attention_head_dim
    wider = {
        "transformer.x_embedder.lora_A.weight": torch.ones(2, 2 * MODEL.config.in_channels),
        "transformer.x_embedder.lora_B.weight": torch.ones(width, 2),
    }
    with pytest.raises(AdapterError, match=r"layer 'x_embedder' has 4 inputs\. An adapter that widens.*Control-LoRAs"):
        pipe.load_lora_weights(wider, adapter_name="a")
    assert torch.equal(images(pipe), before)
    assert pipe.get_list_adapters() == {}


def norms() -> dict[str, Tensor]:
    generator, size = torch.Generator().manual_seed(3), MODEL.config.attention_head_dim
    names = [f"transformer_blocks.0.attn.norm_{side}" for side in ("q", "k", "added_q", "added_k")]
    return {f"transformer.{name}.weight": 1 + torch.randn(size, generator=generator) for name in names}


def test_norms_of_a_control_lora_that_widens_no_layer(pipe: FluxPipeline, floating: FluxPipeline) -> None:
    before = images(pipe)
    for one in (pipe, floating):
        one.load_lora_weights(FIRST | norms(), adapter_name="a")
    found, without = images(pipe), make_pipe(ENTRY.model())
    without.load_lora_weights(FIRST, adapter_name="a")
    assert sqnr_db(images(floating), found) > sqnr_db(images(floating), images(without)) + 6
    pipe.unload_lora_weights()
    assert torch.equal(images(pipe), before)


def test_norms_into_which_a_recipe_folded_factors_are_refused(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of the adapter stays."""
    model: GraphModel = pipe.transformer
    name = "transformer_blocks.0.attn.norm_k.weight"
    node = next(node for node in model.graphs[0].graph.find_nodes(op="get_attr") if node.target == name)
    monkeypatch.setitem(node.meta, "fxquant_history", History(name).then("rows"))
    pipe.load_lora_weights(SECOND, adapter_name="a")
    before = images(pipe)
    with pytest.raises(AdapterError, match=rf"replaces '{name}', into which the recipe folded factors"):
        pipe.load_lora_weights(FIRST | norms(), adapter_name="b")
    assert pipe.get_list_adapters() == {"transformer": ["a"]}
    assert torch.equal(images(pipe), before)


def test_a_lora_of_a_model_with_fewer_inputs_reads_the_first(pipe: FluxPipeline) -> None:
    """As for FLUX Fill and LoRAs of FLUX."""
    width, inputs = MODEL.config.num_attention_heads * MODEL.config.attention_head_dim, MODEL.config.in_channels
    path, generator = "transformer.x_embedder", torch.Generator().manual_seed(0)
    a, b = torch.randn(2, inputs - 1, generator=generator), torch.randn(width, 2, generator=generator)
    pipe.load_lora_weights({f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}, adapter_name="a")
    narrow = images(pipe)
    pipe.unload_lora_weights()
    a = torch.nn.functional.pad(a, (0, 1))
    pipe.load_lora_weights({f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}, adapter_name="a")
    assert torch.equal(images(pipe), narrow)


@pytest.mark.slow
def test_a_pipeline_with_loras_is_saved_and_loaded(pipe: FluxPipeline, tmp_path: Path) -> None:
    pipe.load_lora_weights(FIRST, adapter_name="a")
    pipe.set_adapters("a", 0.6)
    before = images(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = fxquant.load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(images(loaded), before)
    assert loaded.get_active_adapters() == ["a"]


@pytest.mark.slow
def test_a_lora_that_was_fused_before(floating: FluxPipeline) -> None:
    floating.load_lora_weights(FIRST, adapter_name="a")
    expected = images(floating)
    floating.fuse_lora()
    floating.unload_lora_weights()
    made = fxquant.compile(floating.transformer, recipe="ptq4dit-w8a8", calibrate=lambda: images(floating), measure=0)
    assert sqnr_db(expected, images(make_pipe(made))) > 40


def test_a_model_with_a_lora_that_is_not_fused_is_refused(floating: FluxPipeline) -> None:
    floating.load_lora_weights(FIRST, adapter_name="a")
    with pytest.raises(fxquant.errors.ConfigurationError, match=r"layer '.*to_q' of the model holds an adapter.*fuse"):
        fxquant.compile(floating.transformer, recipe="rtn-w8a8", calibrate=lambda: images(floating))


def test_the_class_that_pipelines_see(base: GraphModel) -> None:
    """It is one of diffusers' models; nothing is inherited from them."""
    assert issubclass(base.__class__, ModelMixin) and isinstance(base, ModelMixin)
    assert type(base) is GraphModel and isinstance(base, GraphModel)
    assert base.__class__ is base.__class__
    assert (base.__class__.__name__, base.__class__.__module__) == (GraphModel.__name__, GraphModel.__module__)
    assert "ModelMixin" not in {cls.__name__ for cls in type(base).__mro__}
