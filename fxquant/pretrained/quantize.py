"""Quantizes the object that ``from_pretrained`` of diffusers returns: at once, or at its first call."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxquant.api import compile as compile_model
from fxquant.capture.feature_caches import functional, is_functional, keeps_features, stateful
from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.planning.plan import Plan
from fxquant.pretrained.config import FxQuantConfig
from fxquant.pretrained.entries import check_entries, compile_parts, mark, part_options
from fxquant.runtime.model import GraphModel
from fxquant.runtime.parts import entries_of, quantized_parts
from fxquant.statistics.collection import Statistics
from fxquant.storage.parts import savable

_OF_DIFFUSERS = ("quantization_config", "_pre_quantization_dtype", "_name_or_path")
_HOOKS = ("_hf_hook", "_old_forward", "forward")  # accelerate replaces ``forward`` and keeps the original.


def quantize_now(model: nn.Module, config: FxQuantConfig) -> None:
    """Quantize a model in place, with a plan, statistics or a calibration.

    Args:
        model: The float model; the object becomes the quantized model.
        config: What to do.

    Raises:
        FxquantError: As :func:`fxquant.compile`; the model stays float.
    """
    original = _float_copy(model)
    calibrate = None if config.calibrate is None else functools.partial(config.calibrate, original)
    _quantized(original, config, calibrate).take_place_of(model)


def quantize_at_first_call(model: nn.Module, config: FxQuantConfig) -> None:
    """Quantize a model in place when it is first called; this call already has the output of the quantized model.

    ``torch.compile`` does not trace this call.
    """
    model.forward = functools.partial(torch.compiler.disable(_first_call), model, config)
    functools.update_wrapper(model.forward, type(model).forward)


def quantize_parts(model: nn.Module, config: FxQuantConfig) -> None:
    """Quantize the parts of a model with several entries, such as a VAE, in place.

    With a calibration this is done at once. Otherwise each part is quantized when it is first called: a decoder by the
    first image, an encoder only if something is encoded.

    Args:
        model: The float model.
        config: What to do.

    Raises:
        ConfigurationError: If the config holds a plan or statistics, which belong to one part.
        CalibrationError: If the recipe needs a calibration, or the first call does not run all layers.
        FxquantError: As :func:`fxquant.compile_parts`; the model stays float.
    """
    if config.plan is not None or config.statistics is not None:
        raise ConfigurationError(
            f"a plan and statistics belong to one graph, and each part of a {type(model).__name__} is one; give "
            "FxQuantConfig a recipe, with calibrate= if it needs a calibration"
        )
    original = _float_copy(model)
    if config.calibrate is not None:
        assert config.recipe is not None
        made = compile_parts(
            original,
            recipe=config.recipe,
            backend=config.backend,
            calibrate=functools.partial(config.calibrate, original),
            layers=config.layers,
            measure=config.measure,
        )
        model._modules.update(quantized_parts(made))
    else:
        check_entries(original)
        _refuse_chunks(original)
        own = copy.copy(config)
        for option, value in part_options({"layers": config.layers}).items():
            setattr(own, option, value)
        own.check_complete()
        for name in entries_of(model):
            mark(original, name)  # The copy shares its parts with the model.
            quantize_at_first_call(getattr(model, name), own)
    savable(model)


def _refuse_chunks(model: nn.Module) -> None:
    """Refuse a model that takes clips in chunks: the first chunk does not run all layers."""
    name = next((name for name in entries_of(model) if keeps_features(getattr(model, name))), None)
    if name is not None:
        raise CalibrationError(
            f"the {name} of a {type(model).__name__} takes a clip in chunks, and its first call does not run all "
            "layers. Give FxQuantConfig(calibrate=function), a function that gets the model and decodes a clip with "
            "it; or load the pipeline in float and call fxquant.compile_pipeline"
        )


def _first_call(model: nn.Module, config: FxQuantConfig, *args: Any, **kwargs: Any) -> Any:
    original = functional(_float_copy(model))
    hook = vars(model).get("_hf_hook")
    call = stateful(original) if is_functional(original) else original
    given = pytree.tree_map(lambda leaf: leaf, (args, kwargs))  # A part of a VAE writes into lists that it is given.
    with torch.no_grad():
        quantized = _quantized(original, config, lambda: call(*given[0], **given[1]))
        output = quantized(*args, **kwargs)
    quantized.take_place_of(model)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(model, hook)
    return output


def _quantized(original: nn.Module, config: FxQuantConfig, calibrate: Any) -> GraphModel:
    if config.plan is not None:
        plan = Plan.load(config.plan) if isinstance(config.plan, (str, Path)) else config.plan
        return compile_model(original, plan=plan, backend=config.backend, statistics=_statistics(config.statistics))
    return compile_model(
        original,
        recipe=config.recipe,
        backend=config.backend,
        calibrate=calibrate,
        layers=config.layers,
        timestep=config.timestep,
        measure=config.measure,
        statistics=_statistics(config.statistics),
    )


def _statistics(given: Statistics | str | Path | None) -> Statistics | None:
    return Statistics.load(given) if isinstance(given, (str, Path)) else given


def _float_copy(model: nn.Module) -> nn.Module:
    """The float model as another object over the same weights, without what diffusers and accelerate attached to it."""
    made = copy.copy(model)
    for name in (*_HOOKS, "hf_quantizer", "is_quantized", "quantization_method"):
        vars(made).pop(name, None)
    config = getattr(model, "_internal_dict", None)
    if config is not None:
        kept = {name: value for name, value in config.items() if name not in _OF_DIFFUSERS}
        object.__setattr__(made, "_internal_dict", type(config)(kept))
    return made.eval()
