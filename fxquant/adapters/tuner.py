"""A submodule by which diffusers pipelines find the adapters of a quantized model.

Pipelines look for layers of peft among the modules of a model, to list active adapters or to move them. The layers of
a graph are no modules, so modules without tensors answer for them: one for all, and one by the path of each factor, by
which peft finds the tensors of an adapter in a state dict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxquant.adapters.stand_in import tuners
from fxquant.errors import AdapterError

if TYPE_CHECKING:
    from fxquant.adapters.adapters import Adapters

_FACTORS = ("lora_A", "lora_B")


def tuner_of(adapters: Adapters) -> nn.Module:
    """Return the module; it holds no tensor and never runs."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    class LoraOfGraphs(nn.Module, BaseTunerLayer):
        """Answers for the branches of all graphs."""

        @property
        def active_adapters(self) -> list[str]:
            """Names of the active adapters."""
            return adapters.active_adapters()

        @property
        def disable_adapters(self) -> bool:
            """Whether the adapters are switched off."""
            return adapters.serving is None

        @property
        def r(self) -> Mapping[str, Any]:
            """One entry for each adapter; diffusers counts them to name the next one."""
            return adapters.peft_config

        @property
        def lora_A(self) -> _Movable:
            """The factors of each adapter, as far as pipelines move them."""
            return _Movable(adapters)

        lora_B = lora_A

        def merge(self, *_: Any, **__: Any) -> None:
            """Refuse: see :func:`refuse_fusing`."""
            refuse_fusing()

        def unmerge(self) -> None:
            """Refuse: see :func:`refuse_fusing`."""
            refuse_fusing()

        def scale_layer(self, scale: float) -> None:
            """Refuse: the graphs multiply their branches themselves."""
            raise AdapterError(
                "the layers of a quantized model are not scaled one by one; use set_adapters with weights"
            )

        unscale_layer = scale_layer

    class LoraOfFactor(LoraOfGraphs):
        """Answers for the branches beside one layer, under the name of one of their factors."""

        def named_children(self) -> Iterator[tuple[str, nn.Module]]:
            """One for each adapter: ``blocks.0.to_q.lora_A.style`` begins the names of its tensors."""
            yield from ((name, self) for name in adapters.peft_config)

        def __getattr__(self, name: str) -> Any:
            return self if name in adapters.peft_config else super().__getattr__(name)

    class LoraOfModel(LoraOfGraphs):
        """Answers for all branches, and lists the factors among its modules, as a float model does."""

        def named_modules(
            self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
        ) -> Iterator[tuple[str, nn.Module]]:
            """This module, then one for each factor, by its path in the model."""
            yield from super().named_modules(memo, prefix, remove_duplicate)
            root = prefix.rpartition(".")[0]
            yield from ((f"{root}.{path}".removeprefix("."), factor) for path, factor in factors.items())

    factors = {f"{path}.{part}": LoraOfFactor() for path, _ in tuners(adapters.stand_in) for part in _FACTORS}
    return LoraOfModel()


def refuse_fusing() -> None:
    """Refuse to fuse or unfuse a LoRA of a quantized model.

    Raises:
        AdapterError: Always.
    """
    raise AdapterError(
        "a LoRA cannot be fused into the codes of a quantized model or taken out of them: rounding would lose most of "
        "it. It runs beside them at little cost. To fuse it, load it into the float model, call pipe.fuse_lora() and "
        "pipe.unload_lora_weights() there, and compile the result"
    )


class _Movable:
    """The adapters by name; each accepts a move to the device where the model is, and refuses others."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters

    def __contains__(self, name: object) -> bool:
        return name in self._adapters.peft_config

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters.peft_config)

    def __getitem__(self, name: str) -> _Movable:
        return self

    def to(self, device: Any) -> _Movable:
        """Check the device.

        Raises:
            AdapterError: If it is not the device of the model.
        """
        wanted = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
        if wanted.type != self._adapters.device.type:
            raise AdapterError(
                f"the LoRAs of a quantized model move with the model, which is on {self._adapters.device}, and not to "
                f"{wanted} by themselves. To free memory, use pipe.delete_adapters(name)"
            )
        return self
