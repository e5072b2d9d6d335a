"""Devices and dtypes that can be used here, devices that traced graphs name, and CPU memory that is given back."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.errors import ConfigurationError

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device of this name, such as ``cpu``, ``cuda`` or ``cuda:1``, after creating a tensor on it.

    Raises:
        ConfigurationError: If there is no such device here.
    """
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # Depends on the device type and the torch build.
        # For a device type that torch was built without, torch lists all types that it was built with on one line.
        first = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
        raise ConfigurationError(
            f"device {str(device)!r} cannot be used here: {first}. "
            "Use 'cuda' on NVIDIA GPUs, with a build of torch for CUDA, or 'cpu' on any machine"
        ) from error
    return found


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype in which no captured model computes.

    Raises:
        ConfigurationError: Names the dtypes that there are.
    """
    if dtype not in _DTYPES:
        raise ConfigurationError(
            f"a captured model computes in float16, bfloat16, float32 or float64, not in {dtype}; the weights of a "
            "quantized model are stored with few bits already"
        )


def retarget(module: fx.GraphModule, device: torch.device) -> None:
    """Replace the device in every op of a graph that names one (``arange(device=...)``, ``to(device)``)."""

    def swap(value: object) -> object:
        return device if isinstance(value, torch.device) else value

    for node in module.graph.nodes:
        if node.op == "call_function":
            node.args = tuple(swap(value) for value in node.args)
            node.kwargs = {name: swap(value) for name, value in node.kwargs.items()}
    module.recompile()


def traced_on(module: fx.GraphModule) -> torch.device:
    """The device for which a graph was traced. Ops of attention order their results as the kernels of a device do."""
    values = (node.meta.get("val") for node in module.graph.nodes)
    return next((value.device for value in values if isinstance(value, torch.Tensor)), torch.device("cpu"))
