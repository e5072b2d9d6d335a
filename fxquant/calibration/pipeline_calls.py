"""Runs a diffusers pipeline, for calibration or to make images."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.utils.pil_utils import numpy_to_pil
from torch import Tensor, nn

from fxquant.calibration.attributes import instance_attribute
from fxquant.calibration.noise import Draws, without_models
from fxquant.errors import CalibrationError, ConfigurationError, EvaluationError

STEPS = 25
"""Denoising steps of a calibration, as in PTQ4DiT (arXiv 2405.16005)."""

SAMPLES = 32
"""Samples of a calibration, as in PTQ4DiT; with guidance, this many with the condition and this many without it."""

SAMPLES_AT_ONCE = 8
"""Samples that go through the pipeline at once."""


def calibration_call(
    pipe: Any,
    samples: int = SAMPLES,
    steps: int = STEPS,
    seed: int = 0,
    guidance: float | None = None,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    sizes: Mapping[str, int] | None = None,
    decode: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Callable[[], None]:
    """A function that runs the pipeline the way it is used, to pass as ``calibrate=`` to :func:`fxquant.compile`.

    Every call of this function is the same, because the noise comes from ``seed``.

    Args:
        pipe: A pipeline that takes class labels, such as ``DiTPipeline``, or prompts.
        samples: Number of samples; with guidance each goes through the model with and without its condition.
        steps: Denoising steps per sample.
        seed: Seed of the initial noise.
        guidance: Guidance scale; the default of the pipeline if None.
        prompts: Prompts for text pipelines; repeated if there are fewer than ``samples``.
        labels: Class labels; all classes that the model knows, evenly, if None.
        sizes: ``height``, ``width`` and ``num_frames`` of the output; those of the pipeline for names that are left
            out.
        decode: Whether latents are decoded to pixels, which only the calibration of a VAE needs.
        share: Rank and number of the processes that share the batches. Each batch has the noise that it has in one
            process. For a rank that does not begin with the first batch, the pipeline runs once with zeros in place of
            the outputs of its transformers, to learn what noise the batches before draw.

    Raises:
        ConfigurationError: If the pipeline needs prompts and there are none, or needs arguments that this function
            cannot give, or has no such size; or if there are fewer batches than processes.
        CalibrationError: If the pipeline fails, or the noise cannot be shared, because it depends on outputs of the
            model.
    """
    _check_seed(seed)
    conditions = _conditions(pipe, samples, prompts, labels)
    call = _bound_call(pipe, conditions, steps, guidance, sizes)

    output = "pt" if decode else "latent"
    batches = _share(samples, *share)
    with contextlib.nullcontext() if decode else _without_decoder(pipe):
        first = _draws_of_first(pipe, call, seed, output) if batches.start else None

    def calibrate() -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(batches.start):
            assert first is not None
            first.repeat(generator)
        with contextlib.nullcontext() if decode else _without_decoder(pipe):
            for number in batches:
                before = generator.get_state()
                call(number, generator, output)
                if first is not None and (number + 1) * SAMPLES_AT_ONCE <= samples:
                    _check_draws(first, before, generator, pipe)

    return calibrate


def _share(samples: int, rank: int, size: int) -> range:
    """The batches that a rank runs."""
    count = num_batches(samples)
    if count < size:
        raise ConfigurationError(
            f"{samples} samples are {count} {'batch' if count == 1 else 'batches'} of {SAMPLES_AT_ONCE}, too few for "
            f"{size} processes; give at least {SAMPLES_AT_ONCE * (size - 1) + 1} samples, or start fewer processes"
        )
    return range(count * rank // size, count * (rank + 1) // size)


def _draws_of_first(pipe: Any, call: Callable[[int, torch.Generator, str], Any], seed: int, output: str) -> Draws:
    """What the first batch draws from the generator, found without running the model on it."""
    generator = torch.Generator().manual_seed(seed)
    parts = {name: part for name, part in pipe.components.items() if name.startswith("transformer")}
    models = {id(part): part for part in parts.values() if isinstance(part, nn.Module)}
    try:
        with without_models(list(models.values())), Draws(generator) as draws:
            call(0, generator, output)
    except Exception as error:
        raise CalibrationError(f"{type(pipe).__name__} raised {type(error).__name__}: {error}") from error
    return draws


def _check_draws(first: Draws, before: Tensor, generator: torch.Generator, pipe: Any) -> None:
    """Check that a whole batch drew what the first did.

    Args:
        first: What the first batch drew.
        before: State of the generator before the batch.
        generator: The generator after the batch.
        pipe: The pipeline.

    Raises:
        CalibrationError: If it drew something else.
    """
    twin = torch.Generator().set_state(before)
    first.repeat(twin)
    if not torch.equal(twin.get_state(), generator.get_state()):
        raise CalibrationError(
            f"the noise that {type(pipe).__name__} draws depends on what its models return, so several processes "
            "cannot draw that of one; calibrate in one process"
        )


def generate(
    pipe: Any,
    *,
    steps: int = STEPS,
    seed: int = 0,
    guidance: float | None = None,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    sizes: Mapping[str, int] | None = None,
    at_once: int = SAMPLES_AT_ONCE,
) -> list[Any]:
    """Make an image or a clip for each label or prompt.

    Args:
        pipe: A pipeline that takes class labels, such as ``DiTPipeline``, or prompts.
        steps: Denoising steps per image.
        seed: Seed of the initial noise.
        guidance: Guidance scale; the default of the pipeline if None.
        prompts: One prompt per image, for text pipelines.
        labels: One class label per image, for other pipelines.
        sizes: ``height``, ``width`` and ``num_frames`` of the output.
        at_once: Images that go through the pipeline at once; the noise depends on it.

    Returns:
        PIL images, or a list of PIL images for each clip. The same seed, labels and steps give the same initial noise
        for every model.

    Raises:
        ConfigurationError: If neither labels nor prompts fit the pipeline, a label is out of range, the pipeline has no
            such size, or it makes neither images nor clips.
        EvaluationError: If what it makes holds NaN or infinity.
    """
    given = prompts if prompts is not None else labels
    if not given:
        raise ConfigurationError("nothing to generate: give labels or prompts")
    _check_seed(seed)
    call = _bound_call(pipe, _conditions(pipe, len(given), prompts, labels), steps, guidance, sizes, at_once)
    images: list[Any] = []
    generator = torch.Generator().manual_seed(seed)
    for number in range(num_batches(len(given), at_once)):
        output = call(number, generator, "np")
        found = getattr(output, "images", getattr(output, "frames", None))
        if found is None:
            raise ConfigurationError(f"{type(pipe).__name__} makes no images; call the pipeline itself")
        images += [_picture(pipe, one) for one in found]
    return images


def _picture(pipe: Any, made: Any) -> Any:
    """A PIL image, or a list of them for a clip, of an array in [0, 1]; other things as they are.

    Raises:
        EvaluationError: If the array holds NaN or infinity, which an image would show as black.
    """
    if not isinstance(made, np.ndarray):
        return made
    if not np.isfinite(made).all():
        raise EvaluationError(
            f"{type(pipe).__name__} made images of NaN or infinity; look at their weights and dtype: "
            "some VAEs overflow in float16, and not in bfloat16 or float32"
        )
    found = numpy_to_pil(made)
    return found if made.ndim == 4 else found[0]


def _check_seed(seed: int) -> None:
    if not -(2**63) <= seed < 2**64:
        raise ConfigurationError(f"seed {seed} does not fit 64 bits; give a smaller one")


def num_batches(samples: int, at_once: int = SAMPLES_AT_ONCE) -> int:
    """How many times :func:`calibration_call` and :func:`generate` run the pipeline for this many samples."""
    return -(-samples // at_once)


@contextmanager
def steps_watched(pipe: Any, tick: Callable[[], None]) -> Iterator[None]:
    """Call ``tick`` after every step of the pipeline's scheduler."""
    scheduler = pipe.scheduler
    step = scheduler.step

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        tick()
        return result

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step


def _signature(pipe: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(pipe).__call__).parameters)


def _conditions(
    pipe: Any, samples: int, prompts: Sequence[str] | None, labels: Sequence[int] | None
) -> tuple[str, list[Any]]:
    """Name of the argument that says what to draw, and its values, one per sample."""
    if samples < 1:
        raise ConfigurationError(f"{samples} samples are too few; at least one is needed")
    names = _signature(pipe)
    kind = type(pipe).__name__
    if "class_labels" in names:
        if prompts is not None:
            raise ConfigurationError(f"{kind} takes class labels, not prompts")
        return "class_labels", _labels(pipe, samples, labels)
    if "prompt" in names:
        if labels is not None:
            raise ConfigurationError(f"{kind} takes prompts, not class labels")
        if not prompts:
            raise ConfigurationError(
                f"{kind} draws what a prompt says, but there are no prompts; give prompts like those in use "
                "(prompts=[...], or --prompts on the command line)"
            )
        return "prompt", [prompts[i % len(prompts)] for i in range(samples)]
    raise ConfigurationError(
        f"{kind} takes neither class labels nor prompts; write the calibration yourself and pass it to "
        "fxquant.compile: calibrate=lambda: pipe(...)"
    )


def _labels(pipe: Any, samples: int, labels: Sequence[int] | None) -> list[int]:
    count = _num_classes(pipe)
    if labels is not None:
        for label in labels:
            if count is not None and not 0 <= label < count:
                raise ConfigurationError(f"label {label} is out of range; the model knows classes 0 to {count - 1}")
        return [labels[i % len(labels)] for i in range(samples)]
    known = classes_of(pipe)
    if samples < len(known):
        return [known[i * len(known) // samples] for i in range(samples)]
    return [known[i % len(known)] for i in range(samples)]


def _num_classes(pipe: Any) -> int | None:
    count = getattr(pipe.transformer.config, "num_embeds_ada_norm", None)
    return count if isinstance(count, int) else None


def classes_of(pipe: Any) -> list[int]:
    """The class labels that a pipeline knows: those that it has names for, else all that its transformer has."""
    return sorted(set(getattr(pipe, "labels", {}).values())) or list(range(_num_classes(pipe) or 1000))


def takes_prompts(pipe: Any) -> bool:
    """Whether a pipeline draws what a prompt says, and not a class."""
    names = _signature(pipe)
    return "prompt" in names and "class_labels" not in names


def _bound_call(
    pipe: Any,
    conditions: tuple[str, list[Any]],
    steps: int,
    guidance: float | None,
    sizes: Mapping[str, int] | None = None,
    at_once: int = SAMPLES_AT_ONCE,
) -> Callable[[int, torch.Generator, str], Any]:
    """Set all arguments but the generator and the output type. The result runs one batch of the pipeline."""
    if steps < 1:
        raise ConfigurationError(f"{steps} steps are too few; at least one is needed")
    names = _signature(pipe)
    condition, values = conditions
    arguments: dict[str, Any] = {"num_inference_steps": steps}
    if guidance is not None:
        if "guidance_scale" not in names:
            raise ConfigurationError(f"{type(pipe).__name__} has no guidance scale")
        if not math.isfinite(guidance):
            raise ConfigurationError(f"guidance {guidance} is not a finite number; give one such as 4")
        arguments["guidance_scale"] = guidance
    for name, size in (sizes or {}).items():
        if name not in names:
            raise ConfigurationError(f"{type(pipe).__name__} has no option {name}: its output has one size")
        arguments[name] = size
    given = {"self", condition, "generator", "output_type", *arguments}
    missing = [
        name
        for name, parameter in names.items()
        if name not in given
        and parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if missing:
        raise ConfigurationError(
            f"{type(pipe).__name__} also needs {', '.join(missing)}; write the calibration yourself and pass it to "
            "fxquant.compile: calibrate=lambda: pipe(...)"
        )

    def run(batch: int, generator: torch.Generator, output_type: str) -> Any:
        kwargs = dict(arguments)
        if "output_type" in names and (output_type != "latent" or _offers_latents(pipe)):
            kwargs["output_type"] = output_type
        elif "output_type" in names:
            kwargs["output_type"] = "pt"
        start = batch * at_once
        return pipe(**{condition: values[start : start + at_once]}, generator=generator, **kwargs)

    return run


def _offers_latents(pipe: Any) -> bool:
    """Whether the pipeline can stop before it decodes. Only its source code shows this."""
    try:
        return '"latent"' in inspect.getsource(inspect.unwrap(type(pipe).__call__))
    except (OSError, TypeError):
        return False


@contextmanager
def _without_decoder(pipe: Any) -> Iterator[None]:
    """Within this context, a pipeline that always decodes, such as ``DiTPipeline``, decodes nothing."""
    vae = getattr(pipe, "vae", None)
    if vae is None or _offers_latents(pipe):
        yield
        return

    def decode(latents: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        return SimpleNamespace(sample=latents) if return_dict else (latents,)

    with instance_attribute(vae, "decode", decode):
        yield
