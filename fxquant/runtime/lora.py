"""How a quantized model hands the methods for LoRAs on to its adapters, which are made when the first is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fxquant.adapters.adapters import Adapters
from fxquant.adapters.checking import FUSE
from fxquant.adapters.stand_in import tensors_of
from fxquant.errors import AdapterError
from fxquant.ir.histories import history_of

if TYPE_CHECKING:
    from fxquant.capture.calls import Call
    from fxquant.runtime.model import GraphModel

_HELD = "_adapters"
NORMS = "_transformer_norm_layers"
"""Where pipelines of FLUX keep the norms that a Control-LoRA replaced."""
METHODS = frozenset(
    {
        "active_adapters", "add_adapter", "delete_adapters", "disable_adapters", "disable_lora", "enable_adapters",
        "enable_lora", "enable_lora_hotswap", "fuse_lora", "load_lora_adapter", "save_lora_adapter", "set_adapter",
        "set_adapters", "unfuse_lora", "unload_lora",
    }
)  # fmt: skip
"""The methods of ``diffusers.loaders.PeftAdapterMixin``; a model that was quantized answers each."""
_OPTIONS = ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs")
"""Arguments of models of diffusers that may hold ``scale``, a number that multiplies all LoRAs in one call."""

_FACTS = frozenset({"peft_config", "_hf_peft_config_loaded"})


def is_of_lora(model: GraphModel, name: str) -> bool:
    """Whether an attribute is one that the adapters of a model answer; a model that was only traced has none."""
    return (name in METHODS or name in _FACTS) and model.plan is not None


def lora_attribute(model: GraphModel, name: str) -> Any:
    """A method or fact about the adapters of a model.

    Raises:
        AttributeError: For ``peft_config``, if no adapter is loaded.
        MissingPackageError: If diffusers or peft is not installed.
    """
    found = adapters_of(model)
    if name in _FACTS:
        if name == "_hf_peft_config_loaded":
            return found is not None and found.branching is not None
        if found is None:
            raise AttributeError(name)
        return found.peft_config
    return getattr(made_adapters(model), name)


def made_adapters(model: GraphModel) -> Adapters:
    """The adapters of a model, made now if there are none yet.

    Raises:
        MissingPackageError: If diffusers or peft is not installed.
    """
    found = adapters_of(model)
    if found is None:
        found = model.__dict__[_HELD] = Adapters(model)
    return found


def adapters_of(model: GraphModel) -> Adapters | None:
    """The adapters of a model, or None if no method for LoRAs was used."""
    found: Adapters | None = model.__dict__.get(_HELD)
    return found


def lora_tensors(model: GraphModel) -> dict[str, Tensor]:
    """The tensors of the LoRAs of a model, by the names of peft."""
    found = adapters_of(model)
    return {} if found is None else tensors_of(found.stand_in)


def refuse_loaded(model: GraphModel, target: str) -> None:
    """Refuse a model with LoRAs where only the model itself can be kept.

    Args:
        model: The model.
        target: What would be made of it, for the message.

    Raises:
        AdapterError: Names the adapters, and says what to do.
    """
    found = adapters_of(model)
    if found is not None and found.branching is not None:
        names = ", ".join(map(repr, found.peft_config))
        raise AdapterError(
            f"{target} cannot hold the adapters {names} of this model; call model.unload_lora() first, or fuse the "
            "LoRAs into the float model (pipe.fuse_lora(), then pipe.unload_lora_weights()) and compile the result"
        )


def copy_adapters(model: GraphModel, clone: GraphModel) -> None:
    """Give a copy of a model the same adapters."""
    found = adapters_of(model)
    if found is not None:
        clone.__dict__[_HELD] = found.for_copy(clone)


def with_scale(
    model: GraphModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, Mapping[str, Any], float | None]:
    """Take the scale of LoRAs from a call, ``joint_attention_kwargs={"scale": 0.5}``.

    Returns:
        The arguments without the scale, and the scale; None without active LoRAs. Then the scale has no meaning and
        stays in the call only where a graph was captured for it.

    Raises:
        AdapterError: If LoRAs are active and the scale is not a finite number.
    """
    found = adapters_of(model)
    active = found is not None and found.serving is not None
    given_options = (*args, *(kwargs.get(name) for name in _OPTIONS))
    if not any(isinstance(options, Mapping) and "scale" in options for options in given_options):
        return args, kwargs, 1.0 if active else None
    if not active and (not _scales_loras(model) or model.find(model.architecture.canonical(args, kwargs)) is not None):
        return args, kwargs, None
    given = model.architecture.signature.bind_partial(*args, **kwargs)
    strength = 1.0
    for name in _OPTIONS:
        options = given.arguments.get(name)
        if isinstance(options, Mapping) and "scale" in options:
            strength *= _number(name, options["scale"]) if active else 1.0
            given.arguments[name] = {key: value for key, value in options.items() if key != "scale"}
            if not given.arguments[name] and model.find(model.architecture.canonical(given.args, given.kwargs)) is None:
                given.arguments[name] = None  # Pipelines give either for no options, and each is another kind of call.
    return given.args, given.kwargs, strength if active else None


def _scales_loras(model: GraphModel) -> bool:
    """Whether a scale in the options of a call is that of LoRAs, as in the quantized models of diffusers' classes."""
    return model.plan is not None and any(
        base.__module__.startswith("diffusers.") for base in type(model.architecture.skeleton).__mro__
    )


def _number(name: str, scale: Any) -> float:
    try:
        value = float(scale)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not math.isfinite(value):
        raise AdapterError(f"{name}['scale'] scales LoRAs and is {scale!r}; give a finite number")
    return value


def take_turn(model: GraphModel, strength: float | None) -> None:
    """Set the scale of LoRAs for one call; :func:`give_turn` ends it. Without LoRAs, None, nothing is done.

    Calls in other threads with another scale wait meanwhile.
    """
    if strength is not None:
        made_adapters(model).take_turn(strength)


def give_turn(model: GraphModel, strength: float | None) -> None:
    """End what :func:`take_turn` began."""
    if strength is not None:
        made_adapters(model).give_turn()


def check_norms(model: GraphModel, before: Mapping[str, Tensor] | None) -> None:
    """Refuse the norms of a Control-LoRA, which pipelines write with ``load_state_dict``, if passes changed the norms.

    Args:
        model: The model, with the new norms.
        before: The norms that it had, by name, or None.

    Raises:
        AdapterError: Names the norm. The model then has the norms and the adapters that it had.
    """
    folded = set()
    for captured in model.lasting:
        for node in captured.module.graph.find_nodes(op="get_attr"):
            history = history_of(captured.module, node)
            folded.update([history.root] if history.steps else [])
    changed = next((name for name in before or () if name in folded), None)
    if changed is not None:
        model.load_state_dict(dict(before or {}), strict=False)
        made_adapters(model).take_back()
        raise AdapterError(f"the adapter replaces {changed!r}, into which the recipe folded factors. {FUSE}")


def refuse_scale(model: GraphModel, call: Call) -> None:
    """Refuse a scale of LoRAs within a larger function that is compiled: it would be a constant of the compiled code.

    Raises:
        AdapterError: Says how to scale instead.
    """
    found = adapters_of(model)
    if found is not None and found.serving is not None:
        for name in call.names:
            if name.endswith(".scale") and name.startswith(_OPTIONS):
                raise AdapterError(
                    f"{name} scales LoRAs, which a function that is compiled around the model cannot change from call "
                    "to call; use set_adapters with weights, or compile the model alone"
                )
