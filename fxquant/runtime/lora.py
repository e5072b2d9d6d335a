"""How a quantized model hands the methods for LoRAs on to its adapters, which are made when the first is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fxquant.adapters.adapters import Adapters
from fxquant.errors import AdapterError

if TYPE_CHECKING:
    from fxquant.capture.calls import Call
    from fxquant.runtime.model import GraphModel

_HELD = "_adapters"
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


def with_scale(model: GraphModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """Set the scale of LoRAs that a call gives, ``joint_attention_kwargs={"scale": 0.5}``, and take it from the call.

    Without active LoRAs it has no effect on a model of diffusers. It is taken from the call then too, because otherwise
    each number would be a kind of call with a graph of its own. A kind that was captured with it stays as it is.
    """
    found = adapters_of(model)
    active = found is not None and found.serving is not None
    if not active and (model.plan is None or not _is_of_diffusers(model)):
        return args, kwargs
    given = model.architecture.signature.bind_partial(*args, **kwargs)
    scaled = [name for name in _OPTIONS if "scale" in _mapping(given.arguments.get(name))]
    if not active and (not scaled or model.find(model.architecture.canonical(args, kwargs)) is not None):
        return args, kwargs
    strength = 1.0
    for name in scaled:
        options = given.arguments[name]
        strength *= float(options["scale"])
        given.arguments[name] = {key: value for key, value in options.items() if key != "scale"}
        if not given.arguments[name] and model.find(model.architecture.canonical(given.args, given.kwargs)) is None:
            given.arguments[name] = None  # Pipelines give either for no options, and each is another kind of call.
    if found is not None and active:
        found.set_strength(strength)
    return given.args, given.kwargs


def _mapping(options: Any) -> Mapping[str, Any]:
    return options if isinstance(options, Mapping) else {}


def _is_of_diffusers(model: GraphModel) -> bool:
    return type(model.architecture.skeleton).__module__.startswith("diffusers.")


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
