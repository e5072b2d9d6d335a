"""Definition of operators, and the argument checks that several operators share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxquant.errors import ConfigurationError
from fxquant.numerics.formats import FORMATS, Format, Scales

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


def check_parts(format: Format, scales: Scales, what: str) -> None:
    """Refuse scales without the zero point or the scale of scales that a format needs, or with one it does not have.

    Args:
        format: The number format.
        scales: Its scales.
        what: What they belong to, for the message: ``input`` or ``weight``.

    Raises:
        ConfigurationError: If so. The message names the part.
    """
    for part, needed, given in (
        ("zero point", format.zero_points, scales.zero_point),
        ("global scale", format.global_scales, scales.global_scale),
    ):
        if needed != (given is not None):
            says = f"needs a {part}, and there is none" if needed else f"has no {part}, and one is given"
            raise ConfigurationError(f"the {what} has the format {format.name}, which {says}.")
    if scales.scale.dtype != format.scale_dtype and format.scale_dtype == torch.uint8:
        raise ConfigurationError(
            f"scales of {format.name} are bytes (uint8), and the scale of the {what} is {scales.scale.dtype}."
        )


def check_input_scales(x: Tensor, scales: Scales, format: str) -> None:
    """Refuse scales that are neither one for all of `x`, nor one per row, nor, for formats with blocks, one per block.

    Raises:
        ConfigurationError: If so. The message names the scale and states its shape.
    """
    block = FORMATS[format].block
    rows = x.shape[:-1]
    if not block:
        check_broadcast("scale", scales.scale, (*rows, 1))
        if scales.zero_point is not None:
            check_broadcast("zero point", scales.zero_point, (*rows, 1))
    else:
        channels = x.shape[-1]
        check_block_width(x, format)
        if scales.scale.dim() != x.dim():
            raise ConfigurationError(
                f"the scale of shape {tuple(scales.scale.shape)} is not one per {block} channels of {tuple(x.shape)}."
            )
        check_broadcast("scale", scales.scale, (*rows, channels // block))
    if scales.global_scale is not None:
        check_broadcast("global scale", scales.global_scale, (*rows, 1))


def check_block_width(x: Tensor, format: str) -> None:
    """Refuse a value whose channels are not whole blocks of a format.

    Raises:
        ConfigurationError: If so. The message states block and shape.
    """
    block, channels = FORMATS[format].block, x.shape[-1]
    if block and isinstance(channels, int) and channels % block:
        raise ConfigurationError(
            f"{format} has a scale per {block} channels, and {block} does not divide the {channels} channels of "
            f"{tuple(x.shape)}."
        )


def by_block(x: Tensor, scales: Scales, format: str) -> tuple[Tensor, Scales]:
    """A value and its scales with an axis for the channels of a block, if the format has blocks."""
    block = FORMATS[format].block
    if not block:
        return x, scales
    outer = None if scales.global_scale is None else scales.global_scale[..., None]
    return x.unflatten(-1, (-1, block)), Scales(scales.scale[..., None], None, outer)


def decode_input(codes: Tensor, scales: Scales, format: str, dtype: torch.dtype) -> Tensor:
    """What the codes of an activation stand for, of the shape of `codes` and of `dtype`."""
    blocks, each = by_block(codes, scales, format)
    return FORMATS[format].decode(blocks, each, dtype).reshape(codes.shape)
