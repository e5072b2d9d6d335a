"""``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of quantized models, with the options of diffusers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fxquant.errors import ConfigurationError, HubError
from fxquant.runtime.model import GraphModel
from fxquant.storage.checkpoint import load, save
from fxquant.storage.weights import SHARD_SIZE

HUB_OPTIONS = ("commit_message", "create_pr", "private", "token")
"""Options of an upload, except for the name of the repository."""


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    save_function: Callable[..., Any] | None = None,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = SHARD_SIZE,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Write a checkpoint, completely or not at all; an earlier checkpoint in the folder is replaced.

    Args:
        model: The quantized model.
        save_directory: The folder.
        is_main_process: Of several processes that call this, only the main one writes.
        save_function: Refused: the files are always safetensors.
        safe_serialization: False is refused, because it asks for a pickle.
        variant: As for :func:`fxquant.save`.
        max_shard_size: As for :func:`fxquant.save`.
        push_to_hub: Upload the folder afterwards.
        options: For the upload: ``repo_id``, by default the name of the folder, ``commit_message``, ``create_pr``,
            ``private`` and ``token``.

    Raises:
        ConfigurationError: If an option has a value that is refused, or is not known.
        CheckpointError: As for :func:`fxquant.save`.
        HubError: If the upload fails; the folder stays.
    """
    refuse_options(save_function, safe_serialization, push_to_hub, options)
    if not is_main_process:
        return
    save(model, save_directory, overwrite=True, variant=variant, max_shard_size=max_shard_size)
    if push_to_hub:
        repo_id = options.pop("repo_id", None) or Path(save_directory).resolve().name
        upload(Path(save_directory), repo_id, **options)


def refuse_options(
    save_function: Callable[..., Any] | None, safe_serialization: bool, push_to_hub: bool, options: Mapping[str, Any]
) -> None:
    """Refuse options of ``save_pretrained`` that a quantized model cannot have.

    Raises:
        ConfigurationError: Names the option.
    """
    known = ("repo_id", *HUB_OPTIONS) if push_to_hub else ()
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        raise ConfigurationError(f"save_pretrained of a quantized model has no option {unknown!r}; leave it out")
    if not safe_serialization or save_function is not None:
        raise ConfigurationError(
            "a quantized model is written as safetensors only, because a pickle can run code when read; leave out "
            + ("save_function" if safe_serialization else "safe_serialization=False")
        )


def push(
    model: nn.Module,
    repo_id: str,
    *,
    variant: str | None = None,
    max_shard_size: int | str = SHARD_SIZE,
    subfolder: str | None = None,
    safe_serialization: bool = True,
    **options: Any,
) -> Any:
    """Write a checkpoint to a temporary folder and upload it.

    Args:
        model: The quantized model.
        repo_id: Name of the repository, ``owner/name``; it is created if there is none.
        variant: As for :func:`fxquant.save`.
        max_shard_size: As for :func:`fxquant.save`.
        subfolder: Folder in the repository.
        safe_serialization: False is refused.
        options: ``commit_message``, ``create_pr``, ``private`` and ``token``.

    Returns:
        What ``huggingface_hub.upload_folder`` returns: the address of the commit.

    Raises:
        ConfigurationError: If an option has a value that is refused, or is not known.
        HubError: If the upload fails.
    """
    unknown = next((name for name in options if name not in HUB_OPTIONS), None)
    if unknown is not None:
        raise ConfigurationError(f"push_to_hub has no option {unknown!r}; it has {', '.join(HUB_OPTIONS)}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        save_pretrained(
            model, folder, safe_serialization=safe_serialization, variant=variant, max_shard_size=max_shard_size
        )
        return upload(folder, repo_id, subfolder=subfolder, **options)


def upload(folder: Path, repo_id: str, *, private: bool | None = None, **options: Any) -> Any:
    """Upload a folder as diffusers does.

    Raises:
        HubError: If that fails.
    """
    from diffusers.utils import hub_utils

    options.setdefault("commit_message", "Upload a model quantized by fxquant")
    try:
        repo_id = hub_utils.create_repo(repo_id, exist_ok=True, private=private, token=options.get("token")).repo_id
        return hub_utils.PushToHubMixin()._upload_folder(folder, repo_id, **options)
    except Exception as error:  # Which classes errors of HTTP have depends on the version of huggingface_hub.
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise HubError(
            f"{repo_id} could not be written to the Hugging Face Hub: {first}. Check the network, the name and the "
            "token (hf auth login); fxquant.save writes the same files to a folder, to be uploaded later"
        ) from error


def from_pretrained(folder: str | Path, **options: Any) -> GraphModel:
    """Read a checkpoint with the options of ``from_pretrained``, as :func:`fxquant.load` does.

    Pipelines pass options that have no meaning for a quantized model; these are left out if they are None or False.
    """
    ignored = ("max_memory", "offload_folder", "offload_state_dict", "use_flashpack", "disable_mmap")
    for name in ignored:
        if not options.get(name):
            options.pop(name, None)
    return load(folder, **options)
