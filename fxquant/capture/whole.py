"""Describes the model of which a module is a part, for modules that are compiled alone, such as the decoder of a VAE.

A graph has one entry, the call of a module. A model whose methods call several modules (``encode`` calls the encoder,
``decode`` the decoder) becomes one graph per module. Such a module has no config of its own: loading builds the whole
model from its class and config, without weights, and takes the part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

MARK = "_fxquant_whole"
"""The attribute of a module that holds the description. Copies of the module have it too."""


@dataclass(frozen=True)
class Whole:
    """The model of which a module is a part.

    Attributes:
        model_class: Its class.
        config: Its config, as plain values.
        path: Path of the part in it, such as ``decoder``.
    """

    model_class: type[nn.Module]
    config: Mapping[str, Any]
    path: str


def whole_of(module: nn.Module) -> Whole | None:
    """The model of which a module is a part; None for a module that is a model itself."""
    found: Whole | None = vars(module).get(MARK)
    return found


def made_part(module: nn.Module, whole: Whole) -> nn.Module:
    """The same module, marked as a part of a model."""
    vars(module)[MARK] = whole
    return module


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that makes a module from a config: that of the model of which it is a part, or its own."""
    whole = whole_of(module)
    return type(module) if whole is None else whole.model_class


def split_class(model_class: str) -> tuple[str, str, str]:
    """The library, the class and the part that a plan names, such as ``diffusers:AutoencoderKL/decoder``.

    The part is empty for a whole model.
    """
    library, _, name = model_class.partition(":")
    name, _, part = name.partition("/")
    return library, name, part
