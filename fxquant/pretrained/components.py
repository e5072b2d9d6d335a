"""Quantizes parts of a pipeline together: one run of the pipeline calibrates all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fxquant.api import compile as compile_model
from fxquant.capture.transformers_models import is_of_transformers
from fxquant.errors import ConfigurationError, FxquantError
from fxquant.pipeline.recipes import Recipe
from fxquant.runtime.model import GraphModel
from fxquant.runtime.wrappers import unwrapped


def compile_pipeline(
    pipe: Any,
    *,
    recipe: str | Recipe | Mapping[str, str | Recipe],
    calibrate: Callable[[], Any] | None,
    components: Sequence[str] = ("transformer", "transformer_2"),
    for_component: Callable[[str], Mapping[str, Any]] = lambda _: {},
    **options: Any,
) -> dict[str, GraphModel]:
    """Quantize several models of a pipeline in one calibration, such as the two experts of Wan 2.2.

    Each model is calibrated on the calls that it gets: an expert on its own timesteps, a text encoder on the prompts.
    At the end the pipeline gets all quantized models; if one fails, it keeps all of its float models.

    Args:
        pipe: A pipeline of diffusers, or any object with the models as attributes.
        recipe: For all models, as for :func:`fxquant.compile`; or a recipe for each by its name, which also names the
            models in place of ``components``.
        calibrate: Runs the pipeline in the way in which it will be used.
        components: Names of the models. Those that the pipeline does not have, or that are None, are left out.
        for_component: Further options of :func:`fxquant.compile` for the model of a name.
        options: For all models, as for :func:`fxquant.compile`.

    Returns:
        The quantized models by name. One model under two names is one quantized model.

    Raises:
        ConfigurationError: If the pipeline has none of the models, one of them is a VAE, or an option belongs to one
            model: ``plan``, ``statistics``, ``resume``.
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
    for name, part in parts.items():
        _refuse_decoder(name, part)
    distinct = {id(part): name for name, part in reversed(parts.items())}
    made: dict[str, GraphModel] = {}

    def own(name: str) -> dict[str, Any]:
        chosen = recipe[name] if isinstance(recipe, Mapping) else recipe
        none = {"timestep": None} if is_of_transformers(type(parts[name])) else {}  # Text encoders have none.
        return {"recipe": chosen, **none, **options, **for_component(name)}

    def run(names: Sequence[str]) -> None:
        first, *rest = names
        inner = (lambda: run(rest)) if rest else calibrate
        try:  # The calls of the first model are recorded while the others are calibrated.
            made[first] = compile_model(parts[first], calibrate=inner, **own(first))
        except FxquantError as error:
            if error.component is None and len(parts) > 1:
                error.component = first
                error.args = (f"{first}: {error}", *error.args[1:])
            raise

    run([name for name in parts if distinct[id(parts[name])] == name])
    made = {name: made[distinct[id(part)]] for name, part in parts.items()}
    for name, model in made.items():
        setattr(pipe, name, model)
    if getattr(pipe, "_all_hooks", None):  # It would move the float models, which its hooks hold.
        pipe.enable_model_cpu_offload(device=pipe._offload_device)
    return made


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
        _refuse_decoder(name, parts[name])


def _refuse_decoder(name: str, part: Any) -> None:
    if callable(getattr(part, "decode", None)):
        raise ConfigurationError(
            f"pipelines call the methods encode and decode of part {name!r}, and a graph has only one entry, the call "
            f"of the model; leave {name} out"
        )
