"""The methods by which pipelines save and load their components, for quantized models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fxquant.errors import ConfigurationError
from fxquant.runtime.drop_in import refusal


class Pretrained(nn.Module):
    """Hands ``save_pretrained``, ``push_to_hub`` and ``from_pretrained`` on to :mod:`fxquant.storage.pretrained`."""

    architecture: Any

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write a checkpoint. Pipelines call this; see :func:`fxquant.storage.pretrained.save_pretrained`."""
        from fxquant.storage import pretrained

        options |= {"variant": variant, "max_shard_size": max_shard_size, "push_to_hub": push_to_hub}
        pretrained.save_pretrained(self, save_directory, is_main_process, save_function, safe_serialization, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload a checkpoint to the Hugging Face Hub; see :func:`fxquant.storage.pretrained.push`."""
        from fxquant.storage import pretrained

        return pretrained.push(self, repo_id, **options)

    def register_to_config(self, **values: Any) -> None:
        """Record where ``from_pretrained`` of diffusers read the model. Other entries are refused.

        Raises:
            DropInError: If a value would change what the config says about the model.
        """
        if not values or not all(name.startswith("_") for name in values):
            raise refusal("register_to_config")
        kept = {name: str(value) for name, value in values.items() if name == "_name_or_path"}
        self.architecture.skeleton.register_to_config(**kept)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Any:
        """Read a checkpoint. Pipelines call this; see :func:`fxquant.load`, which has the same options."""
        from fxquant.storage import pretrained

        return pretrained.from_pretrained(folder, **options)


def refuse_part(parallel: Any) -> None:
    """Refuse what needs the whole tensors of a model of which this rank holds a part.

    Args:
        parallel: The ranks of the model, or None for a whole model.

    Raises:
        ConfigurationError: If there are ranks.
    """
    if parallel is not None:
        raise ConfigurationError(
            "this model is tensor-parallel, and this rank holds a part of its tensors. Save, convert or change the "
            "model that fxquant.parallelize was given, or load its checkpoint again"
        )
