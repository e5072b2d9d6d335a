"""Quantizes the object that ``from_pretrained`` of diffusers returns: at once, or at its first call."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.api import compile as compile_model
from fxquant.capture.feature_caches import Stateful, functional, is_functional, keeps_features, stateful
from fxquant.capture.hooks import drop_own_hooks, hand_on_hooks
from fxquant.capture.threads import taking_turns
from fxquant.errors import ConfigurationError
from fxquant.planning.plan import Plan
from fxquant.pretrained.config import FxQuantConfig
from fxquant.pretrained.entries import check_entries, compile_parts, mark, part_options
from fxquant.runtime.model import GraphModel
from fxquant.runtime.parts import entries_of, quantized_parts, with_modules
from fxquant.statistics.collection import Statistics
from fxquant.storage.parts import savable

_OF_DIFFUSERS = ("quantization_config", "_pre_quantization_dtype", "_name_or_path")
_LATENT_FRAMES, _FRAMES = 3, 9
"""Frames of the shortest clip whose chunks run all layers: a first, a second and a third chunk."""
Clip = Callable[..., None]
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
    _quantize_at_first_call(model, config, None)


def _quantize_at_first_call(model: nn.Module, config: FxQuantConfig, clip: Clip | None) -> None:
    """The same; ``clip`` runs the float model in place of the first call, with which it is called too."""
    model.forward = functools.partial(torch.compiler.disable(_first_call), model, config, clip)
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
        own = copy.copy(config)
        for option, value in part_options({"layers": config.layers}).items():
            setattr(own, option, value)
        own.check_complete()
        for name in entries_of(model):
            part = mark(original, name)  # The copy shares its parts with the model.
            _quantize_at_first_call(part, own, functools.partial(_clip, original, name) if _needs_clip(part) else None)
    savable(model)


def _needs_clip(part: nn.Module) -> bool:
    """Whether a part takes clips in chunks, so that its first call does not run all layers."""
    return keeps_features(part) and any(isinstance(module, nn.Conv3d) for module in part.modules())


def _clip(whole: nn.Module, name: str, part: nn.Module, first: Tensor, *_: Any, **__: Any) -> None:
    """Encode or decode a clip of three latent frames of noise with a model, in the size of the first call of a part.

    Args:
        whole: The model.
        name: The name of the part.
        part: The part in the form in which it is traced.
        first: The first chunk that the part was called with, ``(batch, channels, frames, height, width)``.
    """
    decodes = name == "decoder"
    frames, patch = (_LATENT_FRAMES, 1) if decodes else (_FRAMES, getattr(whole.config, "patch_size", None) or 1)
    channels, height, width = first.shape[1], *first.shape[-2:]
    shape = 1, channels // patch**2, frames, height * patch, width * patch
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(first)
    model: Any = with_modules(whole, {name: Stateful(part)})
    (model.decode if decodes else model.encode)(noise)


def _first_call(model: nn.Module, config: FxQuantConfig, clip: Clip | None, *args: Any, **kwargs: Any) -> Any:
    """Quantize the model, unless another thread has done so since this call began, and answer the call."""
    with taking_turns():
        if not isinstance(model, GraphModel):
            return _quantizing_call(model, config, clip, *args, **kwargs)
    return model.forward(*args, **kwargs)  # The hooks of the model run around this call already.


def _quantizing_call(model: nn.Module, config: FxQuantConfig, clip: Clip | None, *args: Any, **kwargs: Any) -> Any:
    original = functional(_float_copy(model))
    drop_own_hooks(original)  # They run around this call of the model already.
    hook = vars(model).get("_hf_hook")
    call = stateful(original) if is_functional(original) else original
    if clip is not None:
        call = functools.partial(clip, original)
    given = pytree.tree_map(lambda leaf: leaf, (args, kwargs))  # A part of a VAE writes into lists that it is given.
    with torch.no_grad():
        quantized = _quantized(original, config, lambda: call(*given[0], **given[1]))
        output = quantized(*args, **kwargs)
    hand_on_hooks(model, quantized)
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
