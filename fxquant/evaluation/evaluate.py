"""Makes images with a quantized pipeline and with the float one, and measures them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fxquant.errors import ConfigurationError
from fxquant.evaluation.arguments import check_arguments
from fxquant.evaluation.choice import OF_FEATURES, Choice, Given, choose
from fxquant.evaluation.clip import ClipScore
from fxquant.evaluation.features import Extractor, Input, inception, named_extractor
from fxquant.evaluation.generation import Labels, Sampling, is_quantized, make_images
from fxquant.evaluation.measuring import Extent, Networks, check_possible, first_images, measure
from fxquant.evaluation.pairs import lpips_network
from fxquant.evaluation.picture import check_picture, write_grid
from fxquant.evaluation.reference import Reference, check_reference, check_sizes, has_spatial, read_reference
from fxquant.evaluation.result import Evaluation, check_limits
from fxquant.evaluation.sources import (
    batch_of_folders,
    check_source,
    device_of_rank,
    folder_of_float,
    open_source,
    share_of,
    work_folder,
)
from fxquant.evaluation.store import Store
from fxquant.evaluation.weights import CLIP, INCEPTION, LPIPS, find_weights

Progress = Callable[[str, int, int], None]
SFID_IMAGES = 10_000
"""Images that sFID uses by default."""

_PICTURED = 16
_COMPANIONS = {"psnr_per_image": "psnr", "inception_score_std": "inception_score"}


def evaluate(
    pipe: Any,
    reference: Any = None,
    *,
    images: int = 1000,
    batch: int = 32,
    steps: int = 25,
    seed: int = 0,
    guidance: float | None = None,
    labels: Labels | Sequence[int] = "balanced",
    prompts: Sequence[str] | None = None,
    sizes: Mapping[str, int] | None = None,
    against: str | Path | Reference | None = None,
    metrics: Collection[str] | None = None,
    limits: Mapping[str, float] | None = None,
    features: str | Extractor | nn.Module | None = None,
    takes: Input = "unit",
    inception: str | Path | None = None,
    lpips: str | Path | None = None,
    clip: str | Path | None = None,
    sfid_images: int = SFID_IMAGES,
    work: str | Path | None = None,
    float_work: str | Path | None = None,
    overwrite: bool = False,
    shard: tuple[int, int] | None = None,
    picture: str | Path | None = None,
    device: str = "cpu",
    progress: Progress = lambda what, done, total: None,
) -> Evaluation | None:
    """Measure the images of a quantized pipeline by the metrics of the field.

    Images are made in numbered batches. The noise of a batch depends only on the seed and the number of the batch, so
    the float pipeline's images have the same noise, and several processes can share the work. With ``work`` each batch
    is kept, and the same call again continues after the last whole batch, with equal results; with more ``images`` it
    makes the rest.

    Args:
        pipe: The quantized pipeline: the pipeline itself, its folder or name on the hub, or a function without
            arguments that returns it.
        reference: The float pipeline, in the same forms. It is read after the images of the first one were made.
        images: Images to make, or clips, whose frames count as images.
        batch: Images per batch, at most ``images``. A folder that holds smaller batches is continued with these.
        steps: Denoising steps.
        seed: Seed of the noise.
        guidance: Guidance scale; the pipeline's own if None.
        labels: ``balanced`` for every class equally often, ``uniform`` to draw them, or labels to repeat.
        prompts: Prompts to repeat, for text pipelines.
        sizes: ``height``, ``width`` and ``num_frames`` of the output.
        against: Real images to compare with: an npz of ADM's evaluation, a folder of images, or what
            :func:`fxquant.evaluation.reference.reference_of` made of images.
        metrics: Which metrics (:data:`fxquant.evaluation.choice.METRICS`); all that can be computed if None.
        limits: Lowest or highest value by metric, for :meth:`Evaluation.check`. They are not checked here, but their
            metrics are computed in any case.
        features: Feature extractor in place of the Inception network: a module, or ``module:attribute``. It is called
            on ``[n, 3, H, W]`` and returns features ``[n, d]``, or a mapping with ``features`` and optionally
            ``spatial`` and ``logits``.
        takes: Whether ``features`` is called on float32 in [0, 1] (``unit``) or on bytes (``uint8``).
        inception: File of the weights of the Inception network; the environment variable ``FXQUANT_INCEPTION`` if None.
        lpips: File of the weights of AlexNet for LPIPS; ``FXQUANT_LPIPS`` if None.
        clip: Folder of a CLIP model; ``FXQUANT_CLIP`` if None.
        sfid_images: Images that sFID uses, the first ones.
        work: Folder for images and features; a temporary one if None.
        float_work: Folder for those of the float pipeline, which evaluations of several quantized pipelines can share;
            a folder in ``work`` if None.
        overwrite: Whether images of other settings in ``work`` are removed; else they are refused.
        shard: ``(i, n)`` to make only the i-th of n shares of the images. Under ``torchrun`` each rank makes its share,
            and rank 0 measures.
        picture: File for a picture of the first images: float above quantized, and their difference below.
        device: Where pipelines that are read and networks run.
        progress: Called with what is done, and how many of how many batches.

    Returns:
        The figures; None if this process made only a share of the images.

    Raises:
        ConfigurationError: If an option does not fit the pipeline or another option, or a metric that was asked for is
            not possible, for example with too few images.
        MetricWeightsError: If such a metric needs weights that are not given.
        EvaluationError: If ``work`` holds images of other settings, or another process works there.
        CheckpointError: If a file cannot be read.
    """
    check_arguments(locals())
    for source in (pipe, *([] if reference is None else [reference])):
        check_source(source)
    job = _Job(
        Sampling(
            batch_of_folders(images, batch, work, float_work, overwrite),
            steps,
            seed,
            guidance,
            labels if isinstance(labels, str) else tuple(labels),
            None if prompts is None else tuple(prompts),
            sizes or {},
        ),
        images,
        sfid_images,
        device_of_rank(device),
        progress,
    )
    share, alone = share_of(shard, work, overwrite)
    if picture is not None:
        check_picture(Path(picture))
    files = _Files(
        find_weights(INCEPTION, inception),
        find_weights(LPIPS, lpips),
        find_weights(CLIP, clip),
        Path(against) if isinstance(against, str) else against,
    )
    job.choice = _choice(job.sampling, features, reference, files, metrics, limits or {})
    job.networks = _networks(job.choice, features, takes, files, job.device, measures=share[0] == 0)
    with work_folder(work) as folder, folder_of_float(folder, float_work, share) as of_float:
        made = job.make(pipe, folder / "quantized", share, overwrite, "quantized")
        original = None if reference is None else job.make(reference, of_float, share, overwrite, "float")
        if not alone and (shard is not None or share[0]):
            return None
        extent = job.wait([made, *([] if original is None else [original])])
        found, float_metrics = measure(
            job.choice, extent, job.networks, job.sampling, made, original, job.told("measure", extent.batches)
        )
        if picture is not None:
            count = min(_PICTURED, extent.images)
            write_grid(picture, first_images(made, count), None if original is None else first_images(original, count))
    counts = {"sfid": extent.of_sfid} if "sfid" in found else {}
    return Evaluation(found, float_metrics, extent.images, counts, job.choice.left_out, job.settings(files), job.notes)


@dataclass
class _Files:
    """Paths that were given."""

    inception: Path | None
    lpips: Path | None
    clip: Path | None
    against: Path | Reference | None

    @property
    def where(self) -> str | None:
        """Name of what images are compared with."""
        if isinstance(self.against, Path):
            return self.against.name
        return None if self.against is None else "the given reference"


@dataclass
class _Job:
    """What all steps of an evaluation know."""

    sampling: Sampling
    samples: int
    sfid: int
    device: str
    progress: Progress
    choice: Choice = field(default_factory=Choice)
    networks: Networks = field(default_factory=Networks)
    notes: list[str] = field(default_factory=list)
    frames: int = 1
    classes: str | None = None

    @property
    def extent(self) -> Extent:
        return Extent(self.samples, self.sampling.batch, self.frames, self.sfid)

    def told(self, what: str, total: int) -> Callable[[int], None]:
        """A function that reports how many of ``total`` batches are done."""
        self.progress(what, 0, total)
        return lambda done: self.progress(what, done, total)

    def make(self, source: Any, folder: Path, share: tuple[int, int], overwrite: bool, name: str) -> Store:
        """Make the images of a pipeline, and find their features."""
        self.progress(f"read the {name} pipeline", 0, 1)
        pipe = open_source(source, self.device)
        self.sampling.check(pipe)
        self._check_classes(pipe)
        if name == "quantized" and not is_quantized(pipe):
            self.notes.append("the first pipeline is not quantized")
        store = Store(folder, self.sampling.settings(pipe), overwrite)
        store.tidy(share)
        if store.restarted:
            self.notes.append(f"images of other settings in {folder} were removed")
        batches = self.extent.batches
        numbers = range(share[0], batches, share[1])
        there = sum(map(store.has, numbers))
        if there:
            self.notes.append(f"{there} of {len(numbers)} batches in {folder} were there before")
        told = self.told(f"make {name} images", len(numbers))
        if share[0] == 0:  # The first batch shows what is possible.
            make_images(pipe, self.sampling, store, 1)
            self._look(store)
        make_images(pipe, self.sampling, store, batches, share, told)
        del pipe
        extractor = self._extractor()
        if extractor is not None:
            told = self.told(f"features of {name} images", len(numbers))
            for done, number in enumerate(numbers):
                store.features(number, extractor)
                told(done + 1)
        return store

    def _check_classes(self, pipe: Any) -> None:
        """Refuse pipelines that know different classes, because their images would have different labels."""
        known = self.sampling.classes(pipe)
        if self.classes not in (None, known):
            raise ConfigurationError(
                f"the quantized pipeline knows classes {self.classes} and the float one {known}, so their images would "
                "show different classes; give labels, such as --labels 0-9"
            )
        self.classes = known

    def _extractor(self) -> Extractor | None:
        return self.networks.extractor if self.choice.run & {*OF_FEATURES} else None

    def _look(self, store: Store) -> None:
        """Check with the first batch which metrics are possible."""
        first = store.read(0)
        self.frames = len(first) // self.sampling.batch
        extractor = self._extractor()
        found = None if extractor is None else store.features(0, extractor)
        check_possible(self.choice, self.extent, first, found, self.networks)
        if self.networks.against is not None and found is not None:
            check_sizes(self.networks.against, first.shape[3], first.shape[2], self.networks.where)
        if not self.choice.run:
            reasons = [f"{name} {reason}" for name, reason in self.choice.left_out.items()]
            raise ConfigurationError("no metric is possible: " + "; ".join(reasons))

    def wait(self, stores: Sequence[Store]) -> Extent:
        """Wait until other processes have made their images."""
        self.progress("wait for other processes", 0, 1)
        for store in stores:
            store.wait_for(range(self.extent.batches))
        return self.extent

    def settings(self, files: _Files) -> dict[str, Any]:
        """How the images were made, and what measured them."""
        sampling = self.sampling
        extractor = self.networks.extractor
        return {
            "images": self.samples,
            "batch": sampling.batch,
            "steps": sampling.steps,
            "seed": sampling.seed,
            "guidance": sampling.guidance,
            "labels": sampling.labels if sampling.prompts is None else None,
            "prompts": None if sampling.prompts is None else len(sampling.prompts),
            "sizes": dict(sampling.sizes),
            "features": None if extractor is None else {"name": extractor.name, "key": extractor.key},
            "against": files.where,
        }


def _choice(
    sampling: Sampling,
    features: Any,
    reference: Any,
    files: _Files,
    metrics: Collection[str] | None,
    limits: Mapping[str, float],
) -> Choice:
    check_limits(limits)
    limited = [_COMPANIONS.get(name, name) for name in limits]
    real = files.against
    if isinstance(real, Path):
        with_images, with_spatial = check_reference(real), has_spatial(real)
    else:
        with_images = real is not None and real.pooled is not None
        with_spatial = real is not None and real.spatial_mean is not None
    given = Given(
        extractor=features is not None or files.inception is not None,
        real=real is not None,
        real_images=with_images,
        real_spatial=with_spatial,
        float_model=reference is not None,
        lpips=files.lpips is not None,
        clip=files.clip is not None,
        prompts=sampling.prompts is not None,
    )
    return choose(given, metrics, limited)


def _networks(choice: Choice, features: Any, takes: Input, files: _Files, device: str, measures: bool) -> Networks:
    """Read the networks that the metrics need, and the reference if this process has the first batch or measures."""
    found = Networks(device=device, where=files.where)
    if choice.run & {*OF_FEATURES}:
        if isinstance(features, Extractor):
            found.extractor = features
        elif isinstance(features, str):
            found.extractor = named_extractor(features, takes, device)
        elif features is not None:
            found.extractor = Extractor(features, takes, device=device)
        elif files.inception is not None:
            found.extractor = inception(files.inception, device)
    if "lpips" in choice.run and files.lpips is not None:
        found.lpips = lpips_network(files.lpips, device)
    if "clip_score" in choice.run and files.clip is not None:
        found.clip = files.clip
        ClipScore(files.clip, device)  # So that a folder of something else is refused before images are made.
    if importlib.util.find_spec("torchmetrics") is None:
        choice.drop("ssim", "needs torchmetrics, which is not installed: pip install 'fxquant[evaluation]'")
    if isinstance(files.against, Reference):
        found.against = files.against
    elif found.extractor is not None and files.against is not None and measures:
        found.against = read_reference(files.against, found.extractor)
    return found
