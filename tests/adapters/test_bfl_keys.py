"""LoRAs of Black Forest Labs for FLUX. Diffusers converts their keys for the full-size model only; no image is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from fxquant.adapters.checking import check_state_dict
from fxquant.adapters.reading import peft_keys
from fxquant.adapters.stand_in import make_stand_in, ranks_of
from fxquant.errors import AdapterError

WIDTH, HEAD = 3072, 128
BLOCK = {"attn.qkv": 3 * WIDTH, "attn.proj": WIDTH, "mlp.0": 4 * WIDTH, "mod.lin": 6 * WIDTH}


@pytest.fixture(scope="module")
def stand_in() -> Any:
    with torch.device("meta"):
        return make_stand_in(FluxTransformer2DModel(guidance_embeds=True))


def layers(image_inputs: int) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the layers of FLUX by their original names."""
    found = {"img_in": (image_inputs, WIDTH), "txt_in": (4096, WIDTH), "final_layer.linear": (WIDTH, 64)}
    found["final_layer.adaLN_modulation.1"] = WIDTH, 2 * WIDTH
    for name, inputs in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        found |= {f"{name}.in_layer": (inputs, WIDTH), f"{name}.out_layer": (WIDTH, WIDTH)}
    for i in range(19):
        for stream in ("img", "txt"):
            found |= {f"double_blocks.{i}.{stream}_{part}": (WIDTH, size) for part, size in BLOCK.items()}
            found[f"double_blocks.{i}.{stream}_mlp.2"] = 4 * WIDTH, WIDTH
    for i in range(38):
        found[f"single_blocks.{i}.modulation.lin"] = WIDTH, 3 * WIDTH
        found |= {f"single_blocks.{i}.linear1": (WIDTH, 7 * WIDTH), f"single_blocks.{i}.linear2": (5 * WIDTH, WIDTH)}
    return found


def lora(image_inputs: int = 64, biases: bool = False) -> dict[str, Tensor]:
    """Zeros that take no memory."""
    made = {}
    for name, (inputs, outputs) in layers(image_inputs).items():
        made[f"{name}.lora_A.weight"] = torch.zeros(()).expand(2, inputs)
        made[f"{name}.lora_B.weight"] = torch.zeros(()).expand(outputs, 2)
        if biases:
            made[f"{name}.lora_B.bias"] = torch.zeros(()).expand(outputs)
    return made


def norms() -> dict[str, Tensor]:
    names = [f"double_blocks.{i}.{stream}_attn" for i in range(19) for stream in ("img", "txt")]
    names += [f"single_blocks.{i}" for i in range(38)]
    return {f"{name}.norm.{side}_norm.scale": torch.ones(HEAD) for name in names for side in ("query", "key")}


def converted(keys: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the pipeline gives the model; it takes out the norms before that."""
    state_dict = FluxPipeline.lora_state_dict(keys)
    assert isinstance(state_dict, dict)
    return {key: value for key, value in state_dict.items() if "lora" in key}


@pytest.mark.parametrize("kind", ["control", "kontext"])
def test_every_layer_is_found(stand_in: Any, kind: str) -> None:
    keys = lora() | norms()
    if kind == "kontext":
        own = ("double_blocks.", "single_blocks.", "final_layer.linear.")
        keys = {f"base_model.model.{key}": value for key, value in lora().items() if key.startswith(own)}
    made = peft_keys(converted(keys), "transformer")
    assert made
    check_state_dict(stand_in, made)
    paths = {key.partition(".lora_")[0] for key in made}
    linears = {path for path, module in stand_in.named_modules() if isinstance(module, nn.Linear)}
    assert paths == linears if kind == "control" else paths < linears


def test_it_is_loaded(stand_in: Any) -> None:
    first = ("transformer_blocks.0.", "single_transformer_blocks.0.")
    state_dict = {
        key: value
        for key, value in converted(lora() | norms()).items()
        if key.removeprefix("transformer.").startswith(first)
    }
    stand_in.load_lora_adapter(state_dict, adapter_name="a", low_cpu_mem_usage=True)
    assert set(ranks_of(stand_in)) == {key.removeprefix("transformer.").partition(".lora_")[0] for key in state_dict}
    stand_in.unload_lora()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_inputs": 128}, r"x_embedder.* has 64 inputs\. An adapter that widens a layer, as Control-LoRAs do"),
        ({"biases": True}, "bias belongs to a LoRA with biases"),
    ],
)
def test_what_the_published_files_have_beyond_that_is_refused(
    stand_in: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        check_state_dict(stand_in, peft_keys(converted(lora(**options) | norms()), "transformer"))
