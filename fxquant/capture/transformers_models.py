"""Models of transformers: their configs are objects of classes of their own, not mappings as in diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def is_of_transformers(cls: Any) -> bool:
    """Whether a class is a model of transformers."""
    return cls.__module__.startswith("transformers.") and isinstance(getattr(cls, "config_class", None), type)


def built(model_class: Any, config: Mapping[str, Any]) -> nn.Module:
    """A model of transformers from the entries of its config, with the attention that transformers chooses itself.

    A config may name an attention that is fetched from the hub as code. Configs come from files, so such entries are
    left out.
    """
    model: nn.Module = model_class(model_class.config_class.from_dict(_without_implementations(config)))
    return model


def _without_implementations(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = ((key, entry) for key, entry in value.items() if "implementation" not in key and key != "auto_map")
        return {key: _without_implementations(entry) for key, entry in kept}
    return [_without_implementations(entry) for entry in value] if isinstance(value, list) else value
