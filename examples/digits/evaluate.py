"""Measure the shipped checkpoint: `python -m examples.digits.evaluate` from the root of the repository.

Prints the figures as JSON and writes them, with a grid of generated digits, to an ignored folder.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiTPipeline
from PIL import Image
from torch import Tensor

from .data import NUM_CLASSES, digits
from .generator import GUIDANCE, STEPS, generate, load_pipeline
from .judge import DigitClassifier, load_classifier
from .metrics import frechet_distance, psnr, read_accuracy

OUT = Path(__file__).parent / "runs" / "evaluation"


def folder_bytes(*folders: Path) -> int:
    """Bytes of all files below the folders."""
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    """Write images [n, 3, H, W] in [0, 1], n a multiple of `columns`, as one PNG, enlarged twice."""
    rows = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    pixels = (rows * 255).round().byte().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((pixels.shape[1] * 2, pixels.shape[0] * 2), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def spread(images: Tensor, labels: Tensor) -> float:
    """Mean over classes of the standard deviation of a pixel within the class; 0 if all images of a class are equal."""
    return torch.stack([images[labels == k].std(dim=0).mean() for k in range(NUM_CLASSES)]).mean().item()


@torch.no_grad()
def nearest(images: Tensor, train: Tensor) -> float:
    """The mean over images of the root mean square distance to the nearest training image."""
    distances = torch.cdist(images.flatten(1), train.flatten(1)).amin(dim=1)
    return (distances / images[0].numel() ** 0.5).mean().item()


@torch.no_grad()
def forward_seconds(pipe: DiTPipeline, samples: int = 200, repeats: int = 5) -> float:
    """Median seconds of one transformer forward of `samples` guided images, that is of 2 * samples rows."""
    latents = torch.randn(2 * samples, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, timesteps = torch.arange(2 * samples) % NUM_CLASSES, torch.full((2 * samples,), 500)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        pipe.transformer(latents, timestep=timesteps, class_labels=labels)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


@torch.no_grad()
def measure(
    pipe: DiTPipeline, classifier: DigitClassifier, samples: int, seed: int, steps: int, guidance: float
) -> tuple[dict[str, float], Tensor]:
    """The figures and the measured images, [samples, 3, 32, 32] in [0, 1] with label i % 10."""
    (train, train_labels), (held, held_labels) = digits("train"), digits("held_back")
    real, real_train = held / 2 + 0.5, train / 2 + 0.5
    labels = torch.arange(samples) % NUM_CLASSES
    start = time.perf_counter()
    images = generate(pipe, labels, seed=seed, steps=steps, guidance=guidance)
    seconds = time.perf_counter() - start
    rebuilt = pipe.vae.decode(pipe.vae.encode(held).latent_dist.mode()).sample / 2 + 0.5
    figures = {
        "classifier accuracy, held-back": read_accuracy(real, held_labels, classifier),
        "classifier accuracy, train": read_accuracy(real_train, train_labels, classifier),
        "VAE reconstruction of held-back, PSNR dB": psnr(rebuilt.clamp(0, 1), real),
        "generated read as asked for": read_accuracy(images, labels, classifier),
        "Frechet distance, generated to held-back": frechet_distance(real, images, classifier),
        "Frechet distance, train to held-back": frechet_distance(real, real_train, classifier),
        "spread within a class, generated": spread(images, labels),
        "spread within a class, held-back": spread(real, held_labels),
        "distance to nearest training image, generated": nearest(images, real_train),
        "distance to nearest training image, held-back": nearest(real, real_train),
        "seconds to generate": seconds,
        "seconds of a forward of 2 x 200 samples": forward_seconds(pipe),
    }
    return figures, images


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(__file__).parent, help="holds pipeline/ and classifier/")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for figures.json and digits.png")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    options = parser.parse_args(arguments)
    pipe = load_pipeline(options.models / "pipeline")
    classifier = load_classifier(options.models / "classifier")
    figures, images = measure(pipe, classifier, options.samples, options.seed, options.steps, options.guidance)
    settings = {name: getattr(options, name) for name in ("samples", "seed", "steps", "guidance")}
    size = folder_bytes(options.models / "pipeline", options.models / "classifier")
    report = {**settings, "bytes": size, **{name: round(value, 5) for name, value in figures.items()}}
    save_grid(images[: len(images) // 20 * 20][:200], 20, options.out / "digits.png")
    (options.out / "figures.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
