"""Lets tests share traces: tracing takes most of the time of a conversion, of a save and of a load of a small model.

Passes, comparisons, verification and kernels run again in each test, on a copy of the traced graph. Tests of tracing
itself do not use this.
"""

from __future__ import annotations

import types
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.capture import known_values
from fxquant.capture.calls import CallSpec
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.known_values import Tracing
from fxquant.capture.state import OWN
from fxquant.capture.threads import tracing_alone
from fxquant.capture.trace import Architecture
from fxquant.errors import VerificationError
from fxquant.ir.stages import SPECS, Stage, verify
from fxquant.ir.tensors import weights_and_buffers

_TRACED: dict[Hashable, tuple[CapturedGraph, int]] = {}
"""Graphs, each with the number of layers that its trace ran."""

_TRACE = Architecture.capture_spec
_DEEP = 3  # Levels of objects in attributes that a key describes.


def shared(self: Architecture, call: CallSpec, device: torch.device, numbers: Any = None) -> CapturedGraph:
    """In place of ``Architecture.capture_spec``: trace once, and copy the graph for further calls of an equal model."""
    model = _described(self.skeleton)
    if model is None:
        return _TRACE(self, call, device, numbers)
    key = (model, repr(call), str(device), repr(numbers))
    key += (torch.get_default_dtype(), torch.export.export, Architecture._export, Architecture._finish)
    if key not in _TRACED:
        with tracing_alone(), _counted() as products:
            graph = _TRACE(self, call, device, numbers)
        with suppress(VerificationError):  # Pipelines verify each copy, and raise it then.
            verify(graph.module, SPECS[Stage.CAPTURED])  # The copies share the proofs.
        _TRACED[key] = graph, max(products, default=0)
    graph, layers = _TRACED[key]
    most = known_values._most_products.get()
    return graph.copy() if most is None or layers <= most else _TRACE(self, call, device, numbers)  # Which refuses it.


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The running numbers of layers that traces come to within this context; see ``known_values.at_most``."""
    found: list[int] = []
    count = Tracing._count

    def counting(tracing: Tracing) -> None:
        count(tracing)
        found.append(tracing._products)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracing, "_count", counting)
        yield found


def _described(model: nn.Module) -> Hashable | None:
    """Everything that a trace of a model depends on, or None if code was attached to it."""
    found: list[Hashable] = [(name, t.shape, t.dtype, t.device) for name, t in weights_and_buffers(model)]
    found.append(repr(getattr(model, "config", None)))
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return None
        own = {key: value for key, value in vars(module).items() if key not in OWN}
        found.append((name, type(module), type(module).forward, module.training, _value(own)))
    return tuple(found)


def _value(value: Any, depth: int = 0) -> Hashable:
    if isinstance(value, (int, float, str, type(None), torch.dtype, torch.device, type, types.FunctionType)):
        return type(value), value
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if depth == _DEEP:
        return type(value)
    if isinstance(value, Mapping):
        return type(value), tuple((str(key), _value(entry, depth + 1)) for key, entry in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value), tuple(_value(entry, depth + 1) for entry in value)
    return type(value), _value(getattr(value, "__dict__", {}), depth + 1)


@contextmanager
def traced_once() -> Iterator[None]:
    """Within this context, equal models are traced once per process and kind of call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Architecture, "capture_spec", shared)
        yield


@pytest.fixture(scope="module")
def shared_traces() -> Iterator[None]:
    """Equal models are traced once per process and kind of call, in the whole module that uses this."""
    with traced_once():
        yield


@contextmanager
def traced_anew() -> Iterator[None]:
    """Within this context nothing is shared, for tests of what a trace costs, leaves behind or depends on.

    It also decorates tests.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Architecture, "capture_spec", _TRACE)
        yield
