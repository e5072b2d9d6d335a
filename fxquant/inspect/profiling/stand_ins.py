"""Stand-ins for a profile: inputs for a recorded call, and weights for the float model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.capture.calls import BATCH, CallSpec, TensorSpec
from fxquant.errors import ConfigurationError
from fxquant.ir.tensors import read_tensors, set_tensor
from fxquant.planning.plan import Plan

USUAL_BATCH = 2
"""Samples per call: with guidance, one image passes through the model with and without its condition."""


def batch_of(call: CallSpec, batch: int | None) -> int:
    """How many samples a call of this kind has.

    Raises:
        ConfigurationError: If ``batch`` is less than one, or the model's graph serves only another batch size.
    """
    if batch is not None and batch < 1:
        raise ConfigurationError(f"a batch of {batch} is too small; at least one sample is needed")
    if call.batched:
        return USUAL_BATCH if batch is None else batch
    sizes = [spec.shape[0] for _, spec in call.tensors if spec.shape]
    fixed = next((size for size in sizes if size != BATCH), 1)
    assert isinstance(fixed, int)
    if batch not in (None, fixed):
        raise ConfigurationError(
            f"this model's graph serves only a batch of {fixed} ({call.fixed or 'no input has a batch axis'}); "
            "leave the batch out"
        )
    return fixed


def make_inputs(call: CallSpec, plan: Plan, batch: int, device: torch.device) -> list[Tensor]:
    """The tensor inputs of a call of this kind: noise, a calibrated timestep, masks that hide nothing.

    Times do not depend on the values of floats. Integers are table indices or masks. The value 0, or 1 in an input with
    "mask" in its name, is always in range.
    """
    generator = torch.Generator().manual_seed(0)
    steps = sorted(plan.timesteps)

    def make(name: str, spec: TensorSpec) -> Tensor:
        shape = spec.concrete(batch)
        if spec.values is not None:
            return torch.tensor(spec.values, dtype=spec.dtype).reshape(shape)
        if spec.number:
            return torch.ones((), dtype=spec.dtype)
        if name == plan.timestep:
            return torch.full(shape, steps[len(steps) // 2] if steps else 500.0).to(spec.dtype)
        if spec.dtype.is_floating_point or spec.dtype.is_complex:
            return torch.randn(shape, generator=generator).to(spec.dtype)
        return torch.full(shape, int("mask" in name or spec.dtype == torch.bool)).to(spec.dtype)

    return [make(name, spec).to("cpu" if spec.number else device) for name, spec in call.tensors]


def fill(module: fx.GraphModule, device: torch.device) -> None:
    """Give a graph without weights random ones, scaled so that values keep a similar magnitude."""
    generator = torch.Generator(device).manual_seed(0)
    for target, tensor in read_tensors(module).items():
        if isinstance(tensor, FakeTensor):
            set_tensor(module, target, _random(tensor, generator))


def _random(tensor: Tensor, generator: torch.Generator) -> Tensor:
    device: Any = generator.device
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    width = tensor[0].numel() if tensor.dim() > 1 else 1
    values = torch.randn(tensor.shape, dtype=torch.float32, device=device, generator=generator)
    return values.mul_(width**-0.5).to(tensor.dtype)
