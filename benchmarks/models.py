"""The measured models: transformers of the published widths with random weights, and calls of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.shapes import SHAPES, Call, Shape


@dataclass(frozen=True)
class Task:
    """A model and its calls.

    Attributes:
        name: Name in the table.
        make: Makes the float model, with the same weights each time.
        outline: Makes the float model with arbitrary weights, to find its shapes.
        calls: Keyword arguments of the calibration calls, all of the same shapes.
        timed: Keyword arguments of the timed call.
        tests: Keyword arguments of calls that calibration has not seen, for the trained model; otherwise empty.
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
    """The call with its floating-point tensors converted to `dtype`."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in call.items()
    }


def task_of(text: str, batch: int = 2) -> Task:
    """The task of a text such as ``dit:4`` or ``flux:4+8``.

    The text is a kind of model and its number of layers for each kind of block; without numbers it has all layers.

    Raises:
        ValueError: If there is no such model, or it does not accept the batch size.
    """
    if text == "digits":
        from benchmarks.digits import digits_task

        return digits_task()
    shape, layers = shape_of(text)
    shape.check(batch)
    calls = shape.calls(batch)
    said = f"{shape.said}, {_sum(layers)} of {_sum(shape.layers)} layers, batch {batch}"
    return Task(said, lambda: shape.make(layers), lambda: shape.outline(layers), calls, calls[len(calls) // 2])


def shape_of(text: str) -> tuple[Shape, tuple[int, ...]]:
    """The kind of model of a text as for :func:`task_of`, and the number of layers of each kind of block.

    Raises:
        ValueError: If there is no such model.
    """
    name, _, count = text.partition(":")
    numbers = count.split("+") if count else []
    known = name in SHAPES and all(number.isdecimal() for number in numbers)
    if not known or (numbers and len(numbers) != len(SHAPES[name].layers)):
        raise ValueError(f"{text!r} is not a model; write a name and a number of layers, of {', '.join(SHAPES)}")
    return SHAPES[name], tuple(map(int, numbers)) or SHAPES[name].layers


def models_of(text: str, batches: str) -> tuple[tuple[str, int], ...]:
    """Names and batch sizes of a text such as ``dit,flux:4+8@1``; `batches` applies to models without a batch size.

    Raises:
        ValueError: If there is no such model, or it does not accept the batch size.
    """
    found = []
    for part in text.split(","):
        name, _, batch = part.partition("@")
        for number in [batch] if batch else batches.split(","):
            shape_of(name)[0].check(int(number))
            found.append((name, int(number)))
    return tuple(found)


def _sum(layers: tuple[int, ...]) -> str:
    return "+".join(map(str, layers))


def linear_shapes(task: Task) -> dict[tuple[int, int, int], int]:
    """Rows, inputs and outputs of the linear layers that a call runs, with their counts; nothing is computed."""
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
