"""Traces that several conversions of one model share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import nn

from fxquant.capture.graph import CapturedGraph
from fxquant.errors import VerificationError
from fxquant.ir.stages import SPECS, Stage, verify


@dataclass(eq=False)
class _Traces:
    """The traces of one model: its call, its device and what is known of it, and the graph."""

    model: nn.Module
    found: dict[Hashable, CapturedGraph] = field(default_factory=dict)


_shared: ContextVar[_Traces | None] = ContextVar("shared traces", default=None)


@contextmanager
def sharing_traces(model: nn.Module) -> Iterator[None]:
    """Trace a model once for each kind of call while this is open, and copy the graph for each conversion after that.

    The model and its hooks may not change meanwhile. It holds for conversions in this thread.
    """
    token = _shared.set(_Traces(model))
    try:
        yield
    finally:
        _shared.reset(token)


def shared_trace(model: nn.Module | None, key: Hashable, trace: Callable[[], CapturedGraph]) -> CapturedGraph:
    """The graph of a model that was traced before, or a new one.

    Args:
        model: The model, or None if it is not known any more.
        key: Everything that the trace depends on besides the model.
        trace: Traces it.
    """
    traces = _shared.get()
    if traces is None or model is not traces.model:
        return trace()
    if key not in traces.found:
        traces.found[key] = trace()
        with suppress(VerificationError):  # The first pipeline verifies its copy, and raises it.
            verify(traces.found[key].module, SPECS[Stage.CAPTURED])  # What is proved of the graph holds for the copies.
    return traces.found[key].copy()
