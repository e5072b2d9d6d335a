"""Checks of formats of other packages: what their methods return, and a trial before anything is rounded.

The methods of their classes are wrapped when the class is made, so every caller gets what :class:`Format` promises, or
an error that names the format. The wrappers read shapes and dtypes only, because methods also take fake tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxquant.errors import ConfigurationError, FxquantError
from fxquant.numerics.packing import MAX_BITS, MIN_BITS

if TYPE_CHECKING:
    from fxquant.numerics.formats.format import Format, Scales

_CHECKED = ("encode", "decode", "scales", "scale_values", "global_scale", "values", "round")
_CHANNELS = 16  # Of the trial, if the format has no block.


def guard(cls: type[Format]) -> None:
    """Wrap the methods that a class defines itself, so that their results are checked and their errors name it."""
    for name in _CHECKED:
        method = vars(cls).get(name)
        if callable(method) and not getattr(method, "__isabstractmethod__", False):
            setattr(cls, name, _guarded(name, method))


def _guarded(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Format, *args: Any, **options: Any) -> Any:
        given = [one for one in (*args, *options.values()) if isinstance(one, Tensor)]
        # Inference tensors have no versions.
        versions = [None if one.is_inference() else one._version for one in given]
        try:
            found = method(self, *args, **options)
        except (FxquantError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ConfigurationError(
                f"the format {self.name!r} ({type(self).__module__}): its method {name} failed: "
                f"{type(error).__name__}: {error}; repair the format, or choose another one"
            ) from error
        if versions != [None if one.is_inference() else one._version for one in given]:
            raise _wrong(self, name, "writes into a tensor that it was given; let it make a new one")
        if name in _RESULTS:
            _RESULTS[name](self, found, *args, **options)
        return found

    return call


def _wrong(format: Format, method: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"the format {format.name!r} ({type(format).__module__}): its method {method} {what}; see "
        "fxquant.authoring.Format"
    )


def _check_tensor(format: Format, method: str, found: Any, shape: torch.Size, *dtypes: torch.dtype) -> None:
    if not isinstance(found, Tensor):
        raise _wrong(format, method, f"returned a {type(found).__name__}, not a tensor")
    if found.shape != shape:
        raise _wrong(format, method, f"returned the shape {list(found.shape)} in place of {list(shape)}")
    if dtypes and found.dtype not in dtypes:
        raise _wrong(format, method, f"returned {found.dtype} in place of {dtypes[0]}")


def _encoded(format: Format, found: Any, x: Tensor, scales: Scales) -> None:
    shape = torch.broadcast_shapes(x.shape, scales.scale.shape)
    _check_tensor(format, "encode", found, shape, torch.uint8)


def _decoded(format: Format, found: Any, codes: Tensor, scales: Scales, dtype: torch.dtype) -> None:
    _check_tensor(format, "decode", found, torch.broadcast_shapes(codes.shape, scales.scale.shape), dtype)


def _scaled(format: Format, found: Any, low: Tensor, *rest: Any, **options: Any) -> None:
    if not isinstance(getattr(found, "scale", None), Tensor):
        raise _wrong(format, "scales", f"returned a {type(found).__name__}, not fxquant.authoring.Scales with tensors")
    # Searches of ranges compare scales in float64.
    wide = () if format.scale_dtype == torch.uint8 else (torch.float64,)
    _check_tensor(format, "scales", found.scale, low.shape, format.scale_dtype, *wide)
    if (found.zero_point is not None) != format.zero_points:
        both = ("no zero points", "and it gives some") if not format.zero_points else ("zero points", "and it has none")
        raise _wrong(format, "scales", f"has to agree with zero_points: the format says {both[0]}, {both[1]}")
    if found.zero_point is not None:
        _check_tensor(format, "scales", found.zero_point, low.shape, torch.uint8)


def _of_scales(format: Format, found: Any, low: Tensor, high: Tensor) -> None:
    if format.global_scales:
        _check_tensor(format, "global_scale", found, low.shape, torch.float32)
    elif found is not None:
        raise _wrong(format, "global_scale", "returned a scale, and the format says global_scales = False")


def _grid(format: Format, found: Any) -> None:
    _check_tensor(format, "values", found, torch.Size([2**format.bits]), torch.float32)


_RESULTS: dict[str, Callable[..., None]] = {
    "encode": _encoded,
    "decode": _decoded,
    "scales": _scaled,
    "global_scale": _of_scales,
    "values": _grid,
}


def check_attributes(name: str, item: Format) -> None:
    """Refuse attributes of the wrong type, and those that do not fit together.

    Raises:
        ConfigurationError: Names the format and the attribute.
    """
    for what in ("bits", "block"):
        if type(getattr(item, what, None)) is not int:
            raise ConfigurationError(
                f"the format {name!r} has {what}={getattr(item, what, None)!r}; set a whole number as an int"
            )
    if not MIN_BITS <= item.bits <= MAX_BITS:
        raise ConfigurationError(f"the format {name!r} has {item.bits} bits; {MIN_BITS} to {MAX_BITS} are possible")
    if not name.isidentifier():
        raise ConfigurationError(f"the format {name!r} needs another name: letters and digits, such as 'posit8'")
    if item.block < 0:
        raise ConfigurationError(f"the format {name!r} has blocks of {item.block}; set some channels, or 0 for none")
    if item.scale_dtype not in (torch.float32, torch.uint8):
        raise ConfigurationError(f"the format {name!r} has scales in {item.scale_dtype}; set float32 or uint8")
    if item.global_scales and not item.block:
        raise ConfigurationError(f"the format {name!r} has scales of scales and no block; set block to some channels")
    if item.zero_points and (item.block or item.scale_dtype != torch.float32):
        what = "a block" if item.block else "scales of 8 bits"
        raise ConfigurationError(f"the format {name!r} has zero points and {what}; both together are not possible")


def try_out(format: Format) -> None:
    """Round a few values in a format, also without values, and check its grid, its codes and what they stand for.

    Raises:
        ConfigurationError: Names the format and the method that is wrong.
    """
    format.values()
    channels = format.block or _CHANNELS
    row = torch.linspace(-1.0, 1.5, 2 * channels).reshape(2, 1, channels)
    for x in (row, torch.zeros_like(row), row.to(torch.float64), row.to(torch.bfloat16), row.to("meta")):
        blocks = torch.cat([x, x / 2], dim=1)  # [rows, blocks, channels]
        low, high = blocks.amin(-1), blocks.amax(-1)
        outer = format.global_scale(low.amin(), high.amax())
        found = format.scales(low, high, global_scale=outer)
        zero_point = None if found.zero_point is None else found.zero_point[..., None]
        scales = replace(found, scale=found.scale[..., None], zero_point=zero_point, global_scale=outer)
        codes = format.encode(blocks, scales)
        decoded = format.decode(codes, scales, blocks.dtype)
        if x.is_meta:
            continue
        if int(codes.max()) >= 2**format.bits:
            raise _wrong(format, "encode", f"makes the code {int(codes.max())}, which {format.bits} bits cannot hold")
        stands = format.scale_values(scales.scale)
        if not bool((stands.isfinite() & (stands != 0)).all()):
            raise _wrong(format, "scales", "makes a scale of 0, NaN or infinity for finite values")
        if not bool(decoded.isfinite().all()):
            raise _wrong(format, "decode", "makes NaN or infinity of codes of finite values")
