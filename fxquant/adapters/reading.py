"""Reads adapters as diffusers does: from a file, a folder, a name of the hub, or a dict of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from fxquant.errors import AdapterError
from fxquant.text import printable

_SOURCE = (
    *("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder", "weight_name"),
    "use_safetensors",
)


def read_adapter(
    source: str | Path | Mapping[str, Tensor], options: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of an adapter, and its metadata.

    Args:
        source: What the caller gave.
        options: Keyword arguments of the caller; those that say where to read are taken out.

    Raises:
        AdapterError: If its file is damaged or holds something else. Errors of diffusers about a missing file stay.
    """
    from diffusers.loaders.lora_base import _fetch_state_dict

    where = {name: options.pop(name, None) for name in _SOURCE}
    where["force_download"] = bool(where["force_download"])
    where["use_safetensors"] = True if where["use_safetensors"] is None else where["use_safetensors"]
    metadata = options.pop("metadata", None)
    if isinstance(source, Mapping):
        return dict(source), metadata
    try:
        state_dict, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict=source,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=False,
            metadata=metadata,
            **where,
        )
    except (SafetensorError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise AdapterError(
            f"the adapter {printable(str(source), 300)} cannot be read: {printable(str(error), 300)}; copy it again"
        ) from error
    return state_dict, metadata


def peft_keys(state_dict: Mapping[str, Tensor], prefix: str | None) -> dict[str, Tensor]:
    """The tensors for one component, by peft's names, as diffusers finds them.

    Raises:
        AdapterError: If names are of a format that diffusers does not convert.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    start = "" if prefix is None else f"{prefix}."
    own = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
    if own and "lora_A" not in next(iter(own)) and not any(".lokr_" in key for key in own):
        try:
            own = convert_unet_state_dict_to_peft(own)
        except (KeyError, ValueError, IndexError) as error:
            raise _unknown(own, f" ({error})") from error
        if not any(".lora_A." in key or ".lora_B." in key for key in own):
            raise _unknown(own)
    return own


def load_by_diffusers(stand_in: Any, state_dict: Mapping[str, Tensor], **options: Any) -> None:
    """Load an adapter into a stand-in.

    Raises:
        AdapterError: In place of errors from within diffusers or peft. The ValueErrors of diffusers stay.
    """
    try:
        stand_in.load_lora_adapter(state_dict, **options)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise AdapterError(
            f"diffusers and peft cannot load adapter {options.get('adapter_name')!r}: {error}. Compare its ranks, "
            "alphas and targets with its metadata, or load it without metadata"
        ) from error


def _unknown(keys: Mapping[str, Tensor], why: str = "") -> AdapterError:
    return AdapterError(
        f"the adapter's keys, such as {next(iter(keys))!r}, are of no format that diffusers converts{why}"
    )
