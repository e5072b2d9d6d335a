"""The data: shapes, ranges, and a split that keeps the held-back digits back."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.digits import digits
from examples.digits.data import augment


def test_split_covers_every_digit_once() -> None:
    (train, train_labels), (held, held_labels) = digits("train"), digits("held_back")
    assert train.shape == (1437, 3, 32, 32) and held.shape == (360, 3, 32, 32)
    assert train.dtype == held.dtype == torch.float32 and train_labels.dtype == held_labels.dtype == torch.int64
    assert train.min() == -1 and train.max() == 1
    assert held_labels.bincount().min() >= 34
    assert torch.cdist(held.flatten(1), train.flatten(1)).min() > 0, "a held-back scan is also in the training set"
    with pytest.raises(ValueError, match="unknown split"):
        digits("test")  # type: ignore[arg-type]


def test_augmentation_is_seeded_and_mild() -> None:
    images, _ = digits("train")
    first, again = (augment(images[:64], torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.min() >= -1 and first.max() <= 1
    assert 0 < (first - images[:64]).abs().mean() < 0.3


@pytest.mark.slow
def test_importing_the_demo_prints_nothing() -> None:
    command = [sys.executable, "-c", "import examples.digits.demo"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
