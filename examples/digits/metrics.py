"""Measures the quality of images. Images are float [n, 3, 32, 32] in [0, 1], as `generate` returns them."""

import math

import torch
from torch import Tensor, nn

from fxquant.evaluation.frechet import Moments
from fxquant.evaluation.frechet import frechet_distance as distance_of

from .judge import DigitClassifier

BATCH = 250


@torch.no_grad()
def read_accuracy(images: Tensor, labels: Tensor, classifier: nn.Module) -> float:
    """The share, 0 to 1, of images that the classifier reads as the requested digit.

    Raises:
        ValueError: if the numbers of labels and images differ, or are zero.
    """
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{len(images)} images but {len(labels)} labels; one label per image is needed")
    read = torch.cat([classifier(2 * part - 1).argmax(dim=1) for part in images.split(BATCH)])
    return (read == labels).double().mean().item()


@torch.no_grad()
def frechet_distance(real: Tensor, generated: Tensor, classifier: DigitClassifier) -> float:
    """The Fréchet distance (arXiv 1706.08500) between two sets of images in the classifier's features, in float64.

    The features are not Inception's, so values can be compared only with other values of this function.

    Raises:
        ValueError: if a set does not have more images than there are features; its covariance would be singular.
    """
    if min(len(real), len(generated)) <= classifier.num_features:
        raise ValueError(
            f"{len(real)} and {len(generated)} images; more than {classifier.num_features} of each are needed"
        )
    sets = []
    for images in (real, generated):
        found = Moments()
        for part in images.split(BATCH):
            found.add(classifier.features(2 * part - 1))
        sets += [found.mean, found.covariance]
    return distance_of(*sets)


def psnr(images: Tensor, reference: Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB over all values together; infinite for equal tensors.

    Raises:
        ValueError: if the shapes differ.
    """
    if images.shape != reference.shape:
        raise ValueError(f"shapes {tuple(images.shape)} and {tuple(reference.shape)} differ")
    error = (images.double() - reference.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)
