"""The data: scikit-learn's bundled handwritten digits, with a fixed split, and the augmentation used in training.

Only `digits` decides which images are held back. The VAE, the transformer and the classifier all train on
`digits("train")`.
"""

import functools
import math
from typing import Literal

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

IMAGE_SIZE = 32
NUM_CLASSES = 10
HELD_BACK = 360  # of 1,797, a fifth of every class
SPLIT_SEED = 0  # fixed: published figures are valid for this split only

Split = Literal["train", "held_back"]


@functools.cache
def _all_digits() -> tuple[Tensor, Tensor]:
    """All 1,797 scans as float32 [1797, 1, 8, 8] in [0, 1] and int64 labels [1797]."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels).long()


def digits(split: Split) -> tuple[Tensor, Tensor]:
    """Images float32 [n, 3, 32, 32] in [-1, 1] and labels int64 [n]; n is 1437 for "train", 360 for "held_back".

    The 8x8 grey scans are enlarged bicubically. The three channels are equal.

    Raises:
        ValueError: for any other split.
    """
    if split not in ("train", "held_back"):
        raise ValueError(f"unknown split {split!r}; known: 'train', 'held_back'")
    pixels, labels = _all_digits()
    train, held_back = train_test_split(
        range(len(labels)), test_size=HELD_BACK, random_state=SPLIT_SEED, stratify=labels.numpy()
    )
    rows = torch.tensor(train if split == "train" else held_back)
    large = F.interpolate(pixels[rows], size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic").clamp(0, 1)
    return (2 * large - 1).expand(-1, 3, -1, -1).contiguous(), labels[rows]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [n, 3, H, W] in [-1, 1] after a small random rotation, shear, scaling and shift, one per image.

    They are at most 8 degrees, 0.1, 6% and 1.25 of 32 pixels. Pixels from outside the image are background (-1).
    """
    n = len(images)

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(n, generator=generator) - 1) * limit

    angle, shear, zoom = uniform(math.radians(8)), uniform(0.1), 1 + uniform(0.06)
    shift = torch.stack([uniform(1.25 * 2 / IMAGE_SIZE), uniform(1.25 * 2 / IMAGE_SIZE)], dim=1)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    linear = torch.stack([torch.stack([cos, shear - sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
    grid = F.affine_grid(torch.cat([linear, shift[:, :, None]], dim=2), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, mode="bilinear", align_corners=False) - 1
