"""Lets tests whose subject is not tracing share the traces of equal models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fxquant.capture.calls import CallSpec
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.state import HOLLOW
from fxquant.capture.trace import Architecture
from fxquant.ir.stages import SPECS, Stage, verify
from fxquant.ir.tensors import weights_and_buffers

_TRACED: dict[str, CapturedGraph] = {}


@contextmanager
def traced_once() -> Iterator[None]:
    """Within this context, models of equal class, config and weights' shapes are traced once per kind of call.

    Each capture gets a copy of the traced graph. All else runs as ever: comparison with the model, passes, kernels.
    Only models of diffusers are shared, because only they have a config.
    """
    trace = Architecture.capture_spec

    def capture_spec(
        self: Architecture, call: CallSpec, device: torch.device, numbers: Mapping[str, float] | None = None
    ) -> CapturedGraph:
        if not hasattr(self.skeleton, "config"):
            return trace(self, call, device, numbers)
        key = repr((_identity(self.skeleton), self.timestep, call, call.fixed, device, numbers))
        if key not in _TRACED:
            found = trace(self, call, device, numbers)
            verify(found.module, SPECS[Stage.CAPTURED])  # Copies of the graph hold its proofs.
            _TRACED[key] = found
        return _TRACED[key].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Architecture, "capture_spec", capture_spec)
        yield


def _identity(model: nn.Module) -> tuple[object, ...]:
    modules = [(name, type(module).__qualname__) for name, module in model.named_modules()]
    shapes = [(name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in weights_and_buffers(model)]
    return type(model), model.config, modules, shapes, getattr(model, HOLLOW, False)
