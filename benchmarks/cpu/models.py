"""What is measured: transformers at the published widths with random weights, and calls of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Call = dict[str, Any]

_TIMESTEPS = range(950, 0, -100)


@dataclass(frozen=True)
class Task:
    """A model and its calls.

    Attributes:
        name: For the table.
        make: Makes the float model, each time the same.
        outline: Makes it with whatever weights, to see what it would do.
        calls: Keyword arguments to calibrate with, all of the same shapes.
        timed: Those of the call that is timed.
        tests: Of calls that calibration has not seen, for the trained model; otherwise none.
    """

    name: str
    make: Callable[[], nn.Module]
    outline: Callable[[], nn.Module]
    calls: list[Call]
    timed: Call
    tests: tuple[Call, ...] = ()

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The float model in evaluation mode."""
        return self.make().to(dtype).eval()

    def calibrate(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        """Run a model on all calibration calls."""
        for call in self.calls:
            model(**cast(call, dtype))


def cast(call: Call, dtype: torch.dtype) -> Call:
    """The call with its floating-point tensors in this dtype."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in call.items()
    }


@dataclass(frozen=True)
class Shape:
    """A kind of model.

    Attributes:
        cls: Class in diffusers.
        config: Arguments of its constructor, without the number of layers.
        layers: How many it has as published.
        inputs: Makes the inputs beside the latents and the timestep.
        latents: Channels and size of the latents.
        said: What it is, for the table.
    """

    cls: str
    config: dict[str, Any]
    layers: int
    inputs: Callable[[torch.Generator], Call]
    latents: tuple[int, int]
    said: str

    def make(self, layers: int) -> nn.Module:
        """The model; parameters that begin as zeros get random values, so that all of it does something."""
        torch.manual_seed(0)
        model = self.outline(layers)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return model

    def outline(self, layers: int) -> nn.Module:
        """The model as its constructor leaves it."""
        model: nn.Module = getattr(diffusers, self.cls)(**self.config, num_layers=layers)
        return model.eval()

    def calls(self, batch: int) -> list[Call]:
        """One call a timestep."""
        return [self._call(batch, step) for step in _TIMESTEPS]

    def _call(self, batch: int, step: int) -> Call:
        generator = torch.Generator().manual_seed(step)
        channels, size = self.latents
        return {
            "hidden_states": torch.randn(batch, channels, size, size, generator=generator),
            "timestep": torch.full((batch,), step),
            **{name: _for_batch(value, batch) for name, value in self.inputs(generator).items()},
            "return_dict": False,
        }


def _for_batch(value: Any, batch: int) -> Any:
    return value.repeat(batch // 2, *(1 for _ in value.shape[1:])) if isinstance(value, Tensor) else value


def _labels(_: torch.Generator) -> Call:
    return {"class_labels": torch.tensor([1, 1000])}  # With a condition and without.


def _caption(generator: torch.Generator) -> Call:
    return {
        "encoder_hidden_states": torch.randn(2, 300, 4096, generator=generator),
        "encoder_attention_mask": torch.ones(2, 300, dtype=torch.int64),
    }


def _joint(generator: torch.Generator) -> Call:
    return {
        "encoder_hidden_states": torch.randn(2, 333, 4096, generator=generator),  # 77 of CLIP, 256 of T5.
        "pooled_projections": torch.randn(2, 2048, generator=generator),
    }


_DIT = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}  # fmt: skip
_PIXART = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "patch_size": 2,
    "sample_size": 64, "cross_attention_dim": 1152, "caption_channels": 4096, "interpolation_scale": 1,
    "use_additional_conditions": False,
}  # fmt: skip
_SD3 = {
    "num_attention_heads": 24, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "patch_size": 2,
    "sample_size": 128, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}  # fmt: skip
_TINY = _DIT | {"num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8}

SHAPES = {
    "dit": Shape("DiTTransformer2DModel", _DIT | {"sample_size": 32}, 28, _labels, (4, 32), "DiT-XL/2, 256 tokens"),
    "dit-1024": Shape(
        "DiTTransformer2DModel", _DIT | {"sample_size": 64}, 28, _labels, (4, 64), "DiT-XL/2, 1024 tokens"
    ),
    "pixart-sigma": Shape(
        "PixArtTransformer2DModel", _PIXART, 28, _caption, (4, 64), "PixArt-Sigma-XL, 1024 tokens and 300 of text"
    ),
    "sd3-medium": Shape("SD3Transformer2DModel", _SD3, 24, _joint, (16, 64), "SD3-medium, 1024 tokens and 333 of text"),
    "tiny": Shape("DiTTransformer2DModel", _TINY, 2, _labels, (4, 8), "a small DiT, to try the benchmark out"),
}
"""Kinds of models by name, as diffusers' published configurations have them."""


def task_of(text: str, batch: int = 2) -> Task:
    """The task of a text such as ``dit:4``: a kind of model, and how many of its layers; all of them if left out.

    Raises:
        ValueError: If there is no such model, or the batch is not even.
    """
    if text == "digits":
        from benchmarks.cpu.digits import digits_task

        return digits_task()
    name, _, count = text.partition(":")
    if name not in SHAPES or (count and not count.isdecimal()):
        raise ValueError(f"{text!r} is no model; write a name and a number of layers, of {', '.join(SHAPES)}")
    if batch < 2 or batch % 2:
        raise ValueError(f"a batch of {batch} is not possible: samples come in pairs, as with guidance")
    shape = SHAPES[name]
    layers = int(count or shape.layers)
    calls = shape.calls(batch)
    said = f"{shape.said}, {layers} of {shape.layers} layers, batch {batch}"
    return Task(said, lambda: shape.make(layers), lambda: shape.outline(layers), calls, calls[len(calls) // 2])


def linear_shapes(task: Task) -> dict[tuple[int, int, int], int]:
    """Rows, inputs and outputs of the linear layers that a call runs, with how often; nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: dict[tuple[int, int, int], int] = {}

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        shape = (output.numel() // layer.out_features, layer.in_features, layer.out_features)
        found[shape] = found.get(shape, 0) + 1

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        model = task.outline()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(count)
        model(**task.timed)
    return found
