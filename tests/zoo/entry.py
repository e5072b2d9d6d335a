"""One tiny model of the zoo, and random inputs of its calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn


class Maker:
    """Makes random inputs of one call."""

    def __init__(self, batch: int, size: int, prompt: int, seed: int, step: float | None, dtype: torch.dtype) -> None:
        self.batch, self.size, self.prompt, self.dtype = batch, size, prompt, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.step = step

    def normal(self, *shape: int) -> Tensor:
        """Normal random values in the dtype of the call, made in float32 so that all dtypes have the same values."""
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def latents(self, channels: int, *frames: int) -> Tensor:
        """``[batch, channels, *frames, size, size]``."""
        return self.normal(self.batch, channels, *frames, self.size, self.size)

    def tokens(self, channels: int) -> Tensor:
        """Packed latents ``[batch, size * size, channels]``."""
        return self.normal(self.batch, self.size**2, channels)

    def text(self, channels: int) -> Tensor:
        """A prompt ``[batch, prompt, channels]``."""
        return self.normal(self.batch, self.prompt, channels)

    def mask(self, dtype: torch.dtype = torch.int64) -> Tensor:
        """A mask of the whole prompt ``[batch, prompt]``."""
        return torch.ones(self.batch, self.prompt, dtype=dtype)

    def time(self) -> Tensor:
        """Timesteps 0 to 1000 ``[batch]``, int64: the same for all samples, or one per sample."""
        if self.step is not None:
            return torch.full((self.batch,), int(self.step))
        return torch.randint(0, 1000, (self.batch,), generator=self.generator)

    def unit_time(self) -> Tensor:
        """Timesteps 0 to 1 ``[batch]``."""
        return self.time().to(self.dtype) / 1000

    def grid(self, axes: int = 3) -> Tensor:
        """Positions of packed latents ``[size * size, axes]``."""
        rows, columns = torch.meshgrid(torch.arange(self.size), torch.arange(self.size), indexing="ij")
        columns_ = [rows.flatten(), columns.flatten()]
        zeros = [torch.zeros(self.size**2, dtype=torch.int64)]
        return torch.stack([*zeros, *columns_, *zeros * (axes - 3)], dim=1).to(self.dtype)

    def no_grid(self, axes: int = 3) -> Tensor:
        """Positions of a prompt ``[prompt, axes]``."""
        return torch.zeros(self.prompt, axes, dtype=self.dtype)

    def ones(self, *shape: int) -> Tensor:
        """Ones in the dtype of the call."""
        return torch.ones(shape, dtype=self.dtype)


@contextmanager
def _nan_in_new_memory() -> Iterator[None]:
    """Some classes leave parameters as memory that nobody wrote to; here it holds NaN, so they are found."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@dataclass(frozen=True, eq=False)
class Entry:
    """One tiny model.

    Attributes:
        name: Class name in diffusers.
        config: Arguments of its constructor.
        inputs: Makes the keyword arguments of a call.
        size: Height and width of the latents.
        prompt: Length of the prompt.
        timestep: Name of the timestep argument.
        other_size: Another height that the model accepts, or None.
        other_prompt: Another prompt length that the model accepts, or None.
        variant: Distinguishes entries of the same class.
        after: Function that is applied to the new model.
        make: Class of the model, if it is not from diffusers.
    """

    name: str
    config: dict[str, Any]
    inputs: Callable[[Maker], dict[str, Any]]
    size: int = 8
    prompt: int = 5
    timestep: str = "timestep"
    other_size: int | None = 4
    other_prompt: int | None = 7
    variant: str = ""
    after: Callable[[Any], Any] = field(default=lambda model: None)
    make: Callable[..., nn.Module] | None = None

    @property
    def id(self) -> str:
        """Name of the test."""
        return self.name.replace("Transformer", "").removesuffix("Model") + self.variant

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model, with weights with which every part affects the output."""
        torch.manual_seed(0)
        with warnings.catch_warnings(), _nan_in_new_memory():
            warnings.simplefilter("ignore")
            model = (self.make or getattr(diffusers, self.name))(**self.config).eval()
        for name, parameter in model.named_parameters():
            flat = parameter.detach().flatten()
            unset = bool(flat.isnan().all())
            if flat.numel() and (unset or bool((flat == flat[0]).all())):
                # Zeros of adaLN-Zero, ones of norms, zeros of biases.
                ones = name.endswith("weight") and parameter.dim() == 1 and not unset
                value = float(flat[0]) if ones else 0.0
                nn.init.normal_(parameter, mean=value, std=0.1 if parameter.dim() < 2 else 0.2)
        self.after(model)
        return model.to(dtype)

    def call(
        self,
        batch: int = 2,
        *,
        size: int | None = None,
        prompt: int | None = None,
        seed: int = 0,
        step: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        """Keyword arguments of a call."""
        return self.inputs(Maker(batch, size or self.size, prompt or self.prompt, seed, step, dtype))


def simple(channels: int, text: int) -> Callable[[Maker], dict[str, Any]]:
    return lambda make: {
        "hidden_states": make.latents(channels),
        "encoder_hidden_states": make.text(text),
        "timestep": make.time(),
    }
