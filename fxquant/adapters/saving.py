"""What a checkpoint holds of the adapters of a model: their tensors as they were loaded, and how they are weighed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from fxquant.adapters.adapters import Adapters
from fxquant.adapters.stand_in import tuners
from fxquant.errors import CheckpointError

_PARTS = ("lora_A", "lora_B")


def to_saved(adapters: Adapters) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors of all loaded adapters, and their description as JSON values; None if none is loaded.

    The tensors are in the coordinates of the original model. They are named by the number of their adapter and peft's
    name: ``0.blocks.0.attn.to_q.lora_A.weight``.
    """
    if adapters.branching is None:
        return None
    tensors, described = {}, []
    for number, name in enumerate(adapters.peft_config):
        own = {path: module for path, module in tuners(adapters.stand_in) if name in module.lora_A}
        for path, module in own.items():
            for part in _PARTS:
                tensors[f"{number}.{path}.{part}.weight"] = getattr(module, part)[name].weight.detach()
        alphas = {path: _alpha(module, name) for path, module in own.items()}
        scales = {path: float(module.scaling[name]) for path, module in own.items()}
        described.append({"name": name, "alphas": alphas, "scales": scales})
    disabled = any(module.disable_adapters for _, module in tuners(adapters.stand_in))
    return tensors, {"adapters": described, "active": adapters.active_adapters(), "disabled": disabled}


def _alpha(module: Any, name: str) -> float:
    """The alpha that gives this scale if it is divided by the rank; RSLoRAs divide by the root of the rank."""
    return float(module.lora_alpha[name]) * (math.sqrt(module.r[name]) if module.use_rslora.get(name) else 1.0)


def from_saved(adapters: Adapters, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    """Load the adapters of a checkpoint into a model; the arguments are what :func:`to_saved` returned.

    Raises:
        CheckpointError: If the tensors and the description do not fit each other.
        AdapterError: If an adapter does not fit the model.
    """
    described = saved["adapters"]
    check_saved(saved, tensors)
    adapters.restore(
        {
            own["name"]: {
                key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{number}.")
            }
            for number, own in enumerate(described)
        },
        saved,
    )


def check_saved(saved: Mapping[str, Any], names: Collection[str]) -> None:
    """Compare a description with the names of the tensors that it is about.

    Raises:
        CheckpointError: If they do not fit each other.
    """
    described = saved["adapters"]
    expected = {
        f"{n}.{path}.{part}.weight" for n, own in enumerate(described) for path in own["scales"] for part in _PARTS
    }
    if expected != set(names) or any(own["scales"].keys() != own["alphas"].keys() for own in described):
        other = min(expected ^ set(names), default="scales")
        raise CheckpointError(
            f"tensor {other!r} is in the file of the adapters or in their description, but not in both"
        )
