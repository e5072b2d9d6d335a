"""LoRAs of random numbers, and the float models that they are compared with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from fxquant.pipeline.recipes import Recipe, make_recipe

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "norm1.linear")


def lora(
    model: nn.Module,
    rank: int = 4,
    seed: int = 0,
    targets: Sequence[str] | None = TARGETS,
    size: float = 0.1,
    prefix: str = "transformer.",
) -> dict[str, Tensor]:
    """A LoRA beside the linears of a model whose paths end in a target, or beside all; by peft's names, float32."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and (targets is None or path.endswith(tuple(targets))):
            made[f"{prefix}{path}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator) * size
            made[f"{prefix}{path}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) * size
    assert made
    return made


def with_methods(model: nn.Module) -> Any:
    """A copy of a float model that takes LoRAs as diffusers' models do; the class of some has no methods for it."""
    made = copy.deepcopy(model)
    if not isinstance(made, PeftAdapterMixin):
        made.__class__ = type(type(made).__name__, (PeftAdapterMixin, type(made)), {})
    return made


def composed(model: nn.Module, state_dict: dict[str, Tensor], **options: Any) -> Any:
    """A copy of a float model with a LoRA."""
    made = with_methods(model)
    made.load_lora_adapter(dict(state_dict), adapter_name="a", **options)
    return made


def without_rounding(name: str) -> Recipe:
    """A recipe that balances and shifts as another one does, and quantizes nothing."""
    recipe = make_recipe(name, "default")
    kept = [step for step in recipe.convert if not step.name.startswith("quantize")]
    assert len(kept) < len(recipe.convert)
    return Recipe(recipe.prepare, tuple(kept))


def relative(left: Tensor, right: Tensor) -> float:
    """The largest difference, by the largest element of the second."""
    return float((left - right).abs().max() / right.abs().max())
