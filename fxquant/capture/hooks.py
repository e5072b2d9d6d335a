"""Refuses models with hooks of diffusers or accelerate that a graph cannot record.

Such hooks run around the code of a module. Hooks that move weights, cast them or reuse what earlier calls computed are
not part of the model. A graph that recorded them would be right for one call only.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn

from fxquant.errors import ConfigurationError

_DIFFUSERS = (
    (
        ("layerwise_casting", "peft_autocast"),
        "stores the weights in a smaller dtype than the model computes in",
        "load the model again, in the dtype that it computes in, without enable_layerwise_casting()",
    ),
    (
        ("group_offloading", "layer_execution_tracker"),
        "keeps the weights elsewhere between calls",
        "load the model again, without group offloading",
    ),
    (
        ("cp_", "context_parallel", "tensor_parallel"),
        "splits the model between devices",
        "load the model again, without enable_parallelism() (fxquant.parallelize divides a quantized model)",
    ),
    (
        ("cache", "fbc_", "pyramid_attention"),
        "reuses what earlier steps computed, so that calls differ from each other",
        "call disable_cache() on the model, or load it again without this cache",
    ),
)
_OTHER = ("changes what the module computes", "load the model again without it")


_OF_TORCH = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


def drop_own_hooks(model: nn.Module) -> None:
    """Drop torch's hooks of a copy of a model itself, not those of its modules.

    They run around the whole call, whatever computes it: the model, the graph that observes it, or the quantized model.
    A graph that held their effect would apply them twice. Hooks of its modules are part of what it computes.
    """
    for name in _OF_TORCH:
        setattr(model, name, OrderedDict())


def hand_on_hooks(model: nn.Module, other: nn.Module) -> None:
    """Let torch's hooks of a model run around the calls of another one too. Removing a hook removes it from both."""
    for name in _OF_TORCH:
        vars(other)[name] = vars(model)[name]


def copy_hooks(model: nn.Module, other: nn.Module, memo: dict[int, Any]) -> None:
    """Give a deep copy of a model its own hooks of torch, as :func:`copy.deepcopy` of a float model does."""
    memo[id(model)] = other
    for name in _OF_TORCH:
        vars(other)[name] = copy.deepcopy(vars(model)[name], memo)


def refuse_hooks(model: nn.Module) -> None:
    """Raise if a hook of diffusers or accelerate moves or casts the weights of a model, or keeps state for it.

    Raises:
        ConfigurationError: Names the module and the hook, and says how to remove it.
    """
    for path, module in model.named_modules():
        where = f"module {path!r}" if path else f"this {type(model).__name__}"
        for name, hook in getattr(vars(module).get("_diffusers_hook"), "hooks", {}).items():
            does, remedy = next(
                ((does, remedy) for words, does, remedy in _DIFFUSERS if any(word in name for word in words)), _OTHER
            )
            raise ConfigurationError(
                f"{where} has the hook {name!r} of diffusers ({type(hook).__name__}), which {does}; {remedy}, then "
                "give it to fxquant"
            )
        for hook in _parts(vars(module).get("_hf_hook")):
            if getattr(hook, "offload", False):
                raise ConfigurationError(
                    f"{where} is offloaded by accelerate ({type(hook).__name__}): its weights are elsewhere between "
                    "calls, as after pipe.enable_sequential_cpu_offload() or with a device_map that does not fit. Call "
                    "pipe.remove_all_hooks(), or load the model without offloading, then give it to fxquant"
                )
            if type(hook).__name__ == "CpuOffload":
                raise ConfigurationError(
                    f"{where} is moved between devices by accelerate (CpuOffload), as after "
                    "pipe.enable_model_cpu_offload(). Call pipe.remove_all_hooks() and move the pipeline to its "
                    "device, then give the model to fxquant; offloading can be enabled again afterwards"
                )


def _parts(hook: Any) -> Iterator[Any]:
    if hook is None:
        return
    for part in getattr(hook, "hooks", ()):  # The parts of a SequentialHook.
        yield from _parts(part)
    yield hook
