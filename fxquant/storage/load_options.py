"""What the options of ``from_pretrained`` mean when a checkpoint is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fxquant.errors import ConfigurationError
from fxquant.runtime.devices import check_dtype, usable_device

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_KNOWN = ("subfolder", "torch_dtype", "dtype", "device_map", "low_cpu_mem_usage", "use_safetensors")


def place_and_device(
    folder: str | Path, device: str | torch.device, options: Mapping[str, Any]
) -> tuple[Path, torch.device, torch.dtype | None]:
    """Read the options of ``from_pretrained``.

    Args:
        folder: The folder.
        device: The device, if ``device_map`` does not name another one.
        options: ``subfolder``: the folder in it. ``torch_dtype`` or ``dtype``: the dtype that the model computes in.
            ``device_map``: a device, because a quantized model runs on one. ``low_cpu_mem_usage`` and
            ``use_safetensors``: true or None, because a quantized model is never read in another way.

    Returns:
        The folder of the checkpoint, the device, and the requested dtype or None.

    Raises:
        ConfigurationError: If there is no such device here, an option has a value that a quantized model cannot have,
            or there is no such option.
    """
    unknown = next((name for name in options if name not in _KNOWN), None)
    if unknown is not None:
        raise ConfigurationError(f"there is no option {unknown!r}; there are {', '.join(_KNOWN)}")
    if options.get("low_cpu_mem_usage") is False:
        raise ConfigurationError(
            "low_cpu_mem_usage=False would make float weights, which a quantized model does not have; leave it out"
        )
    if options.get("use_safetensors") is False:
        raise ConfigurationError(
            "use_safetensors=False asks for a pickle, which can run code when read; fxquant writes none. Leave it out"
        )
    mapped = device_of_map(options.get("device_map"))
    subfolder = options.get("subfolder")
    place = Path(folder) if not subfolder else Path(folder) / subfolder
    return place, usable_device(device if mapped is None else mapped), wanted_dtype(options)


def wanted_dtype(options: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that ``dtype`` or ``torch_dtype`` names; the newer name comes first, as in diffusers.

    Raises:
        ConfigurationError: If it is not a dtype, or none in which a quantized model computes.
    """
    dtype = dtype_option(options)
    if not isinstance(dtype, (torch.dtype, type(None))):
        raise ConfigurationError(f"dtype={dtype!r} is not a dtype of torch, such as torch.bfloat16")
    if dtype is not None:
        check_dtype(dtype)
    return dtype


def dtype_option(options: Mapping[str, Any]) -> Any:
    """What ``dtype`` or ``torch_dtype`` holds; the newer name comes first, as in diffusers."""
    dtype = options.get("dtype")
    return options.get("torch_dtype") if dtype is None else dtype


def device_of_map(device_map: Any) -> torch.device | None:
    """The one device that a device map names; None if there is no map.

    Args:
        device_map: A device, its name or its number, or ``{"": device}``.

    Raises:
        ConfigurationError: If the map spreads the model over devices.
    """
    if device_map is None:
        return None
    if isinstance(device_map, Mapping):
        devices = {str(device): device for device in device_map.values()}
        found = next(iter(devices.values()), None) if len(devices) == 1 else None
    else:
        found = None if isinstance(device_map, str) and device_map in _STRATEGIES else device_map
    if found is None or found == "disk":
        raise ConfigurationError(
            f"device_map={device_map!r} would spread a quantized model over devices, and its graph runs on one; give "
            "device_map='cpu' or device_map='cuda'"
        )
    try:
        return torch.device("cuda", found) if isinstance(found, int) else torch.device(found)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(f"device_map={device_map!r} names no device; give 'cpu' or 'cuda'") from error


def dtype_for(part: str, dtype: Any) -> Any:
    """The dtype that a pipeline's dtype option gives to one of its parts; it may be a dict by part."""
    if isinstance(dtype, Mapping):
        return dtype.get(part, dtype.get("default", torch.float32))
    return dtype


def default_dtype(read: Mapping[str, torch.dtype], partly: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """The dtype option for a pipeline whose caller names none: that of its quantized parts.

    Args:
        read: The dtypes of quantized parts that are read already, by name.
        partly: The dtypes of parts that diffusers will read, and that have quantized parts of their own.

    Returns:
        ``torch_dtype``: a dtype, or one for each part if they differ. Empty if no part is quantized.
    """
    first = next(iter((*read.values(), *partly.values())), None)
    if first is None:
        return {}
    others = {name: dtype for name, dtype in partly.items() if dtype != first}
    return {"torch_dtype": {**others, "default": first} if others else first}


def check_dtypes(names: Iterable[str], given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse a dtype in which a quantized part of a pipeline cannot be, before anything is read.

    Args:
        names: Names of the quantized parts that will be read; they are converted.
        given: Quantized parts that the caller gives; they stay as they are.
        options: The options of the caller, with ``dtype`` or ``torch_dtype``: a dtype, or one for each part.

    Raises:
        ConfigurationError: Says which dtypes there are, or names the part that has another dtype.
    """
    wanted = dtype_option(options)
    for dtype in (dtype_for(name, wanted) for name in names):
        if isinstance(dtype, torch.dtype):
            check_dtype(dtype)
    for name, model in given.items():
        if dtype_for(name, wanted) not in (None, model.dtype):
            raise ConfigurationError(
                f"part {name!r} computes in {model.dtype}, not in {dtype_for(name, wanted)}; convert it first, with "
                f".to({dtype_for(name, wanted)}), or leave the dtype out"
            )
