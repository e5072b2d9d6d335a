"""Quantizes parts of a pipeline together: one run of the pipeline calibrates all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fxquant.capture.transformers_models import is_of_transformers
from fxquant.errors import ConfigurationError
from fxquant.pipeline.recipes import Recipe
from fxquant.pretrained.entries import check_entries, compilable, named_parts, optional_of, part_options
from fxquant.pretrained.together import compile_together
from fxquant.runtime.model import GraphModel
from fxquant.runtime.offloading import on_its_device
from fxquant.runtime.parts import has_entries
from fxquant.runtime.wrappers import unwrapped
from fxquant.storage.parts import made_of_parts


def compile_pipeline(
    pipe: Any,
    *,
    recipe: str | Recipe | Mapping[str, str | Recipe],
    calibrate: Callable[[], Any] | None,
    components: Sequence[str] = ("transformer", "transformer_2"),
    for_component: Callable[[str], Mapping[str, Any]] = lambda _: {},
    **options: Any,
) -> dict[str, Any]:
    """Quantize several models of a pipeline in one calibration, such as the two experts of Wan 2.2.

    Each model is calibrated on the calls that it gets: an expert on its own timesteps, a text encoder on the prompts.
    A VAE stays a model of its class, and its decoder is quantized, with its encoder if the calibration encodes
    (:func:`compile_parts`). At the end the pipeline gets all quantized models; if one fails, it keeps all of its float
    models.

    Args:
        pipe: A pipeline of diffusers, or any object with the models as attributes.
        recipe: For all models, as for :func:`fxquant.compile`; or a recipe for each by its name, which also names the
            models in place of ``components``.
        calibrate: Runs the pipeline in the way in which it will be used.
        components: Names of the models. Those that the pipeline does not have, or that are None, are left out.
        for_component: Further options of :func:`fxquant.compile` for the model of a name. For a VAE it is called for
            its parts: ``vae.decoder``.
        options: For all models, as for :func:`fxquant.compile`.

    Returns:
        The quantized models by name. One model under two names is one quantized model.

    Raises:
        ConfigurationError: If the pipeline has none of the models, a VAE cannot be quantized as it is, or an option
            belongs to one model: ``plan``, ``statistics``, ``resume``.
        FxquantError: What :func:`fxquant.compile` raises; the message begins with the name of the model.
    """
    for name in ("plan", "statistics", "resume"):
        if name in options:
            raise ConfigurationError(f"{name} belongs to one model; give it to fxquant.compile for each model")
    components = list(recipe) if isinstance(recipe, Mapping) else components
    parts: dict[str, Any] = {name: getattr(pipe, name, None) for name in components}
    parts = {name: part for name, part in parts.items() if part is not None}
    if not parts:
        raise ConfigurationError(
            f"this {type(pipe).__name__} has no {' or '.join(components)}; name its models: components=(...)"
        )
    distinct = {id(part): name for name, part in reversed(parts.items())}
    models: dict[str, Any] = {}
    optional: list[str] = []
    with contextlib.ExitStack() as stack:
        for name in (name for name in parts if distinct[id(parts[name])] == name):
            if not has_entries(parts[name]):
                models[name] = parts[name]
                continue
            stack.enter_context(on_its_device(parts[name]))
            check_entries(parts[name])
            inner = named_parts(parts[name], None)
            ready = stack.enter_context(compilable(parts[name], inner))
            models |= {f"{name}.{part}": model for part, model in ready.items()}
            optional += [f"{name}.{part}" for part in optional_of(inner)]

        def own(path: str) -> dict[str, Any]:
            name = path.partition(".")[0]
            chosen = recipe[name] if isinstance(recipe, Mapping) else recipe
            none = {"timestep": None} if is_of_transformers(type(parts[name])) else {}  # Text encoders have none.
            given = {"recipe": chosen, **none, **options, **for_component(path)}
            return part_options(given) if has_entries(parts[name]) else given

        compiled = compile_together(models, calibrate, own, optional)
    made = {name: _made(parts[name], distinct[id(parts[name])], compiled) for name in parts}
    for name, model in made.items():
        setattr(pipe, name, model)
    if getattr(pipe, "_all_hooks", None):  # It would move the float models, which its hooks hold.
        pipe.enable_model_cpu_offload(device=pipe._offload_device)
    return made


def _made(part: Any, name: str, compiled: Mapping[str, GraphModel]) -> Any:
    """The quantized model in place of a part of a pipeline."""
    if not has_entries(part):
        return compiled[name]
    inner = {path.partition(".")[2]: model for path, model in compiled.items() if path.startswith(f"{name}.")}
    return made_of_parts(part, inner)


def check_components(pipe: Any, names: Sequence[str]) -> None:
    """Refuse names that are not models of a pipeline.

    Raises:
        ConfigurationError: Names the models that it has.
    """
    parts = getattr(pipe, "components", {})
    models = sorted(name for name, part in parts.items() if isinstance(unwrapped(part), nn.Module))
    for name in names:
        if name not in models:
            there = "is left out" if parts.get(name, name) is None else "is not there"
            raise ConfigurationError(
                f"part {name!r} of this {type(pipe).__name__} {there} or is not a model; it has {', '.join(models)}"
            )
        if has_entries(parts[name]):
            check_entries(parts[name])
