"""A model of the original's class without weights, on which diffusers and peft keep adapters.

Names of layers, formats of keys, ranks, alphas, weights of adapters and messages are then those of diffusers and peft.
The stand-in never runs. Its weights are single zeros that are expanded to the shape of the weight, so they take no
memory, but peft finds their shape, dtype and device.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.adapters.folding import Delta
from fxquant.errors import MissingPackageError
from fxquant.ir.tensors import weights_and_buffers


def make_stand_in(skeleton: nn.Module) -> Any:
    """Return a model of a skeleton's class, with the methods of diffusers for adapters.

    Raises:
        MissingPackageError: If diffusers or peft is not installed.
    """
    try:
        import peft  # noqa: F401
        from diffusers.loaders import PeftAdapterMixin
    except ImportError as error:
        raise MissingPackageError(f"adapters need diffusers and peft: pip install diffusers peft ({error})") from error
    memo: dict[int, Any] = {}
    for _, tensor in weights_and_buffers(skeleton):
        value = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    made = copy.deepcopy(skeleton, memo)
    if not isinstance(made, PeftAdapterMixin):
        made.__class__ = type(
            type(made).__name__, (PeftAdapterMixin, type(made)), {"__module__": type(made).__module__}
        )
    return made


def copy_of(stand_in: Any) -> Any:
    """A copy of a stand-in with copies of its adapters; their changes do not affect the first one."""
    kept: dict[int, Any] = {id(t): t for _, t in weights_and_buffers(stand_in) if _is_stand_in(t)}
    return copy.deepcopy(stand_in, kept)


def copy_in_dtypes_of(skeleton: nn.Module, stand_in: Any) -> Any:
    """A copy of a stand-in for a skeleton in other dtypes. peft gives an adapter the dtype of its layer."""
    dtypes = {name: tensor.dtype for name, tensor in weights_and_buffers(skeleton)}
    made: dict[int, Any] = {}
    for name, tensor in weights_and_buffers(stand_in):
        layer = name.partition(".lora_")[0]
        dtype = dtypes.get(name.replace(".base_layer.", "."), dtypes.get(f"{layer}.weight", tensor.dtype))
        empty = torch.zeros((), dtype=dtype).expand(tensor.shape)
        value = empty if _is_stand_in(tensor) else tensor.detach().to(dtype, copy=True)
        made[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    return copy.deepcopy(stand_in, made)


def _is_stand_in(tensor: Tensor) -> bool:
    """Whether a tensor stands for a weight of the original, and takes no memory."""
    return 0 in tensor.stride() or not tensor.dim()


def tuners(stand_in: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with adapters, by the path of the layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in stand_in.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path, module


def tensors_of(stand_in: nn.Module) -> dict[str, Tensor]:
    """The tensors of all adapters as they were loaded, by the names that peft gives them in a state dict."""
    return {name: tensor for name, tensor in stand_in.state_dict().items() if ".lora_A." in name or ".lora_B." in name}


def ranks_of(stand_in: nn.Module) -> dict[str, int]:
    """The sum of the ranks of all adapters beside each layer."""
    return {path: sum(int(a.weight.shape[0]) for a in module.lora_A.values()) for path, module in tuners(stand_in)}


def deltas_of(stand_in: nn.Module) -> dict[str, list[Delta]]:
    """What the active adapters add to the weight of each layer; layers without an active adapter are left out."""
    found: dict[str, list[Delta]] = {}
    for path, module in tuners(stand_in):
        if module.disable_adapters:
            continue
        active = Counter(name for name in module.active_adapters if name in module.lora_A)  # peft adds each of them.
        deltas = [
            Delta(module.lora_A[name].weight, module.lora_B[name].weight, times * float(module.scaling[name]))
            for name, times in active.items()
        ]
        if deltas:
            found[path] = [Delta(delta.a.detach(), delta.b.detach(), delta.scale) for delta in deltas]
    return found
