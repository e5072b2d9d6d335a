"""Quantizes parts of a pipeline together: one run of the pipeline calibrates all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fxquant.api import compile as compile_model
from fxquant.errors import ConfigurationError
from fxquant.pipeline.recipes import Recipe
from fxquant.runtime.model import GraphModel
from fxquant.runtime.wrappers import unwrapped


def quantize_pipeline(
    pipe: Any,
    *,
    components: Sequence[str] | Mapping[str, str | Recipe] = ("transformer",),
    calibrate: Callable[[], Any] | None = None,
    for_component: Callable[[str], Mapping[str, Any]] = lambda _: {},
    **options: Any,
) -> dict[str, GraphModel]:
    """Quantize parts of a pipeline, such as the two experts of Wan 2.2, and put the results in their places.

    The pipeline runs once for all of them, and each is calibrated on the calls that it gets: an expert on its
    timesteps, a text encoder on the prompts.

    Args:
        pipe: A ``DiffusionPipeline``. It changes only if all parts could be quantized.
        components: Names of the parts: transformers and text encoders. In a mapping, the recipe of each.
        calibrate: Runs the pipeline the way it will be used.
        for_component: Further options of :func:`fxquant.compile` for the part of a name.
        options: Options of :func:`fxquant.compile` for all parts: ``recipe``, ``backend``, ``layers``, ...

    Returns:
        The quantized parts by name.

    Raises:
        ConfigurationError: If the pipeline has no such part, a part is not a model or given twice, or it is a VAE.
        FxquantError: As :func:`fxquant.compile`; the pipeline is unchanged.
    """
    names = list(components)
    check_components(pipe, names)
    made: dict[str, GraphModel] = {}

    def quantize(number: int) -> None:
        """Quantize a part; its calibration quantizes the parts after it, the last of which runs the pipeline."""
        name, last = names[number], number == len(names) - 1
        part, run = getattr(pipe, name), calibrate if last else lambda: quantize(number + 1)
        own: dict[str, Any] = {**options, **for_component(name)}
        if isinstance(components, Mapping):
            own["recipe"] = components[name]
        own.setdefault("timestep", "timestep" if "timestep" in inspect.signature(part.forward).parameters else None)
        made[name] = compile_model(part, calibrate=run, **own)

    quantize(0)
    for name in names:
        setattr(pipe, name, made[name])
    return {name: made[name] for name in names}


def check_components(pipe: Any, names: Sequence[str]) -> None:
    """Refuse names that are not models of a pipeline.

    Raises:
        ConfigurationError: Names the models that it has.
    """
    parts = getattr(pipe, "components", {})
    models = sorted(name for name, part in parts.items() if isinstance(unwrapped(part), nn.Module))
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(f"components {', '.join(names) or 'are none'}: give each name once")
    for name in names:
        if name not in models:
            there = "is left out" if parts.get(name, name) is None else "is not there"
            raise ConfigurationError(
                f"part {name!r} of this {type(pipe).__name__} {there} or is not a model; it has {', '.join(models)}"
            )
        if hasattr(parts[name], "decode"):
            raise ConfigurationError(
                f"pipelines call the methods encode and decode of part {name!r}, and a graph has only one kind of "
                f"entry, the call of the model; leave {name} out"
            )
