"""Which metrics run: those that were asked for, or all that what is given allows, with reasons for the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from fxquant.errors import ConfigurationError, MetricWeightsError, UnknownNameError
from fxquant.evaluation.weights import CLIP, INCEPTION, LPIPS

METRICS = {
    "fid": "Fréchet distance to real images",
    "sfid": "Fréchet distance of spatial features to real images",
    "inception_score": "inception score",
    "precision": "share of images within the manifold of real ones",
    "recall": "share of real images within the manifold of the images",
    "clip_score": "fit of images and prompts",
    "fid_to_float": "Fréchet distance to the float model's images",
    "psnr": "peak signal-to-noise ratio to the float model's images, dB",
    "ssim": "structural similarity to the float model's images",
    "lpips": "perceptual distance to the float model's images",
}
"""All metrics with what they say."""

OF_FEATURES = ("fid", "sfid", "inception_score", "precision", "recall", "fid_to_float")
OF_REAL_IMAGES = ("fid", "sfid", "precision", "recall")
OF_PAIRS = ("psnr", "ssim", "lpips")


@dataclass
class Given:
    """What an evaluation was given.

    Attributes:
        extractor: Whether there is a feature extractor.
        real: Whether there is a reference of real images.
        real_images: Whether it has images or features, and not only statistics.
        real_spatial: Whether it has spatial statistics, or images.
        float_model: Whether there is a float model.
        lpips: Whether there are weights of LPIPS.
        clip: Whether there is a CLIP model.
        prompts: Whether there are prompts.
    """

    extractor: bool = False
    real: bool = False
    real_images: bool = False
    real_spatial: bool = False
    float_model: bool = False
    lpips: bool = False
    clip: bool = False
    prompts: bool = False


@dataclass
class Choice:
    """The metrics that run.

    Attributes:
        run: Their names.
        left_out: Why the others do not run, by name.
        required: Those that were asked for by name, or have a limit.
    """

    run: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)
    required: frozenset[str] = frozenset()

    def drop(self, metric: str, reason: str) -> None:
        """Leave a metric out that was found not to be possible; the reason follows its name in a sentence.

        Raises:
            ConfigurationError: If it is required.
        """
        if metric not in self.run:
            return
        if metric in self.required:
            raise ConfigurationError(f"{metric} {reason}")
        self.run.discard(metric)
        self.left_out[metric] = reason


def choose(given: Given, asked: Collection[str] | None = None, limited: Collection[str] = ()) -> Choice:
    """The metrics that run.

    Args:
        given: What there is.
        asked: Names of metrics; all that can run if None.
        limited: Names of metrics that have a limit, which are computed in any case.

    Raises:
        UnknownNameError: If there is no such metric.
        MetricWeightsError: If one that was asked for needs weights that are not given.
        ConfigurationError: If one that was asked for needs something else, or no metric can run.
    """
    required = dict.fromkeys([*(asked or ()), *limited])
    for name in required:
        if name not in METRICS:
            raise UnknownNameError("metric", name, METRICS)
    reasons = {name: reason for name in METRICS if (reason := _reason(name, given)) is not None}
    possible = [name for name in METRICS if name not in reasons]
    wanted = list(METRICS) if asked is None else list(required)
    missing = {name: reasons[name] for name in wanted if name in reasons}
    if not possible and not required:
        raise ConfigurationError(
            "no metric can run: give the float model (--reference) for psnr and ssim, weights of Inception "
            "(--inception) or another network (--features) for the inception score, real images (--against) for fid"
        )
    first = next((name for name in wanted if name in reasons and name in required), None)
    if first is not None:
        raise _error(f"{first} {missing[first]}", possible)
    if not wanted:
        raise ConfigurationError(f"no metric was asked for; choose from {', '.join(possible)}")
    return Choice({*wanted} - {*missing}, missing, frozenset(required))


def _error(reason: str, possible: Iterable[str]) -> ConfigurationError | MetricWeightsError:
    runs = ", ".join(possible)
    text = f"{reason}. Without it run: {runs or 'no metrics; a float model (--reference) gives psnr and ssim'}"
    by_weights = any(weights.variable in reason for weights in (INCEPTION, LPIPS, CLIP))
    return MetricWeightsError(text) if by_weights else ConfigurationError(text)


def _reason(metric: str, given: Given) -> str | None:
    """Why a metric cannot run with what is given, after its name in a sentence; None if it can."""
    if metric in (*OF_PAIRS, "fid_to_float") and not given.float_model:
        return "needs the float model's images: give the float model with --reference"
    if metric in OF_REAL_IMAGES and not given.real:
        return "needs real images: give their statistics, or a folder of them, with --against"
    if metric in OF_FEATURES and not given.extractor:
        return f"{INCEPTION.missing()}, or give another network with --features module:attribute"
    if metric == "sfid" and not given.real_spatial:
        return "needs spatial statistics of real images (mu_s and sigma_s), which --against does not hold"
    if metric in ("precision", "recall") and not given.real_images:
        return "needs real images (arr_0, or a folder), and --against holds only statistics"
    if metric == "lpips" and not given.lpips:
        return LPIPS.missing()
    if metric == "clip_score" and not given.prompts:
        return "needs prompts, which this pipeline does not take"
    if metric == "clip_score" and not given.clip:
        return CLIP.missing()
    return None
