"""Checks whether a model can be built again from its class and its config, as loading a checkpoint does.

A checkpoint contains no code. Changes to a model after its constructor, such as a LoRA or fused projections, are not in
its config. Values that JSON writes as something else are not in its config either.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxquant.capture.trace import Architecture
from fxquant.capture.transformers_models import is_of_transformers
from fxquant.capture.whole import own_class, split_class, whole_of
from fxquant.errors import CheckpointError, PortabilityWarning
from fxquant.ir.tensors import weights_and_buffers

_DEFAULTS = "_use_default_values"


def config_of(model: nn.Module) -> dict[str, Any]:
    """A model's config as plain dicts and lists, without the path it was read from; empty if it is not a mapping.

    For a part of a model it is the config of the whole model.

    diffusers also lists the arguments for which ``from_config`` takes the defaults of the class. That list includes
    arguments that the constructor got without a keyword. They are removed from the list if they are not the default.
    """
    whole = whole_of(model)
    if whole is not None:
        return dict(whole.config)
    config: Any = getattr(model, "config", None)
    if is_of_transformers(type(model)):
        config = json.loads(config.to_json_string(use_diff=False))
    if not isinstance(config, Mapping):
        return {}
    found: dict[str, Any] = _plain(config)
    found.pop("_name_or_path", None)  # A path on this machine.
    if isinstance(found.get(_DEFAULTS), list):
        parameters = inspect.signature(type(model).__init__).parameters
        defaults = {name: _plain(parameter.default) for name, parameter in parameters.items()}
        found[_DEFAULTS] = [name for name in found[_DEFAULTS] if name in defaults and defaults[name] == found.get(name)]
    return found


def config_text(model: nn.Module) -> str:
    """The content of a ``config.json``. Values that JSON cannot hold are written as text; see :func:`obstacle`."""
    return json.dumps(config_of(model), indent=2, default=str, skipkeys=True) + "\n"


def class_of(model_class: str) -> Any:
    """The class that a plan names, such as ``diffusers:DiTTransformer2DModel`` or ``transformers:T5EncoderModel``.

    Raises:
        CheckpointError: If the installed library has no such model, or it is neither of these two.
    """
    library, name, _ = split_class(model_class)
    if library not in LIBRARIES:
        raise CheckpointError(f"{library} is not one of {', '.join(LIBRARIES)}")
    found = getattr(importlib.import_module(library), name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module) and is_made_from_config(found)):
        raise CheckpointError(f"the installed {library} has no model {name}; install a version that does")
    return found


LIBRARIES = ("diffusers", "transformers")
"""The libraries whose models loading builds by name."""


def is_made_from_config(cls: Any) -> bool:
    """Whether a class makes models from a config without weights."""
    return hasattr(cls, "from_config") or is_of_transformers(cls)


def is_rebuilt(model: nn.Module) -> bool:
    """Whether loading builds the model without help, because its class makes models from a config."""
    return is_made_from_config(own_class(model))


def rebuilt(model: nn.Module, timestep: str | None) -> Architecture:
    """The architecture that loading builds from a model's class and config.

    Raises:
        CheckpointError: If that is not the same model; says what its config cannot hold, or its class does not make.
    """
    cls, whole = own_class(model), whole_of(model)
    config: Any = getattr(model, "config", None) if whole is None else whole.config
    if not isinstance(config, Mapping) and not is_of_transformers(cls):
        raise CheckpointError(f"its config is a {type(config).__name__}, not a mapping that JSON could hold")
    written = config_of(model)
    where = _changed_by_json(written, json.loads(config_text(model)))
    if where is not None:
        raise CheckpointError(f"its config changes when it is written as JSON: {where}")
    library = cls.__module__.partition(".")[0]
    if library in LIBRARIES and class_of(f"{library}:{cls.__name__}") is not cls:
        raise CheckpointError(f"{library} has a different class with the name {cls.__name__}")
    try:
        part = "" if whole is None else whole.path
        architecture = Architecture.from_config(cls, json.loads(config_text(model)), timestep, part)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"{cls.__name__}.from_config fails: {type(error).__name__}: {reason}") from error
    difference = difference_of_tensors(
        dict(weights_and_buffers(model)), dict(weights_and_buffers(architecture.skeleton))
    )
    if difference is not None:
        raise CheckpointError(difference)
    return architecture


def obstacle(model: nn.Module, timestep: str | None) -> str | None:
    """Why loading cannot build a model again, or None. Only its config and its tensors are checked."""
    try:
        rebuilt(model, timestep)
    except CheckpointError as error:
        return str(error)
    return None


def difference_of_tensors(had: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> str | None:
    """A description of the first tensor in which two models differ, or None."""
    for name, tensor in had.items():
        if name not in made:
            return f"its class makes no tensor {name!r}, which was added later{_hint(name)}"
        if made[name].shape != tensor.shape:
            return f"tensor {name!r} has shape {tuple(tensor.shape)}, and its class makes {tuple(made[name].shape)}"
    missing = next((name for name in made if name not in had), None)
    return None if missing is None else f"tensor {missing!r}, which its class makes, was removed later"


def _hint(name: str) -> str:
    hints = {
        r"(?<![a-z])qkv": "; unfuse_qkv_projections() undoes this",
        r"(?<![a-z])lora": "; pipe.fuse_lora(), then pipe.unload_lora_weights() make it part of the weights",
    }
    return next((hint for pattern, hint in hints.items() if re.search(pattern, name)), "")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _changed_by_json(value: Any, read: Any, where: str = "") -> str | None:
    """A description of the first entry that JSON reads back differently than it was written, or None."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                return f"the key {key!r} of {where or 'the config'} is a {type(key).__name__} and is read back as text"
            if key not in read:
                return f"{where}{'.' if where else ''}{key} is left out"
            found = _changed_by_json(entry, read[key], f"{where}{'.' if where else ''}{key}")
            if found is not None:
                return found
        return None
    if isinstance(value, list):
        pairs = enumerate(zip(value, read, strict=True))
        told = (_changed_by_json(*pair, f"{where}[{number}]") for number, pair in pairs)
        return next((text for text in told if text is not None), None)
    if isinstance(value, float) and math.isnan(value) and isinstance(read, float) and math.isnan(read):
        return None
    same = isinstance(value, (str, bool, int, float, type(None))) and value == read
    return None if same else f"{where} is a {type(value).__name__} ({value!r}) and is read back as {read!r}"


def warn_if_not_rebuilt(model: nn.Module, timestep: str | None) -> None:
    """Warn before the work if saving will refuse its result, as far as this can be checked without tracing."""
    reason = obstacle(model, timestep) if is_rebuilt(model) else None
    if reason is not None:
        warnings.warn(
            f"loading would not build this {type(model).__name__} again from its class and config: {reason}. "
            "fxquant.save will refuse the quantized model unless needs_model=True is given",
            PortabilityWarning,
            stacklevel=4,
        )
