"""Models with several entries: their methods call several modules, and each module is a graph of its own.

A pipeline calls ``encode`` and ``decode`` of a VAE. A graph has one entry, so the VAE itself stays a model of its
class, with its methods, options and float layers, and its encoder and its decoder are quantized drop-ins. What a caller
does to the whole model reaches the parts, or is refused before anything changes.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.runtime.drop_in import Refused
from fxquant.runtime.model import GraphModel
from fxquant.runtime.wrappers import unwrapped

ENTRIES = ("encoder", "decoder")
"""Names of the modules that become graphs. ``encode`` and ``decode`` of every VAE of diffusers call these."""

_REFUSED = frozenset(
    {
        "add_adapter", "disable_gradient_checkpointing", "disable_xformers_memory_efficient_attention",
        "enable_gradient_checkpointing", "enable_group_offload", "enable_layerwise_casting", "enable_lora_hotswap",
        "enable_npu_flash_attention", "enable_parallelism", "enable_xformers_memory_efficient_attention",
        "enable_xla_flash_attention", "fuse_lora", "fuse_qkv_projections", "load_lora_adapter",
        "reset_attention_backend", "set_adapter", "set_adapters", "set_attention_backend", "set_attn_processor",
        "set_default_attn_processor", "set_use_memory_efficient_attention_xformers", "set_use_npu_flash_attention",
        "set_use_xla_flash_attention", "to_empty", "unfuse_qkv_projections",
    }
)  # fmt: skip
"""Methods that change modules, of which a graph has none. Without a refusal they would have no effect on the parts."""


def has_entries(model: Any) -> bool:
    """Whether a model has several entries, so that its parts are compiled in place of the model itself."""
    return isinstance(model, nn.Module) and callable(getattr(type(model), "decode", None)) and bool(entries_of(model))


def entries_of(model: nn.Module) -> list[str]:
    """The names of the modules that methods of a model call, in order."""
    return [name for name in ENTRIES if isinstance(model._modules.get(name), nn.Module)]


def quantized_parts(model: Any) -> dict[str, GraphModel]:
    """The quantized parts of a model with several entries by name; empty for any other object."""
    model = unwrapped(model)
    if not isinstance(model, nn.Module) or isinstance(model, GraphModel):
        return {}
    parts = [(name, model._modules[name]) for name in entries_of(model)]
    return {name: part for name, part in parts if isinstance(part, GraphModel) and part.plan is not None}


def is_savable(model: Any) -> bool:
    """Whether a model can save itself with its quantized parts, also before its first call has made them."""
    return has_entries(model) and "save_pretrained" in vars(model)


def quantized_models(parts: Mapping[str, Any]) -> dict[str, GraphModel]:
    """The quantized models among the parts of a pipeline by name; those within a VAE as ``vae.decoder``."""
    found: dict[str, GraphModel] = {}
    for name, part in parts.items():
        if isinstance(part, GraphModel):
            found[name] = part
        found |= {f"{name}.{inner}": model for inner, model in quantized_parts(part).items()}
    return found


def with_parts(model: nn.Module, parts: Mapping[str, GraphModel]) -> nn.Module:
    """Another object of the same class that shares everything with a model but the parts.

    Args:
        model: The float model. It does not change.
        parts: The quantized parts by name.
    """
    return guarded(with_modules(model, parts))


def with_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Another object of the same class that shares everything with a model but some modules, given by name."""
    made = copy.copy(model)
    for name, value in vars(made).items():
        if type(value) in (dict, OrderedDict):  # torch's tables of modules, tensors and hooks.
            vars(made)[name] = value.copy()
        else:
            vars(made)[name] = _rebound(value, model, made)
    made._modules.update(modules)
    return made


def _rebound(value: Any, model: nn.Module, made: nn.Module) -> Any:
    """An attribute of a model for its copy: methods, and the wrappers of accelerate, are bound to the copy."""
    if isinstance(value, MethodType) and value.__self__ is model:
        return MethodType(value.__func__, made)
    if isinstance(value, functools.partial) and any(given is model for given in value.args):
        bound = functools.partial(value.func, *(made if given is model else given for given in value.args))
        return functools.update_wrapper(bound, value)
    return value


def replaced_methods(model: nn.Module) -> list[str]:
    """The names of the methods of a model that were replaced on the object by functions that hold the object itself."""
    return [
        name
        for name, value in vars(model).items()
        if callable(value)
        and callable(getattr(type(model), name, None))
        and not isinstance(value, (MethodType, functools.partial, type))
    ]


def guarded(model: nn.Module) -> nn.Module:
    """Let the methods that reach all modules of a model reach its quantized parts, or refuse. Changes the model."""
    for name, method in (("_apply", _apply), ("train", _train), ("num_parameters", _num_parameters)):
        if hasattr(type(model), name):
            vars(model)[name] = functools.partial(method, model)
    for name in _REFUSED:
        if hasattr(type(model), name):
            vars(model)[name] = Refused(getattr(type(model), name), name)
    return model


def _apply(model: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Move or convert all tensors of a model, or refuse before one of them changes."""
    parts = [*quantized_parts(model).values()]
    probes = [fn(torch.empty(0, dtype=part.dtype, device=part.device)) for part in parts]
    for part, probe in zip(parts, probes, strict=True):
        part.check_to(probe.device, probe.dtype)
    changed = [(part, probe) for part, probe in zip(parts, probes, strict=True) if probe.dtype != part.dtype]
    made = [part._converted(probe.dtype, probe.device) for part, probe in changed]
    for (part, _), form in zip(changed, made, strict=True):
        part._adopt(form)
    return type(model)._apply(model, fn, recurse)


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    """Refuse training mode before a float part of the model changes."""
    for part in quantized_parts(model).values():
        part.train(mode)
    return type(model).train(model, mode)


def _num_parameters(model: Any, *args: Any, **kwargs: Any) -> int:
    """The number of parameters of the original; the parts count as they were in float."""
    originals = {name: part.architecture.skeleton for name, part in quantized_parts(model).items()}
    number: int = type(model).num_parameters(with_modules(model, originals), *args, **kwargs)
    return number
