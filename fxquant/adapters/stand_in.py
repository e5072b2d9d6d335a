"""A model of the original's class without weights, on which diffusers and peft keep adapters.

Names of layers, formats of keys, ranks, alphas, weights of adapters and messages are then those of diffusers and peft.
The stand-in never runs. Its weights are single zeros that are expanded to the shape of the weight, so they take no
memory, but peft finds their shape, dtype and device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.adapters.folding import Delta
from fxquant.errors import AdapterError, MissingPackageError
from fxquant.ir.tensors import weights_and_buffers

FUSE = (
    "Load it into the float model, fuse it there (pipe.fuse_lora(), then pipe.unload_lora_weights()), and compile the "
    "result"
)


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
    kept: dict[int, Any] = {id(t): t for _, t in weights_and_buffers(stand_in) if 0 in t.stride() or not t.dim()}
    return copy.deepcopy(stand_in, kept)


def tuners(stand_in: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with adapters, by the path of the layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in stand_in.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path, module


def ranks_of(stand_in: nn.Module) -> dict[str, int]:
    """The sum of the ranks of all adapters beside each layer."""
    return {path: sum(int(a.weight.shape[0]) for a in module.lora_A.values()) for path, module in tuners(stand_in)}


def deltas_of(stand_in: nn.Module) -> dict[str, list[Delta]]:
    """What the active adapters add to the weight of each layer; layers without an active adapter are left out."""
    found: dict[str, list[Delta]] = {}
    for path, module in tuners(stand_in):
        if module.disable_adapters:
            continue
        active = [name for name in module.active_adapters if name in module.lora_A]
        deltas = [Delta(module.lora_A[n].weight, module.lora_B[n].weight, float(module.scaling[n])) for n in active]
        if deltas:
            found[path] = [Delta(delta.a.detach(), delta.b.detach(), delta.scale) for delta in deltas]
    return found


def check_supported(stand_in: nn.Module) -> None:
    """Refuse adapters that are not a product of two matrices beside a linear.

    Raises:
        AdapterError: Names the layer, says what the adapter has and what to do instead.
    """
    from peft.tuners.lora import Linear

    for path, module in tuners(stand_in):
        if not isinstance(module, Linear):
            raise AdapterError(
                f"layer {path!r} would get a {type(module).__name__} adapter, and a quantized model takes LoRAs of "
                f"linears only. {FUSE}"
            )
        for name in module.lora_A:
            if module.use_dora.get(name):
                raise AdapterError(
                    f"adapter {name!r} is a DoRA, which also changes the norm of the weight of {path!r}. {FUSE}"
                )
            if module.lora_bias.get(name):
                raise AdapterError(f"adapter {name!r} has a bias for layer {path!r}, which a branch cannot add. {FUSE}")


_OTHER_KINDS = {
    "lora_magnitude_vector": "a DoRA", "dora_scale": "a DoRA", "lokr_": "a LoKr", "hada_": "a LoHa", "oft_": "an OFT",
    "lora_B.bias": "a LoRA with biases", "lora_embedding": "a LoRA of an embedding",
}  # fmt: skip


def check_state_dict(stand_in: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse adapters that do not fit the model, before anything is loaded.

    Args:
        stand_in: The stand-in.
        state_dict: Tensors by peft's names, without the name of the component: ``blocks.0.attn.to_q.lora_A.weight``.

    Raises:
        AdapterError: If a tensor is of another kind of adapter, belongs to a layer that is not in the model or is not
            a linear, or has another number of inputs or outputs. The message names the layer.
    """
    modules = dict(stand_in.named_modules())
    for key, value in state_dict.items():
        path = _path_of(key)
        kind = next((kind for mark, kind in _OTHER_KINDS.items() if mark in key), None)
        if kind is not None:
            raise AdapterError(f"{key} belongs to {kind}, and a quantized model takes LoRAs of linears only. {FUSE}")
        if path is None:
            continue
        base = getattr(modules.get(path), "base_layer", modules.get(path))
        if base is None:
            raise AdapterError(
                f"{key} is for layer {path!r}, which {type(stand_in).__name__} does not have. It was made for another "
                "model, or for other options of this model"
            )
        if not isinstance(base, nn.Linear):
            raise AdapterError(
                f"{key} is for layer {path!r}, a {type(base).__name__}, and a quantized model takes LoRAs of linears "
                f"only. {FUSE}"
            )
        axis, what, size = (1, "inputs", base.in_features) if ".lora_A." in key else (0, "outputs", base.out_features)
        if value.dim() != 2 or value.shape[axis] != size:
            wider = value.dim() == 2 and value.shape[axis] > size
            raise AdapterError(
                f"{key} has shape {list(value.shape)}, but layer {path!r} has {size} {what}"
                + (
                    ". An adapter that widens a layer, as Control-LoRAs do, changes the model: load it into the float "
                    "model, fuse it there, and compile the result"
                    if wider
                    else ". It was made for another model, or for other options of this model"
                )
            )


def widened(state_dict: Mapping[str, Tensor], prefix: str | None, stand_in: nn.Module) -> dict[str, Tensor]:
    """Add zeros to a LoRA of a model with fewer inputs, as of FLUX for FLUX Fill: it reads the first of them."""
    start, made, modules = "" if prefix is None else f"{prefix}.", dict(state_dict), dict(stand_in.named_modules())
    for key, value in state_dict.items():
        path = _path_of(key) if key.startswith(start) and ".lora_A." in key else None
        module = modules.get((path or "").removeprefix(start))
        base = getattr(module, "base_layer", module)
        if path and isinstance(base, nn.Linear) and value.dim() == 2 and value.shape[1] < base.in_features:
            made[key] = nn.functional.pad(value, (0, base.in_features - value.shape[1]))
    return made


def _path_of(key: str) -> str | None:
    for mark in (".lora_A.", ".lora_B."):
        path, found, _ = key.partition(mark)
        if found:
            return path
    return None
