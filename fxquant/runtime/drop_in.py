"""Which attributes of the original a quantized model has: facts, and functions that need no weights and change nothing.

A quantized model keeps the original without its weights, to trace it again. A method that changes the original, such as
one that loads a LoRA, would succeed and change nothing in the graphs. So an attribute is handed on only if it is of one
of these kinds; others are refused by name:

- plain values: numbers, names, dtypes, sizes, and lists and dicts of them;
- methods of libraries that :data:`SAFE` lists;
- methods of the model's own class: they run on a :class:`Part`, which refuses every change and every access to weights;
- submodules, as :class:`Part`.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.capture.state import HOLLOW
from fxquant.errors import DropInError


def _shown_class(model: nn.Module) -> type:
    """The class of a model as ``model.__class__`` shows it: in place of a diffusers model, it is one of these too.

    Pipelines skip components in silence, when they load, weigh or delete LoRAs, unless their class is a subclass of
    ``diffusers.ModelMixin``. Attributes are looked up in the true class, ``type(model)``, so none is inherited.

    ``DiffusionPipeline.from_pipe`` alone sees the true class: it drops every ``ModelMixin`` that is not of the very
    class that the new pipeline names, and hands everything else on.
    """
    kind, modeling = type(model), sys.modules.get("diffusers.models.modeling_utils")
    if sys._getframe(1).f_code.co_name == "from_pipe":
        return kind
    original = getattr(model.__dict__.get("architecture"), "skeleton", None)
    if modeling is None or not isinstance(original, modeling.ModelMixin):
        return kind
    if kind not in _SHOWN:  # Every isinstance of another class asks, also in calls.
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        _SHOWN.setdefault(kind, type(kind.__name__, (kind, modeling.ModelMixin), names))
    return _SHOWN[kind]


_SHOWN: dict[type, type] = {}


class DropIn(nn.Module):
    """Base class of the models that fxquant makes to replace a float model."""

    __class__ = property(_shown_class)

    def check_to(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Refuse what ``to`` would refuse; pipelines ask all their parts before they move the first one.

        Args:
            device: The device; None to stay where it is.
            dtype: The dtype; None to keep it.

        Raises:
            FxquantError: Says what to do instead.
        """


SAFE = frozenset(
    {
        "config_name", "extract_init_dict", "from_config", "get_config_dict", "has_compatibles",
        "is_gradient_checkpointing", "load_config", "num_parameters", "save_config", "to_json_file", "to_json_string",
    }
)  # fmt: skip
"""Library methods that give correct results without weights: about the config, and facts that follow from the class."""

_LIBRARIES = (
    "accelerate",
    "diffusers.configuration_utils",
    "diffusers.loaders",
    "diffusers.models.attention",
    "diffusers.models.cache_utils",
    "diffusers.models.modeling_utils",
    "diffusers.utils",
    "huggingface_hub",
    "peft",
    "torch",
    "transformers",
)
"""Library modules that define the base classes of models, with the features that all models share."""

_WITHOUT_HOOKS: dict[str, Any] = {
    "_reset_stateful_cache": lambda *_, **__: None,
    "cache_context": lambda *_, **__: contextlib.nullcontext(),
    "is_cache_enabled": False,
}
"""What diffusers pipelines query of every model about caches, answered for a graph, which has no caches."""

_ADVICE = {
    "ip_adapter": "load the IP adapter into the float model and compile that",
    "lora|adapter|peft": (
        "only models that fxquant.compile or fxquant.load returned take LoRAs, beside their layers, and traced models "
        "and ahead-of-time packages do not. Load the LoRA into such a quantized model; or load it into the float model "
        "and fuse it there (pipe.fuse_lora(), then pipe.unload_lora_weights()), and trace, compile or export the result"
    ),
    "qkv": "fuse or separate the projections of the float model and compile that",
    "attn|attention": (
        "attention was captured as the float model computes it. Choose the attention in the float model, then compile"
    ),
    "cache": (
        "only models that fxquant.compile, fxquant.load and fxquant.trace return cache steps; an ahead-of-time package "
        "is one piece. Leave it out"
    ),
    "^_diffusers_hook$": (
        "hooks of diffusers run around modules, and a graph calls none. Use the methods of the model itself, such as "
        "enable_cache and enable_group_offload, which work or say what to do instead"
    ),
    "hook": "a graph calls no submodules. Put hooks on the whole model",
    "offload": "call enable_group_offload of the whole model",
    "layerwise_casting": "its weights are already stored with few bits. Leave it out",
    "parallel": (
        "a graph runs on one device, and its attention is an op, not a module whose inputs can be divided. Divide "
        "layers and heads between ranks with fxquant.parallelize(model, mesh)"
    ),
    "compile": (
        "only models that fxquant.compile, fxquant.load and fxquant.trace return are compiled block by block; an "
        "ahead-of-time package is compiled already"
    ),
    "checkpointing": "it is for training, and a quantized model only computes its output. Leave it out",
    "chunk": "set it in the float model and compile that",
    "^dequantize$": "the float model is the one that was compiled. Use that model",
    "^from_": "it creates another model. Call it on the class",
    "push_to_hub": "write a checkpoint with fxquant.save and upload the folder with huggingface_hub.upload_folder",
    "^register_(to|for)": "its config describes what was captured. Change the float model and compile that",
}
_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, enum.Enum, range, torch.dtype, torch.device, torch.Size, type,
)  # fmt: skip
_OF_THE_OWNER = ("config", "dtype", "device", "forward")
"""Attributes of the whole model that its own methods get from what replaces it, such as the call in a guided one."""


def hand_on(model: nn.Module, name: str, owner: Any, path: str = "") -> Any:
    """Return an attribute of the original without weights, if it is safe to hand on.

    Args:
        model: The original, or the part of it that has the attribute.
        name: Name of the attribute.
        owner: The model that replaces the original. It knows the dtype and the device.
        path: Path of the part in the original.

    Raises:
        DropInError: Says what to do instead. It is an ``AttributeError``, so that ``hasattr`` returns False. Refused
            methods exist and raise it when they are called: otherwise code that first checks whether a method exists
            would skip it silently.
        AttributeError: If there is no such attribute.
    """
    where = f"{path}.{name}" if path else name
    if name in model._parameters or name in model._buffers:
        raise refusal(where, "its weights are in the graphs. tensors() has them by name")
    if name in model._modules:
        return Part(model._modules[name], owner, where)  # type: ignore[arg-type]
    if name in vars(model):
        return _plain(vars(model)[name], where)
    kind = inspect.getattr_static(type(model), name, None)
    library = _is_of_library(type(model), name)
    if kind is None:  # The ``__getattr__`` of some classes returns values of their config.
        return _plain(getattr(model, name), where)
    if library and name in _WITHOUT_HOOKS:
        return _WITHOUT_HOOKS[name]
    if library and name in SAFE:
        return getattr(model, name)
    if isinstance(kind, (property, functools.cached_property)):
        if library:
            raise refusal(where)
        getter = kind.fget if isinstance(kind, property) else kind.func
        return _plain(getter(Part(model, owner, path)), where)  # type: ignore[misc]
    if isinstance(kind, staticmethod) and not library:
        return kind.__func__
    if isinstance(kind, (staticmethod, classmethod)) or (library and inspect.isroutine(kind)):
        return Refused(kind, where)
    if inspect.isfunction(kind):
        return functools.update_wrapper(functools.partial(_run, kind, Part(model, owner, path), where), kind)
    return _plain(kind, where)


def changes(model: nn.Module, name: str) -> bool:
    """Whether the original has this attribute, so that setting it on the quantized model would have no effect."""
    tables = (vars(model), model._parameters, model._buffers, model._modules)
    return any(name in table for table in tables) or hasattr(type(model), name)


def refusal(name: str, advice: str | None = None) -> DropInError:
    """Return the error for an attribute that is not handed on. It says what to do instead."""
    last = name.rpartition(".")[2].lower()
    fitting = (text for pattern, text in _ADVICE.items() if re.search(pattern, last))
    advice = advice or next(fitting, "it belongs to the float model. Use it there, and compile the result")
    return DropInError(f"a captured model has no {name}: {advice}.")


class Part:
    """A read-only view of a module of the original without weights.

    Methods of the module run on this view, so a method that sets an attribute or reads a weight fails at that line.
    """

    def __new__(cls, module: nn.Module | None, owner: Any, path: str) -> Part:
        """Create a view of a module; return None if ``module`` is None."""
        return super().__new__(cls) if module is not None else None  # type: ignore[return-value]

    def __init__(self, module: nn.Module, owner: Any, path: str) -> None:
        for name, value in (("_module", module), ("_owner", owner), ("_path", path)):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if not self._path and name in _OF_THE_OWNER:
            return getattr(self._owner, name)
        return hand_on(self._module, name, self._owner, self._path)

    def __setattr__(self, name: str, value: Any) -> None:
        raise refusal(f"{self._path}.{name}".removeprefix("."))

    def __delattr__(self, name: str) -> None:
        raise refusal(f"{self._path}.{name}".removeprefix("."))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's ``forward``, which fails where it reads a weight. The whole model runs its graphs."""
        if not self._path:
            return self._owner(*args, **kwargs)
        return type(self._module).forward(self, *args, **kwargs)

    def __len__(self) -> int:
        return len(self._module._modules)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._module, nn.ModuleDict):
            return iter(self._module._modules)
        return (self[number] for number in range(len(self)))

    def __getitem__(self, key: Any) -> Any:
        names = list(self._module._modules)
        if isinstance(key, slice):
            return [self[number] for number in range(len(names))[key]]
        name = names[key] if isinstance(key, int) else key
        return Part(self._module._modules[name], self._owner, f"{self._path}.{name}")

    def __repr__(self) -> str:
        return f"{type(self._module).__name__} without weights, {self._path or 'the original model'}"


class Refused:
    """A method that is not handed on: it exists, and raises when it is called."""

    def __init__(self, method: Any, name: str) -> None:
        functools.update_wrapper(self, getattr(method, "__func__", method))
        self.name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Raise.

        Raises:
            DropInError: Says what to do instead.
        """
        raise refusal(self.name)


def _run(function: Callable[..., Any], part: Part, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of the model's own class on a view of it."""
    try:
        return function(part, *args, **kwargs)
    except DropInError as error:
        if error.within is not None:
            raise
        raise DropInError(f"{refusal(name)} It would use or change missing parts: {error}", name) from error


def _is_of_library(cls: type, name: str) -> bool:
    """Whether a library class defines this attribute, also if the model's own class overrides it."""
    definers = [f"{base.__module__}." for base in cls.__mro__ if name in vars(base)]
    return any(definer.startswith(f"{library}.") for definer in definers for library in _LIBRARIES)


def _plain(value: Any, where: str) -> Any:
    """Return a plain value, copied if needed, so that the caller cannot change the original through it.

    Raises:
        DropInError: If the value is not plain.
    """
    if not _is_plain(value):
        raise refusal(where)
    return copy.copy(value) if isinstance(value, (list, dict, set)) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, torch.Tensor):
        return not isinstance(value, FakeTensor) and not hasattr(value, HOLLOW)
    if isinstance(value, Mapping):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return isinstance(value, (list, tuple, set, frozenset)) and all(map(_is_plain, value))
