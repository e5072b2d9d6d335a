"""Names of the authors' checkpoints: what diffusers' own converters make of them is what diffusers had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_model
from torch import Tensor, nn

from fxquant.errors import ConfigurationError
from fxquant.export.original_names import LAYOUTS, OriginalNames
from tests.zoo.models import ENTRIES

# The converters of these classes split rows at sizes of the published models.
PUBLISHED = {
    name: {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 24}
    for name in ("FluxTransformer2DModel", "ChromaTransformer2DModel")
}


def converted(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers reads from a checkpoint of the authors."""
    convert = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
    found: dict[str, Tensor] = convert(dict(tensors), config={})
    return found


def model_of(name: str, **options: Any) -> nn.Module:
    entry = next(entry for entry in ENTRIES if entry.name == name)
    import diffusers

    with torch.device("meta"):
        made: nn.Module = getattr(diffusers, name)(**entry.config | options)
    return made


@pytest.mark.parametrize("name", LAYOUTS)
def test_diffusers_converts_them_back(name: str) -> None:
    model = model_of(name, **PUBLISHED.get(name, {}))
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.rand(value.shape[:1] + (1,) * (value.dim() - 1), generator=generator)  # Only rows are moved.
        for key, value in model.state_dict().items()
    }
    names = OriginalNames(type(model), state)
    found = converted(name, names.tensors(state))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_image_layers_of_wan() -> None:
    model = model_of("WanTransformer3DModel", added_kv_proj_dim=24, image_dim=16, pos_embed_seq_len=4)
    state = {key: torch.rand(value.shape[:1]) for key, value in model.state_dict().items()}
    assert any("add_k_proj" in key for key in state) and any("image_embedder" in key for key in state)
    theirs = OriginalNames(type(model), state).tensors(state)
    assert {"img_emb.proj.0.weight", "img_emb.emb_pos", "blocks.0.cross_attn.k_img.bias"} < theirs.keys()
    theirs.pop("img_emb.emb_pos")  # diffusers has no name for it.
    found = converted("WanTransformer3DModel", theirs)
    state.pop("condition_embedder.image_embedder.pos_embed")
    assert found.keys() == state.keys() and all(torch.equal(found[key], value) for key, value in state.items())


class Own(nn.Module):
    """No class of diffusers."""


def test_subclasses_have_the_names_of_their_class() -> None:
    flux = type("Mine", (type(model_of("FluxTransformer2DModel")),), {})
    names = OriginalNames(flux, ["x_embedder.weight"])
    assert list(names.tensors({"x_embedder.weight": torch.ones(1)})) == ["img_in.weight"]


def test_refusals() -> None:
    with pytest.raises(ConfigurationError, match=r"names of a Own are not known, only those of .*SD3.*names='class'"):
        OriginalNames(Own, [])
    flux = type(model_of("FluxTransformer2DModel"))
    block = "transformer_blocks.0.attn"
    names = OriginalNames(flux, [f"{block}.to_q.weight"])
    with pytest.raises(ConfigurationError, match=r"no name for 'adapter.weight' of this FluxTransformer2DModel"):
        names.tensors({"adapter.weight": torch.ones(1)})
    ones = torch.ones(1)
    whole = {f"{block}.to_{one}.weight": ones for one in "qkv"}
    with pytest.raises(ConfigurationError, match=r"'double_blocks.0.img_attn.qkv.weight' as one tensor.*to_k"):
        names.tensors(whole | {f"{block}.to_k.weight": ones.to(torch.int8)})
    whole.pop(f"{block}.to_v.weight")
    with pytest.raises(ConfigurationError, match="only a part of its layers"):
        names.tensors(whole)
