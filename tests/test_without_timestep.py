"""Text encoders: models of transformers, without a timestep."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import fxquant
from fxquant.disk.files import digest_of
from fxquant.errors import CheckpointError, MissingTimestepError
from fxquant.runtime.model import GraphModel


def make_t5(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return T5EncoderModel(
        T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, **options)
    ).eval()


def make_clip() -> nn.Module:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=32,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config).eval()


@torch.no_grad()
def run(model: nn.Module, batch: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    """The embeddings of prompts, one of which is shorter than the others."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    output: Tensor = model(ids, attention_mask=mask)[0]
    return output


def compiled(model: nn.Module, recipe: str) -> GraphModel:
    return fxquant.compile(model, recipe=recipe, calibrate=lambda: run(model), timestep=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "most", "make"),
    [
        ("rtn-w8a16", 30, make_t5),
        ("dynamic-w8a8", 25, make_clip),
        ("ptq4dit-gptq-w8a8", 25, make_t5),
        pytest.param("rtn-w8a16", 30, make_clip, marks=pytest.mark.exhaustive),
        pytest.param("dynamic-w8a8", 25, make_t5, marks=pytest.mark.exhaustive),
        pytest.param("ptq4dit-gptq-w8a8", 25, make_clip, marks=pytest.mark.exhaustive),
    ],
)
def test_it_is_quantized_saved_and_loaded(tmp_path: Path, make: Any, recipe: str, most: float) -> None:
    model = make()
    quantized = compiled(model, recipe)
    assert quantized.plan.timestep is None
    assert quantized.plan.bytes_after < 0.6 * quantized.plan.bytes_before
    assert min(quantized.plan.output_sqnr_db.values()) > most
    assert type(quantized.config) is type(model.config)
    fxquant.save(quantized, tmp_path / "encoder")
    assert (tmp_path / "encoder" / "model.safetensors").exists()
    loaded = fxquant.load(tmp_path / "encoder")
    for options in ({}, {"batch": 1, "seed": 3}, {"length": 12}):
        assert torch.equal(run(loaded, **options), run(quantized, **options))
        expected = run(model, **options)
        assert (run(loaded, **options) - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("recipe", ["htg-w8a8", "svdquant-bins-w8a8"])
def test_recipes_that_group_timesteps_are_refused(recipe: str) -> None:
    with pytest.raises(MissingTimestepError, match=r"nothing can depend on it.*shift-channels and bin-ranges"):
        compiled(make_t5(), recipe)


def test_the_message_names_the_option() -> None:
    model = make_t5()
    with pytest.raises(MissingTimestepError, match=r"no tensor input 'timestep'.*takes timestep=None"):
        fxquant.compile(model, recipe="rtn-w8a16", calibrate=lambda: run(model))


def test_a_config_chooses_no_code(tmp_path: Path) -> None:
    """A name of a repository in its place would let transformers fetch code from there."""
    fxquant.save(compiled(make_t5(), "rtn-w8a16"), tmp_path / "encoder")
    path = tmp_path / "encoder" / "config.json"
    config = json.loads(path.read_text())
    for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        config[name] = "somebody/kernels"
    path.write_text(json.dumps(config, indent=2) + "\n")
    plan = tmp_path / "encoder" / "plan.json"
    data = json.loads(plan.read_text())
    data["files"]["config.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
    del data["digest"]
    plan.write_text(json.dumps(data | {"digest": digest_of(data)}, indent=1) + "\n")
    loaded = fxquant.load(tmp_path / "encoder")
    assert loaded.config._attn_implementation != "somebody/kernels"


def test_another_attention_than_loading_chooses(tmp_path: Path) -> None:
    model = make_clip()
    model.set_attn_implementation("eager")
    quantized = compiled(model, "rtn-w8a16")
    with pytest.raises(CheckpointError, match="loading would not build this CLIPTextModelWithProjection again"):
        fxquant.save(quantized, tmp_path / "encoder")


def test_the_report_names_no_timestep() -> None:
    shown = fxquant.report(compiled(make_t5(), "rtn-w8a8"))
    assert shown.timesteps == () and shown.totals.worst_timestep is None
    assert shown.summary().count("output SQNR  mean") == 1
    assert "timestep" not in shown.table()
