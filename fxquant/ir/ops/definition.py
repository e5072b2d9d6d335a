"""Definition of operators, and the argument checks that several operators share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxquant.errors import ConfigurationError

_library = torch.library.Library("fxquant", "DEF")


def define(schema: str, reference: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Define an operator by its schema, its reference kernel, and the fake kernel that computes its shape."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxquant::{name}", fake, lib=_library)


def check_broadcast(what: str, value: Tensor, shape: Sequence[int]) -> None:
    """Refuse a value that would not broadcast to this shape.

    Raises:
        ConfigurationError: If it would not. The message states both shapes.
    """
    pairs = zip(reversed(value.shape), reversed(shape), strict=False)
    # Symbolic sizes are not compared: comparing them would fix the batch size that the graph keeps open.
    clash = any(isinstance(own, int) and isinstance(size, int) and own not in (1, size) for own, size in pairs)
    if clash or value.dim() > len(shape):
        raise ConfigurationError(f"the {what} of shape {tuple(value.shape)} does not broadcast to {tuple(shape)}.")


def check_activation_grid(x: Tensor, scale: Tensor, zero_point: Tensor) -> None:
    """Refuse scales and zero points that are neither one for all of `x` nor one per row of `x`.

    Raises:
        ConfigurationError: If one of them is refused. The message names it and states its shape.
    """
    for what, value in (("scale", scale), ("zero point", zero_point)):
        check_broadcast(what, value, (*x.shape[:-1], 1))
