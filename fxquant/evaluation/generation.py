"""Makes the images of an evaluation: numbered batches, each of which depends only on the seed and its number."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fxquant.calibration import pipeline_calls
from fxquant.errors import ConfigurationError, EvaluationError, FxquantError
from fxquant.evaluation.keys import digest_of_state
from fxquant.evaluation.store import Store
from fxquant.runtime.parts import quantized_models
from fxquant.storage.aot.model import PackagedModel

Labels = Literal["balanced", "uniform"]
_STRIDE = 0.618  # Of the number of classes: consecutive labels are far apart, and any few images hold classes evenly.


@dataclass(frozen=True)
class Sampling:
    """How images are made.

    Attributes:
        batch: Images per batch, which go through the pipeline at once.
        steps: Denoising steps per image.
        seed: Seed of all noise.
        guidance: Guidance scale; the pipeline's own if None.
        labels: ``balanced``: every class equally often. ``uniform``: drawn with equal chances. Or labels to repeat.
        prompts: Prompts to repeat, for text pipelines.
        sizes: ``height``, ``width`` and ``num_frames``.
    """

    batch: int = 32
    steps: int = 25
    seed: int = 0
    guidance: float | None = None
    labels: Labels | tuple[int, ...] = "balanced"
    prompts: tuple[str, ...] | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    def check(self, pipe: Any) -> None:
        """Refuse what does not fit the pipeline, before anything is computed.

        Raises:
            ConfigurationError: Says which option, and what to give instead.
        """
        if self.batch < 1 or self.steps < 1:
            raise ConfigurationError(f"batch {self.batch} and steps {self.steps} should be at least 1")
        if isinstance(self.labels, str) and self.labels not in ("balanced", "uniform"):
            raise ConfigurationError(f"labels {self.labels!r} should be 'balanced', 'uniform' or a list of classes")
        if not self.labels:
            raise ConfigurationError("labels are empty; give 'balanced', 'uniform' or a list of classes")
        if pipeline_calls.takes_prompts(pipe):
            if not self.prompts:
                raise ConfigurationError(
                    f"{type(pipe).__name__} draws what a prompt says; give prompts=[...], or --prompts FILE"
                )
            if self.labels != "balanced":
                raise ConfigurationError(f"{type(pipe).__name__} takes prompts, not class labels")
        elif self.prompts is not None:
            raise ConfigurationError(f"{type(pipe).__name__} takes class labels, not prompts")

    def settings(self, pipe: Any) -> dict[str, Any]:
        """What the images depend on, for ``settings.json``; the number of images is not among it."""
        return {
            "model": identity(pipe),
            "batch": self.batch,
            "steps": self.steps,
            "seed": self.seed,
            "guidance": self.guidance,
            "labels": self.labels if isinstance(self.labels, str) else list(self.labels),
            "classes": self.classes(pipe),
            "prompts": None if self.prompts is None else list(self.prompts),
            "sizes": dict(self.sizes),
        }

    def classes(self, pipe: Any) -> str | None:
        """The classes that labels are chosen from, such as ``0 to 999``; None if labels are given, or prompts."""
        if self.prompts is not None or not isinstance(self.labels, str):
            return None
        known = pipeline_calls.classes_of(pipe)
        whole = f"{known[0]} to {known[-1]}"
        return whole if known == list(range(known[0], known[-1] + 1)) else f"{len(known)} of {whole}"

    def prompts_of(self, number: int) -> list[str] | None:
        """The prompts of a batch, or None without any."""
        if self.prompts is None:
            return None
        return [self.prompts[i % len(self.prompts)] for i in range(number * self.batch, (number + 1) * self.batch)]

    def labels_of(self, number: int, classes: Sequence[int]) -> list[int]:
        """The class labels of a batch of a pipeline that knows these classes."""
        places = range(number * self.batch, (number + 1) * self.batch)
        if self.labels == "uniform":
            drawn = np.random.default_rng(_entropy(self.seed, number, 1)).integers(len(classes), size=self.batch)
            return [classes[i] for i in drawn]
        if self.labels == "balanced":
            stride = max(1, round(_STRIDE * len(classes)))
            while math.gcd(stride, len(classes)) > 1:
                stride += 1
            return [classes[i * stride % len(classes)] for i in places]
        return [int(self.labels[i % len(self.labels)]) for i in places]

    def batch_of(self, pipe: Any, number: int) -> Tensor:
        """Make one batch, uint8 ``[n, 3, H, W]``; of clips, all frames one after the other.

        Schedulers that draw noise at each step draw it from torch's own generators, so these start from the number of
        the batch too; afterwards they are as before.
        """
        given = self.prompts_of(number)
        labels = None if given is not None else self.labels_of(number, pipeline_calls.classes_of(pipe))
        seed = int(_entropy(self.seed, number).generate_state(1, np.uint64)[0])
        with torch.random.fork_rng(), _blaming(pipe, number):
            torch.manual_seed(seed)
            made = pipeline_calls.generate(
                pipe,
                steps=self.steps,
                seed=seed,
                guidance=self.guidance,
                prompts=given,
                labels=labels,
                sizes=self.sizes,
                at_once=self.batch,
            )
        frames = [frame for one in made for frame in (one if isinstance(one, list) else [one])]
        return torch.stack([_pixels(frame) for frame in frames])


@contextmanager
def _blaming(pipe: Any, number: int) -> Iterator[None]:
    """Say which pipeline failed, and in which batch."""
    try:
        yield
    except FxquantError:
        raise
    except Exception as error:  # Pipelines raise anything.
        raise EvaluationError(
            f"{type(pipe).__name__} failed while it made batch {number}: {type(error).__name__}: {error}"
        ) from error


def _entropy(seed: int, *path: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed % 2**64, spawn_key=path)


def _pixels(image: Any) -> Tensor:
    array = np.asarray(image.convert("RGB")) if hasattr(image, "convert") else None
    if array is None:
        raise EvaluationError(f"the pipeline made a {type(image).__name__} where an image was expected")
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()


def make_images(
    pipe: Any,
    sampling: Sampling,
    store: Store,
    batches: int,
    shard: tuple[int, int] = (0, 1),
    tick: Callable[[int], None] = lambda done: None,
) -> int:
    """Make the batches that are missing in a folder.

    Args:
        pipe: The pipeline.
        sampling: How images are made.
        store: Where they are kept.
        batches: Number of batches in all.
        shard: ``(i, n)`` for the batches whose number is ``i`` modulo ``n``.
        tick: Called with the number of finished batches after each.

    Returns:
        How many batches were made now.
    """
    made = 0
    numbers = range(shard[0], batches, shard[1])
    for done, number in enumerate(numbers):
        if not store.has(number):
            store.write(number, sampling.batch_of(pipe, number))
            made += 1
        tick(done + 1)
    return made


def is_quantized(pipe: Any) -> bool:
    """Whether a part of a pipeline was quantized by fxquant."""
    parts = getattr(pipe, "components", {})
    return bool(quantized_models(parts)) or any(isinstance(part, PackagedModel) for part in parts.values())


def identity(pipe: Any) -> str:
    """A digest of what determines a pipeline's images: weights, plans, backends, and the configs of all parts."""
    found = hashlib.sha256(type(pipe).__qualname__.encode())
    parts = getattr(pipe, "components", {})
    for name, part in sorted(parts.items()):
        found.update(f"{name} {type(part).__qualname__}".encode())
        config = getattr(part, "config", None)
        if isinstance(config, Mapping):
            plain = {key: value for key, value in config.items() if not str(key).startswith("_")}
            found.update(json.dumps(plain, sort_keys=True, default=str).encode())
        if isinstance(part, PackagedModel):  # It does not hand out its tensors, but it knows their digests.
            found.update(json.dumps(part.info, sort_keys=True, default=str).encode())
        elif isinstance(part, nn.Module):
            found.update(digest_of_state(part).encode())
    for path, model in sorted(quantized_models(parts).items()):
        found.update(
            f"{path} {model.backend and model.backend.name} {model.plan and model.plan.fingerprint()}".encode()
        )
    return found.hexdigest()
