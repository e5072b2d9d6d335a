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
from fxquant.errors import VerificationError
from fxquant.ir.stages import SPECS, Stage, verify
from fxquant.ir.tensors import weights_and_buffers

_TRACED: dict[str, tuple[CapturedGraph, list[type]]] = {}
"""Traced graphs. The classes of their modules are held too, so that no other class can get the number of one."""

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


@contextmanager
def traced_once() -> Iterator[None]:
    """Within this context, models of equal class, options and weights' shapes are traced once per kind of call.

    Each capture gets a copy of the traced graph. All else runs as ever: comparison with the model, passes, kernels.
    The options are the config of a model of diffusers, or else the attributes of all modules. A model with attributes
    other than plain values is traced each time.
    """
    trace = Architecture.capture_spec

    def capture_spec(
        self: Architecture, call: CallSpec, device: torch.device, numbers: Mapping[str, float] | None = None
    ) -> CapturedGraph:
        identity = _identity(self.skeleton)
        if identity is None:
            return trace(self, call, device, numbers)
        key = repr((identity, self.timestep, call, call.fixed, device, numbers))
        if key not in _TRACED:
            found = trace(self, call, device, numbers)
            try:
                verify(found.module, SPECS[Stage.CAPTURED])  # Copies of the graph hold its proofs.
            except VerificationError:  # The pipeline raises it too.
                return found
            _TRACED[key] = found, [type(module) for module in self.skeleton.modules()]
        return _TRACED[key][0].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Architecture, "capture_spec", capture_spec)
        yield


def _identity(model: nn.Module) -> object:
    """What a trace of a model depends on; None if that is not known."""
    options = getattr(model, "config", None)
    if options is None:
        options = [_attributes(module) for module in model.modules()]
        if None in options:
            return None
    modules = [(name, id(type(module))) for name, module in model.named_modules()]
    shapes = [(name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in weights_and_buffers(model)]
    return modules, options, shapes, getattr(model, HOLLOW, False)


def _attributes(module: nn.Module) -> dict[str, object] | None:
    """The attributes of a module besides those that all modules have; None if some are not plain, or it has hooks."""
    usual = vars(nn.Module())
    own = {name: value for name, value in vars(module).items() if name not in usual}
    plain = (item for value in own.values() for item in (value if isinstance(value, tuple) else (value,)))
    hooked = any(vars(module)[name] for name in usual if name.endswith("hooks") and isinstance(usual[name], dict))
    return None if hooked or not all(isinstance(item, _PLAIN) for item in plain) else own
