"""Computes metrics from folders of images, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fxquant.evaluation.choice import OF_FEATURES, OF_PAIRS, Choice
from fxquant.evaluation.clip import ClipScore
from fxquant.evaluation.features import Extractor, Features
from fxquant.evaluation.frechet import Moments, frechet_distance
from fxquant.evaluation.generation import Sampling
from fxquant.evaluation.inception_score import SPLITS, InceptionScore
from fxquant.evaluation.pairs import LPIPS_PIXELS, SSIM_PIXELS, Pairs
from fxquant.evaluation.precision_recall import NEIGHBOURS, precision_recall
from fxquant.evaluation.reference import Reference, check_features
from fxquant.evaluation.store import Store

Tick = Callable[[int], None]


@dataclass
class Networks:
    """The networks of an evaluation, and what images are compared with.

    Attributes:
        extractor: Finds features.
        lpips: The network of LPIPS.
        clip: Folder of the CLIP model.
        against: Statistics of real images.
        where: Where these are from, for messages.
        device: Where metrics are computed.
    """

    extractor: Extractor | None = None
    lpips: torch.nn.Module | None = None
    clip: Path | None = None
    against: Reference | None = None
    where: object = None
    device: str = "cpu"


@dataclass(frozen=True)
class Extent:
    """Which images of a folder count.

    Attributes:
        samples: Number of samples: images, or clips.
        batch: Samples per batch.
        frames: Images per sample, 1 unless samples are clips.
        sfid: Number of images for sFID.
    """

    samples: int
    batch: int
    frames: int
    sfid: int

    @property
    def images(self) -> int:
        """Number of images."""
        return self.samples * self.frames

    @property
    def batches(self) -> int:
        """Number of batches; of the last one, only some images may count."""
        return -(-self.samples // self.batch)

    def used(self, number: int) -> int:
        """Images of a batch that count."""
        return min(self.batch, self.samples - number * self.batch) * self.frames

    @property
    def of_sfid(self) -> int:
        """Images that sFID uses."""
        return min(self.sfid, self.images)


def check_possible(choice: Choice, extent: Extent, images: Tensor, found: Features | None, networks: Networks) -> None:
    """Leave out metrics for which there are too few or too small images, or features of other kinds.

    Args:
        choice: The metrics; those that are not possible are dropped.
        extent: Which images count.
        images: A batch of them.
        found: Features of that batch, if metrics need some.
        networks: What images are compared with.

    Raises:
        ConfigurationError: If a required metric is not possible; says how many images it needs.
    """
    for name, pixels in (("ssim", SSIM_PIXELS), ("lpips", LPIPS_PIXELS)):
        if min(images.shape[2:]) < pixels:
            there = f"{images.shape[3]} x {images.shape[2]}"
            choice.drop(name, f"needs images of at least {pixels} x {pixels} pixels; these have {there}")
    if found is None:
        return
    width = found.pooled.shape[1]
    if networks.against is not None:
        spatial = None if found.spatial is None else found.spatial.shape[1]
        check_features(networks.against, width, spatial, networks.where)
    for name in ("fid", "fid_to_float"):
        _needs(choice, name, extent.images, width + 1, f"has {width} features")
    if found.spatial is None:
        choice.drop("sfid", "needs spatial features, which the feature extractor does not find")
    else:
        _needs(choice, "sfid", extent.of_sfid, found.spatial.shape[1] + 1, f"has {found.spatial.shape[1]} features")
    if networks.against is not None:
        if networks.against.spatial_mean is None:
            choice.drop("sfid", "needs spatial statistics of real images, which --against does not hold")
        _check_real(choice, networks.against, width, None if found.spatial is None else found.spatial.shape[1])
    if found.logits is None:
        choice.drop("inception_score", "needs class scores (logits), which the feature extractor does not find")
    _needs(choice, "inception_score", extent.images, SPLITS, f"is averaged over {SPLITS} parts")
    for name in ("precision", "recall"):
        _needs(choice, name, extent.images, NEIGHBOURS + 1, f"looks at {NEIGHBOURS} neighbours")


def _check_real(choice: Choice, against: Reference, width: int, spatial: int | None) -> None:
    """Leave out metrics for which there are too few real images."""
    if against.images is not None:
        _needs(choice, "fid", against.images, width + 1, f"has {width} features", "real images")
        if spatial is not None:
            _needs(choice, "sfid", against.images, spatial + 1, f"has {spatial} features", "real images")
    if against.pooled is not None:
        for name in ("precision", "recall"):
            why = f"looks at {NEIGHBOURS} neighbours"
            _needs(choice, name, len(against.pooled), NEIGHBOURS + 1, why, "real images")


def _needs(choice: Choice, metric: str, there: int, needed: int, why: str, what: str = "images") -> None:
    if there < needed:
        choice.drop(metric, f"needs at least {needed} {what}, because it {why}; there are {there}")


class Measured:
    """Sums over the images of one pipeline.

    Args:
        choice: The metrics.
        extent: Which images count.
        networks: The networks.
    """

    def __init__(self, choice: Choice, extent: Extent, networks: Networks) -> None:
        self._run, self._extent, self._networks = choice.run, extent, networks
        self.moments, self._spatial = Moments(), Moments()
        self._pooled: list[Tensor] = []
        self._score = InceptionScore(extent.images) if "inception_score" in choice.run else None
        self._clip = None
        if "clip_score" in choice.run and networks.clip is not None:
            self._clip = ClipScore(networks.clip, networks.device)

    def add(self, number: int, images: Tensor, found: Features | None, prompts: list[str] | None) -> None:
        """Add a batch: the images that count of it, their features and prompts."""
        if self._clip is not None and prompts is not None:
            self._clip.add(images, [prompt for prompt in prompts for _ in range(self._extent.frames)][: len(images)])
        if found is None:
            return
        self.moments.add(found.pooled[: len(images)])
        if self._run & {"precision", "recall"}:
            self._pooled.append(found.pooled[: len(images)])
        if self._score is not None and found.logits is not None:
            self._score.add(found.logits[: len(images)])
        before = number * self._extent.batch * self._extent.frames
        left = self._extent.of_sfid - before
        if "sfid" in self._run and found.spatial is not None and left > 0:
            self._spatial.add(found.spatial[: min(len(images), left)])

    def compute(self) -> dict[str, float]:
        """The metrics that need no other pipeline."""
        found: dict[str, float] = {}
        against = self._networks.against
        if "fid" in self._run and against is not None:
            found["fid"] = self.distance_to(against.mean, against.covariance)
        if "sfid" in self._run and against is not None:
            assert against.spatial_mean is not None and against.spatial_covariance is not None
            own = self._spatial
            found["sfid"] = frechet_distance(own.mean, own.covariance, against.spatial_mean, against.spatial_covariance)
        if self._score is not None:
            found["inception_score"], found["inception_score_std"] = self._score.compute()
        if self._pooled and against is not None and against.pooled is not None:
            device = self._networks.device
            pair = precision_recall(torch.cat(self._pooled).to(device), against.pooled.to(device))
            both = dict(zip(("precision", "recall"), pair, strict=True))
            found |= {name: value for name, value in both.items() if name in self._run}
        if self._clip is not None:
            found["clip_score"] = self._clip.compute()
        return found

    def distance_to(self, mean: object, covariance: object) -> float:
        """The Fréchet distance of the features to others."""
        return frechet_distance(self.moments.mean, self.moments.covariance, mean, covariance)  # type: ignore[arg-type]


def measure(
    choice: Choice,
    extent: Extent,
    networks: Networks,
    sampling: Sampling,
    quantized: Store,
    original: Store | None,
    tick: Tick = lambda done: None,
) -> tuple[dict[str, float], dict[str, float]]:
    """All metrics of the quantized pipeline's images, and of the float pipeline's.

    Args:
        choice: The metrics.
        extent: Which images count.
        networks: The networks.
        sampling: How the images were made, for their prompts.
        quantized: The quantized pipeline's images.
        original: The float pipeline's images, of the same seeds.
        tick: Called with the number of finished batches after each.
    """
    made = Measured(choice, extent, networks)
    truth = None if original is None else Measured(choice, extent, networks)
    pairs = None
    if original is not None and choice.run & {*OF_PAIRS}:
        pairs = Pairs("ssim" in choice.run, networks.lpips if "lpips" in choice.run else None, networks.device)
    extractor = networks.extractor if choice.run & {*OF_FEATURES} else None
    for number in range(extent.batches):
        prompts = sampling.prompts_of(number)
        images = quantized.read(number)[: extent.used(number)]
        made.add(number, images, _features(quantized, number, extractor), prompts)
        if original is not None and truth is not None:
            others = original.read(number)[: extent.used(number)]
            truth.add(number, others, _features(original, number, extractor), prompts)
            if pairs is not None:
                pairs.add(images, others)
        tick(number + 1)
    found = made.compute()
    if "fid_to_float" in choice.run and truth is not None:
        found["fid_to_float"] = made.distance_to(truth.moments.mean, truth.moments.covariance)
    if pairs is not None:
        found |= {
            name: value
            for name, value in pairs.compute().items()
            if name in choice.run or (name == "psnr_per_image" and "psnr" in choice.run)
        }
    return found, {} if truth is None else truth.compute()


def _features(store: Store, number: int, extractor: Extractor | None) -> Features | None:
    return None if extractor is None else store.features(number, extractor)


def first_images(store: Store, count: int) -> Tensor:
    """The first images of a folder, at most as many as there are."""
    return torch.cat(list(_some(store, count)))[:count]


def _some(store: Store, count: int) -> Iterator[Tensor]:
    number = seen = 0
    while seen < count and store.has(number):
        images = store.read(number)
        seen, number = seen + len(images), number + 1
        yield images
