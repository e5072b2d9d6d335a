"""The CLIP score, of a small random model."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.evaluation.choice import Choice
from fxquant.evaluation.clip import ClipScore
from fxquant.evaluation.evaluate import evaluate
from fxquant.evaluation.measuring import Extent, Measured, Networks
from tests.evaluation.pipes import make_pipe

IMAGES = torch.randint(0, 256, (5, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a fox", "a red fox", "snow", "a fox " * 40, ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model whose tokens are letters."""
    from transformers import CLIPImageProcessor, CLIPTokenizer

    place = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (place / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokens), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**text, "max_position_embeddings": 24},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(place)
    tokenizer = CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"), model_max_length=24)
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(pictures, tokenizer).save_pretrained(place)
    return place


def test_the_score_is_the_mean_of_positive_cosines(folder: Path) -> None:
    score = ClipScore(folder)
    score.add(IMAGES[:2], PROMPTS[:2])
    score.add(IMAGES[2:], PROMPTS[2:])
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    expected = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        given = processor(text=[prompt], images=[picture], return_tensors="pt", truncation=True)
        with torch.no_grad():
            found = model(**given)
        cosine = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        expected.append(max(100 * cosine.item(), 0))
    assert score.compute() == pytest.approx(sum(expected) / 5, rel=1e-5)
    assert any(expected) and score.count == 5


def test_frames_of_a_clip_have_its_prompt(folder: Path) -> None:
    """And of the last batch only the clips that count."""
    extent = Extent(samples=3, batch=2, frames=2, sfid=1)
    measured = Measured(Choice({"clip_score"}), extent, Networks(clip=folder))
    measured.add(0, IMAGES[:4], None, ["a fox", "snow"])
    measured.add(1, IMAGES[3:5][: extent.used(1)], None, ["a red fox", "a fox"])
    expected = ClipScore(folder)
    expected.add(torch.cat([IMAGES[:4], IMAGES[3:5]]), ["a fox"] * 2 + ["snow"] * 2 + ["a red fox"] * 2)
    assert measured.compute() == {"clip_score": pytest.approx(expected.compute(), rel=1e-5)}


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read as a CLIP model.*openai/clip-vit"):
        ClipScore(tmp_path)


def test_models_that_lack_weights_are_refused_before_images_are_made(folder: Path, tmp_path: Path) -> None:
    """transformers would draw what is missing at random."""
    shutil.copytree(folder, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("vision_model")}
    save_file(kept, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="does not hold a CLIP model: it lacks vision_model"):
        ClipScore(tmp_path / "clip")
    with pytest.raises(CheckpointError, match="does not hold a CLIP model"):
        evaluate(
            lambda: pytest.fail("images are made"), metrics=["clip_score"], prompts=["a fox"], clip=tmp_path / "clip"
        )


def test_weights_of_nan_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"][0] = float("nan")
    save_file(weights, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"visual_projection.weight holds NaN or infinity; get"):
        ClipScore(tmp_path / "clip")


def test_evaluations_run_without_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchmetrics" else find(name))
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    pipe = make_pipe()
    found = evaluate(pipe, pipe, images=1, batch=1, steps=1)
    assert found is not None and "psnr" in found.metrics
    assert "needs torchmetrics" in found.left_out["ssim"]
    with pytest.raises(ConfigurationError, match="ssim needs torchmetrics"):
        evaluate(pipe, pipe, images=1, batch=1, steps=1, metrics=["ssim"])
