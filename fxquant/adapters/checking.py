"""Which adapters a quantized model takes: linears beside which a product of two matrices is added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxquant.adapters.stand_in import tuners
from fxquant.errors import AdapterError

FUSE = (
    "Load it into the float model, fuse it there (pipe.fuse_lora(), then pipe.unload_lora_weights()), and compile the "
    "result"
)
_A, _B = ".lora_A.weight", ".lora_B.weight"
_OTHER_KINDS = {
    "lora_magnitude_vector": "a DoRA", "dora_scale": "a DoRA", "lokr_": "a LoKr", "hada_": "a LoHa", "oft_": "an OFT",
    "lora_B.bias": "a LoRA with biases", "diff_b": "an adapter with biases",
    "lora_embedding": "a LoRA of an embedding", "lora_controlnet": "a Control-LoRA",
}  # fmt: skip
_CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to initialize a LoRA that also take the initial product out of the weight of the layer."""


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


def check_metadata(metadata: Mapping[str, Any] | None) -> None:
    """Refuse options of an adapter that change the weights of the model, before anything is loaded.

    Raises:
        AdapterError: Names the option.
    """
    for key, value in (metadata or {}).items():
        if key.endswith("init_lora_weights") and str(value).startswith(_CHANGES_WEIGHTS):
            raise AdapterError(
                f"the adapter was initialized by {value!r}, which also changes the weights of the model. Convert it to "
                f"a plain LoRA with peft (path_initial_model_for_weight_conversion), or: {FUSE}"
            )


def check_state_dict(stand_in: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Refuse adapters that do not fit the model, before anything is loaded.

    Args:
        stand_in: The stand-in.
        state_dict: Tensors by peft's names, without the name of the component: ``blocks.0.attn.to_q.lora_A.weight``.

    Raises:
        AdapterError: If a tensor is of another kind of adapter or would be ignored, belongs to a layer that is not in
            the model or is not a linear, has another number of inputs or outputs or a rank of its own, or holds no
            floating-point values. The message names the layer.
    """
    modules = dict(stand_in.named_modules())
    for key, value in state_dict.items():
        kind = next((kind for mark, kind in _OTHER_KINDS.items() if mark in key), None)
        if kind is not None:
            raise AdapterError(f"{key} belongs to {kind}, and a quantized model takes LoRAs of linears only. {FUSE}")
        if key.endswith((_A, _B)):
            _check_factor(key, value, modules, type(stand_in).__name__)
            _check_ranks(key, state_dict)
        elif key.endswith(".alpha"):
            _check_alpha(key, value, state_dict)
        else:
            raise AdapterError(
                f"{key} is not a factor of a LoRA, whose names end in lora_A.weight and lora_B.weight, so it would "
                f"have no effect. Leave it out if the adapter is meant to work without it. {FUSE}"
            )


def _check_factor(key: str, value: Any, modules: Mapping[str, nn.Module], model: str) -> None:
    path = key.removesuffix(_A).removesuffix(_B)
    found = modules.get(path)
    base: Any = getattr(found, "base_layer", found)
    if base is None:
        raise AdapterError(
            f"{key} is for layer {path!r}, which {model} does not have. It was made for another model, or for other "
            "options of this model"
        )
    if not isinstance(base, nn.Linear):
        raise AdapterError(
            f"{key} is for layer {path!r}, a {type(base).__name__}, and a quantized model takes LoRAs of linears "
            f"only. {FUSE}"
        )
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
        kind = f"a {value.dtype} tensor on {value.device}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise AdapterError(f"{key} is {kind}, and not a tensor with floating-point values")
    axis, what, size = (1, "inputs", base.in_features) if key.endswith(_A) else (0, "outputs", base.out_features)
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


def _check_ranks(key: str, state_dict: Mapping[str, Any]) -> None:
    path = key.removesuffix(_A).removesuffix(_B)
    a, b = state_dict.get(f"{path}{_A}"), state_dict.get(f"{path}{_B}")
    if a is None or b is None:
        raise AdapterError(
            f"the adapter has {key}, but no {'lora_A' if a is None else 'lora_B'} for layer {path!r}. Its file is not "
            "complete"
        )
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() == b.dim() == 2:
        if a.shape[0] != b.shape[1]:
            raise AdapterError(f"the factors of layer {path!r} have ranks {a.shape[0]} and {b.shape[1]}")
        if not a.shape[0]:
            raise AdapterError(f"the adapter of layer {path!r} has rank 0, so it adds nothing. Leave the layer out")


def _check_alpha(key: str, value: Any, state_dict: Mapping[str, Any]) -> None:
    """Refuse an alpha that diffusers would leave out of account; one that equals the rank makes no difference."""
    factor = state_dict.get(f"{key.removesuffix('.alpha')}{_B}")
    rank = factor.shape[-1] if isinstance(factor, Tensor) else None
    alpha = float(value) if not isinstance(value, Tensor) or value.numel() == 1 else None
    if alpha is None or alpha != rank:
        raise AdapterError(
            f"{key} is {alpha} and the rank is {rank}, but diffusers takes no alphas from the tensors of an adapter. "
            f"Give them as network_alphas={{'transformer.{key}': ...}}"
        )


def widened(state_dict: Mapping[str, Tensor], prefix: str | None, stand_in: nn.Module) -> dict[str, Tensor]:
    """Add zeros to a LoRA of a model with fewer inputs, as of FLUX for FLUX Fill: it reads the first of them."""
    start, made, modules = "" if prefix is None else f"{prefix}.", dict(state_dict), dict(stand_in.named_modules())
    for key, value in state_dict.items():
        if not (key.startswith(start) and key.endswith(_A)):
            continue
        module = modules.get(key.removeprefix(start).removesuffix(_A))
        base = getattr(module, "base_layer", module)
        if isinstance(base, nn.Linear) and value.dim() == 2 and value.shape[1] < base.in_features:
            made[key] = nn.functional.pad(value, (0, base.in_features - value.shape[1]))
    return made
