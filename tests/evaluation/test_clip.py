"""The CLIP score, of a small random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from fxquant.errors import CheckpointError
from fxquant.evaluation.clip import ClipScore

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


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read as a CLIP model.*openai/clip-vit"):
        ClipScore(tmp_path)
