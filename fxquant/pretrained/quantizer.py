"""The quantizer that ``from_pretrained`` of diffusers calls: it reads quantized models, and quantizes float ones.

``from_pretrained`` returns the object that it made, so that object becomes the quantized model
(:meth:`~fxquant.runtime.pretrained.Pretrained.take_place_of`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from fxquant.disk.files import dtype_of_name
from fxquant.errors import CheckpointError, HubError
from fxquant.planning.plan import PLAN_FILE
from fxquant.pretrained.config import FxQuantConfig
from fxquant.pretrained.quantize import quantize_at_first_call, quantize_now, quantize_parts
from fxquant.runtime.devices import check_dtype
from fxquant.runtime.model import GraphModel
from fxquant.runtime.parts import has_entries, quantized_parts
from fxquant.storage.aot.model import CONFIG_FILE
from fxquant.storage.checkpoint import load
from fxquant.storage.load_options import device_of_map
from fxquant.storage.part_names import PARTS, checked_names
from fxquant.storage.parts import read_parts
from fxquant.storage.weights import variant_of


class FxQuantizer(DiffusersQuantizer):
    """Reads checkpoints of fxquant, and carries out an :class:`~fxquant.pretrained.config.FxQuantConfig`."""

    quantization_config: FxQuantConfig
    use_keep_in_fp32_modules = True
    """As without a quantizer, layers that a class keeps in float32 are read in float32."""

    def __init__(self, quantization_config: FxQuantConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._folder: Path | None = None
        self._device = torch.device("cpu")
        self._dtype: torch.dtype | None = None
        self._model: nn.Module | None = None
        if not self.pre_quantized:
            quantization_config.check_complete()

    def validate_environment(self, *_: Any, **options: Any) -> None:
        """Refuse options that a quantized model cannot have, before its files are looked for.

        Raises:
            ConfigurationError: If it is to be spread over devices, or in a dtype in which no quantized model computes.
        """
        device = device_of_map(options.get("device_map"))
        if device is not None:
            self._device = device
        dtype = options.get("torch_dtype")
        if self.pre_quantized and dtype is not None:
            check_dtype(dtype)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype of the checkpoint, if the caller named none."""
        held = (self.quantization_config.recorded or {}).get("dtype")
        self._dtype = dtype_of_name(held) if torch_dtype is None and held is not None else torch_dtype
        return self._dtype

    def update_device_map(self, device_map: Any) -> Any:
        """None for a checkpoint: its tensors go to the device when it is read."""
        return None if self.pre_quantized else device_map

    @property
    def _parts(self) -> list[str] | None:
        """The names of the quantized parts, if the checkpoint is of a model with several entries."""
        recorded = self.quantization_config.recorded or {}
        return checked_names(recorded[PARTS], CONFIG_FILE) if PARTS in recorded else None

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Take note of the files that diffusers found; of a checkpoint it is to read only what stayed float."""
        if not self.pre_quantized:
            return loaded_keys
        parts = self._parts
        self._folder = _folder_of(checkpoint_files, parts)
        return [] if parts is None else loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Nothing for a checkpoint, except for what stayed float beside quantized parts."""
        return {} if self.pre_quantized and self._parts is None else state_dict

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """No weight of a checkpoint is missing, and none of a quantized part."""
        parts = self._parts
        if self.pre_quantized and parts is not None:
            return [key for key in missing_keys if key.partition(".")[0] not in parts]
        return [] if self.pre_quantized else missing_keys

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_: Any
    ) -> bool:
        """False: float weights are read as they are."""
        return False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        """Nothing: the weights are read first."""

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Read the checkpoint in place of the model, or quantize the model."""
        self._model = model
        parts = self._parts
        if parts is not None:
            assert self._folder is not None
            read_parts(model, self._folder, parts, self._device, dtype=self._dtype)
        elif self.pre_quantized:
            assert self._folder is not None
            variant = variant_of(path.name for path in self._folder.iterdir())
            read = load(self._folder, device=self._device, model=_own_class(model), variant=variant, dtype=self._dtype)
            read.take_place_of(model)
        elif has_entries(model):
            quantize_parts(model, self.quantization_config)
        elif self.quantization_config.calibrate is None and self.quantization_config.recipe is not None:
            quantize_at_first_call(model, self.quantization_config)
        else:
            quantize_now(model, self.quantization_config)

    @property
    def is_serializable(self) -> bool:
        """Whether the model is quantized; one that waits for its first call cannot be written."""
        return isinstance(self._model, GraphModel) or bool(quantized_parts(self._model))

    @property
    def is_trainable(self) -> bool:
        """False: a quantized model only computes its output."""
        return False


def _own_class(model: nn.Module) -> type[nn.Module] | None:
    """The class of a model from outside of diffusers, which a checkpoint does not say how to import."""
    return None if type(model).__module__.startswith("diffusers.") else type(model)


def _folder_of(files: Sequence[str], parts: Sequence[str] | None) -> Path:
    """The folder of a checkpoint, from the paths of its weights.

    Of a repository, diffusers downloads only the weights and the config of a model. The rest follows here.

    Args:
        files: The paths.
        parts: The names of quantized parts, each of which has a folder in it; None for a checkpoint of a whole model.

    Raises:
        CheckpointError: If the rest of the checkpoint is not there.
    """
    folder = Path(files[0]).parent
    plans = [folder / name / PLAN_FILE for name in ([""] if parts is None else parts)]
    if not all(plan.is_file() for plan in plans):
        _download_rest(folder)
    missing = next((plan for plan in plans if not plan.is_file()), None)
    if missing is not None:
        raise CheckpointError(
            f"{missing} is missing: only the weights were copied or downloaded. Copy the whole folder; from "
            "the hub, download it with huggingface_hub.snapshot_download and give the folder to from_pretrained"
        )
    return folder


def _download_rest(folder: Path) -> None:
    """Download the files of a checkpoint that are not in the cache of the hub, if the folder is in that cache.

    The cache has the layout ``models--OWNER--NAME/snapshots/COMMIT/SUBFOLDER``.
    """
    import huggingface_hub

    found = next((path for path in (folder, *folder.parents) if path.parent.name == "snapshots"), None)
    if found is None or not found.parent.parent.name.startswith("models--"):
        return
    repository = found.parent.parent
    inner = folder.relative_to(found).as_posix()
    pattern = "*" if inner == "." else f"{inner}/*"
    name = repository.name.removeprefix("models--").replace("--", "/")
    try:
        huggingface_hub.snapshot_download(
            name, revision=found.name, cache_dir=repository.parent, allow_patterns=[pattern]
        )
    except Exception as error:  # Which classes errors of HTTP have depends on the version of huggingface_hub.
        raise HubError(
            f"the rest of the checkpoint {name} could not be downloaded: {error}. Check the network and try again"
        ) from error
