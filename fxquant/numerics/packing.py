"""Dense storage of integer codes of 2 to 8 bits: tensor arithmetic that does not depend on weights or graphs.

A code of `bits` bits is cut into parts whose widths are powers of two, the binary digits of `bits` itself: 3 = 2 + 1,
5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1. Each part of a row of codes fills its own run of bytes, its *plane*; the planes of
a row follow one another, the widest first. The widest part holds the lowest bits of the code. Within a plane of width
w, byte j holds the codes `8/w * j` to `8/w * (j + 1) - 1`, the first in its lowest bits. So no field crosses the
boundary of a byte, and no plane wastes a whole byte. Codes of 2, 4 and 8 bits have one plane and unpack with one shift
and one mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fxquant.errors import ConfigurationError

MIN_BITS = 2
MAX_BITS = 8


def check_bits(bits: int) -> None:
    """Refuse a bit width that codes cannot have.

    Raises:
        ConfigurationError: `bits` is not in 2..8.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigurationError(f"bits={bits} is not supported: codes have {MIN_BITS} to {MAX_BITS} bits.")


def packed_size(n: int, bits: int) -> int:
    """Bytes of a packed row of `n` codes of `bits` bits: about `n * bits / 8`, each plane rounded up to whole bytes.

    Raises:
        ConfigurationError: `bits` is not in 2..8.
    """
    check_bits(bits)
    return sum(_plane_size(n, width) for width in _widths(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis.

    Args:
        codes: uint8 `[..., n]`, each below `2**bits`; higher bits are dropped, not checked.
        bits: Bits per code, 2 to 8.

    Returns:
        uint8 `[..., packed_size(n, bits)]`; `codes` itself for 8 bits. :func:`unpack` is the inverse.

    Raises:
        ConfigurationError: `bits` is not in 2..8, or `codes` is not uint8.
    """
    check_bits(bits)
    _check_uint8(codes, "codes")
    if bits == MAX_BITS:
        return codes
    n = codes.shape[-1]
    planes = []
    low = 0
    for width in _widths(bits):
        fields_a_byte = 8 // width
        fields = functional.pad((codes >> low) & _mask(width), (0, -n % fields_a_byte))
        plane = fields[..., ::fields_a_byte]
        for k in range(1, fields_a_byte):
            plane = plane | (fields[..., k::fields_a_byte] << (k * width))
        planes.append(plane)
        low += width
    return torch.cat(planes, dim=-1)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: uint8 `[..., packed_size(n, bits)]`.
        bits: Bits per code, 2 to 8.
        n: Codes per row.

    Returns:
        uint8 `[..., n]`; `packed` itself for 8 bits.

    Raises:
        ConfigurationError: `bits` is not in 2..8, `packed` is not uint8, or its rows do not have the size of `n` codes.
    """
    size = packed_size(n, bits)
    _check_uint8(packed, "packed codes")
    if packed.shape[-1] != size:
        raise ConfigurationError(
            f"a row of {n} codes of {bits} bits takes {size} bytes, but the packed rows have {packed.shape[-1]}."
        )
    if bits == MAX_BITS:
        return packed
    codes: Tensor | None = None
    start = low = 0
    for width in _widths(bits):
        plane = packed[..., start : start + _plane_size(n, width)]
        fields = torch.stack([(plane >> shift) & _mask(width) for shift in range(0, 8, width)], dim=-1)
        part = fields.flatten(-2)[..., :n]
        codes = part if codes is None else codes | (part << low)
        start += _plane_size(n, width)
        low += width
    assert codes is not None
    return codes


def _widths(bits: int) -> tuple[int, ...]:
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def _mask(width: int) -> int:
    return (1 << width) - 1


def _plane_size(n: int, width: int) -> int:
    return (n * width + 7) // 8


def _check_uint8(tensor: Tensor, what: str) -> None:
    if tensor.dtype != torch.uint8:
        raise ConfigurationError(f"{what} must be uint8, not {tensor.dtype}.")
