"""A small, real diffusion transformer on handwritten digits: the model that examples and tests quantize by default."""

from . import quiet  # noqa: F401  # isort: skip  (before torchao and diffusers are imported)

from .data import digits
from .generator import generate, load_pipeline
from .judge import DigitClassifier, load_classifier
from .metrics import frechet_distance, psnr, read_accuracy
from .salience import plant_salience

__all__ = [
    "DigitClassifier",
    "digits",
    "frechet_distance",
    "generate",
    "load_classifier",
    "load_pipeline",
    "plant_salience",
    "psnr",
    "read_accuracy",
]
