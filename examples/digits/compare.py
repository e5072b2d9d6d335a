"""Measures the error of quantizing the digits model; the demo and the ablation share these measurements."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from torch import Tensor, fx, nn

import fxquant
from fxquant.authoring import LayerPlan, Pass, PassContext, Rewriter, Stage, Tier, register_pass
from fxquant.disk.files import write_tensors
from fxquant.numerics.sqnr import sqnr_db
from fxquant.pipeline.recipes import Recipe, make_recipe
from fxquant.runtime.model import GraphModel
from fxquant.statistics.collection import Statistics
from fxquant.storage.aot.package import TENSORS_FILE

from .generator import GUIDANCE, generate
from .judge import DigitClassifier
from .metrics import frechet_distance, psnr, read_accuracy

CALIBRATION_STEPS = 25
CALIBRATION_SAMPLES = 32
"""PTQ4DiT's setting for ImageNet 256x256: 25 timesteps, 32 conditional and 32 unconditional samples at each."""

TEST_STEPS = 20
TEST_SAMPLES = 16
_TEST_SEED = 1_000  # Neither the seed of the calibration noise nor the seed of the images.

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """One quantized model compared with the float model.

    Attributes:
        model: ``plain`` or ``planted``.
        recipe: Name of the recipe.
        layers: Which layers were quantized.
        sqnr_db: Mean over test timesteps of the SQNR of the noise prediction, in dB.
        worst_db: SQNR of the worst test timestep, in dB.
        psnr_db: PSNR of the final images against the float model's, in dB.
        frechet: Fréchet distance to held-back real digits in the classifier's features.
        accuracy: Share of images that the classifier reads as the requested digit.
        megabytes: Size of the transformer's checkpoint on disk.
        seconds: Seconds of the conversion, without a calibration that several recipes share.
    """

    model: str
    recipe: str
    layers: str
    sqnr_db: float
    worst_db: float
    psnr_db: float
    frechet: float
    accuracy: float
    megabytes: float
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


@contextmanager
def transformer_of(pipe: DiTPipeline, transformer: nn.Module):
    """Let a pipeline use another transformer inside the context."""
    own, pipe.transformer = pipe.transformer, transformer
    try:
        yield pipe
    finally:
        pipe.transformer = own


def calibration(pipe: DiTPipeline, transformer: nn.Module, guidance: float = GUIDANCE):
    """A callable that runs ``transformer`` in the pipeline as PTQ4DiT calibrates: see the constants above."""
    labels = [number % 10 for number in range(CALIBRATION_SAMPLES)]

    def calibrate() -> None:
        with transformer_of(pipe, transformer):
            generate(pipe, labels, seed=_TEST_SEED + 1, steps=CALIBRATION_STEPS, guidance=guidance)

    return calibrate


def test_calls(pipe: DiTPipeline, transformer: DiTTransformer2DModel, guidance: float = GUIDANCE) -> list[Call]:
    """The calls of the transformer on a float trajectory that calibration has not seen."""
    calls: list[Call] = []
    hook = transformer.register_forward_pre_hook(lambda _, args, kw: calls.append((args, kw)), with_kwargs=True)
    labels = [number % 10 for number in range(TEST_SAMPLES)]
    try:
        with transformer_of(pipe, transformer):
            generate(pipe, labels, seed=_TEST_SEED, steps=TEST_STEPS, guidance=guidance)
    finally:
        hook.remove()
    return calls


@torch.no_grad()
def predicted_noise(transformer: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """The noise that a transformer predicts, one tensor per call."""
    return [transformer(*args, **kwargs).sample for args, kwargs in calls]


def noise_sqnr(quantized: nn.Module, reference: Sequence[Tensor], calls: Sequence[Call]) -> list[float]:
    """SQNR in dB of the predicted noise against the float model's (:func:`predicted_noise`), one value per call."""
    return [sqnr_db(*pair) for pair in zip(reference, predicted_noise(quantized, calls), strict=True)]


def quantize(pipe: DiTPipeline, transformer: nn.Module, recipe: Recipe, **options: Any) -> tuple[nn.Module, float]:
    """A transformer quantized with the calibration of the papers, and the seconds that this took."""
    began = time.perf_counter()
    quantized = fxquant.compile(
        transformer, recipe=recipe, calibrate=calibration(pipe, transformer), measure=0, **options
    )
    return quantized, time.perf_counter() - began


@register_pass
@dataclass(frozen=True)
class RecordMoments(Pass):
    """Change nothing, and let calibration record the second moments that GPTQ needs."""

    name: ClassVar[str] = "record-moments"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.CAPTURED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    keeps_inputs: ClassVar[bool] = True

    def wants_moments(self, layer: LayerPlan) -> bool:
        return layer.kind == "linear" and layer.weight_bits is not None and layer.activation_bits is not None

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        pass


class Calibrated:
    """A transformer and what one calibration of it recorded, from which several recipes decide.

    Args:
        pipe: The pipeline that runs the transformer.
        transformer: The float transformer.
        layers: Which layers the recipes quantize.
    """

    def __init__(self, pipe: DiTPipeline, transformer: nn.Module, layers: str) -> None:
        self.pipe, self.transformer = pipe, transformer
        self.statistics = Statistics()
        # All methods need what GPTQ needs or less. Nothing is quantized here.
        recipe = Recipe(make_recipe("rtn-gptq-w8a8", layers).prepare, (RecordMoments(),))
        self._prepare = recipe.prepare
        quantize(pipe, transformer, recipe, statistics=self.statistics)

    def quantize(self, recipe: Recipe) -> tuple[nn.Module, float]:
        """The transformer quantized by a recipe, and the seconds that this took.

        A recipe that observes something else, or that runs calibration calls again, calibrates for itself.
        """
        kept = [step for step in recipe.prepare if step.name != "assign-precision"]
        alike = kept == [step for step in self._prepare if step.name != "assign-precision"]
        if not alike or any(step.wants_samples() for step in recipe.convert):
            return quantize(self.pipe, self.transformer, recipe)
        began = time.perf_counter()
        quantized = fxquant.compile(self.transformer, recipe=recipe, statistics=self.statistics, measure=0)
        return quantized, time.perf_counter() - began


def checkpoint_megabytes(model: nn.Module) -> float:
    """Size on disk of a model's saved weights, in units of 10**6 bytes.

    Of a quantized model this writes only the tensors of its checkpoint, without the check that it can be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, GraphModel):
            write_tensors(model.tensors(), Path(folder) / TENSORS_FILE)
            model.plan.save(folder)
        else:
            model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6


def judge(
    images: Tensor, reference: Tensor, labels: Tensor, real: Tensor, classifier: DigitClassifier
) -> dict[str, float]:
    """The figures of :class:`Result` that come from images."""
    return {
        "psnr_db": psnr(images, reference),
        "frechet": frechet_distance(real, images, classifier),
        "accuracy": read_accuracy(images, labels, classifier),
    }
