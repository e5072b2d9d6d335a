"""The shipped checkpoint: it loads, it is small, it draws the digits it is asked for."""

import torch
from diffusers import DiTPipeline

from examples.digits import digits, generate, read_accuracy
from examples.digits.generator import NULL_CLASS, PIPELINE_FOLDER
from examples.digits.judge import CLASSIFIER_FOLDER

LIMIT = 16 * 2**20


def test_size() -> None:
    files = [f for folder in (PIPELINE_FOLDER, CLASSIFIER_FOLDER) for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= LIMIT
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pkl")], "weights are stored as safetensors"


def test_loads_without_arguments_as_float32() -> None:
    pipe = DiTPipeline.from_pretrained(PIPELINE_FOLDER)
    for part in (pipe.transformer, pipe.vae):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert not part.training
    assert pipe.get_label_ids(["seven", "3"]) == [7, 3]
    tables = [b.norm1.emb.class_embedder.embedding_table.weight for b in pipe.transformer.transformer_blocks]
    assert all(len(table) == NULL_CLASS + 1 and table[NULL_CLASS].abs().max() > 0 for table in tables)


def test_latents_have_unit_deviation(pipe) -> None:
    images, _ = digits("held_back")
    latents = pipe.vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(0))
    assert 0.9 < (latents * pipe.vae.config.scaling_factor).std().item() < 1.1


def test_classifier_reads_held_back_digits(classifier) -> None:
    images, labels = digits("held_back")
    assert read_accuracy(images / 2 + 0.5, labels, classifier) >= 0.97


def test_generates_what_is_asked_for(pipe, classifier) -> None:
    labels = torch.arange(100) % 10
    images = generate(pipe, labels, seed=1, steps=20)
    assert images.shape == (100, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert read_accuracy(images, labels, classifier) >= 0.9
    zeros = images[labels == 0]
    assert zeros.std(dim=0).mean() > 0.03, "all zeros alike"


def test_generation_is_seeded_and_batches_draw_on(pipe) -> None:
    first, again = (generate(pipe, [3, 5, 7, 9], seed=4, steps=2, batch_size=2) for _ in range(2))
    assert torch.equal(first, again)
    whole, other = generate(pipe, [3, 5, 7, 9], seed=4, steps=2), generate(pipe, [3, 5, 7, 9], seed=5, steps=2)
    assert torch.allclose(first, whole, atol=1e-4), "batches continue one stream of noise"
    assert not torch.allclose(whole, other, atol=1e-2)
