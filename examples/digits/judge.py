"""The judge: a small convolutional classifier of digits. The Fréchet distance uses its features."""

import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .data import NUM_CLASSES

CLASSIFIER_FOLDER = Path(__file__).parent / "classifier"


class DigitClassifier(nn.Module):
    """Logits of the ten digits for float32 images [n, 3, 32, 32] in [-1, 1].

    It uses GroupNorm rather than BatchNorm, because a result must not depend on the other images of a batch.
    """

    def __init__(self, width: int = 32, num_features: int = 64) -> None:
        super().__init__()
        self.width, self.num_features = width, num_features
        widths = [3, width, 2 * width, 2 * width, num_features]
        self.trunk = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, stride=1 if i == 0 else 2, padding=1),
                    nn.GroupNorm(8, after),
                    nn.SiLU(),
                )
                for i, (before, after) in enumerate(itertools.pairwise(widths))
            )
        )
        self.head = nn.Linear(num_features, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """The pooled activations [n, num_features] before the last linear layer."""
        return self.trunk(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10]."""
        return self.head(self.features(images))


def save_classifier(model: DigitClassifier, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` (in the dtype of the parameters) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"width": model.width, "num_features": model.num_features}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")


def load_classifier(folder: Path = CLASSIFIER_FOLDER) -> DigitClassifier:
    """The classifier stored in `folder` (the shipped one by default), float32, in eval mode, without gradients.

    Raises:
        FileNotFoundError: if the folder contains no classifier.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no classifier in {folder}; make one with `python -m examples.digits.train`")
    with torch.random.fork_rng(devices=[]):  # loading must not disturb the caller's random state
        model = DigitClassifier(**json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval().requires_grad_(False)


class JudgeFeatures(nn.Module):
    """The classifier as a feature extractor of ``fxquant.evaluate``, for images [n, 3, 32, 32] in [0, 1]."""

    def __init__(self, classifier: DigitClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The pooled features [n, 64] and the logits [n, 10]."""
        features = self.classifier.features(2 * images - 1)
        return {"features": features, "logits": self.classifier.head(features)}


def features() -> JudgeFeatures:
    """The shipped classifier as a feature extractor: ``fxquant eval --features examples.digits.judge:features``."""
    return JudgeFeatures(load_classifier())
