"""The forward of a captured model: eager, compiled, or within a larger function that is compiled."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.exc import TorchDynamoException

from fxquant.capture.calls import Call
from fxquant.capture.describe import warn_of_many
from fxquant.capture.feature_caches import is_functional, number_of_features, stateful
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.threads import is_traced_elsewhere, tracing_alone, without_autocast
from fxquant.capture.trace import Architecture
from fxquant.runtime import torch_compile
from fxquant.runtime.caches.cacheable import refuse_compiling
from fxquant.runtime.caches.cutting import Run
from fxquant.runtime.lora import give_turn, refuse_scale, take_turn, with_scale
from fxquant.runtime.nans import showing_nans

if TYPE_CHECKING:
    from fxquant.runtime.model import GraphModel


_MANY_VALUES = 8  # Number of graphs for fixed input values at which to warn.


def forward_for(model: Any, architecture: Architecture) -> Callable[..., Any]:
    """The ``forward`` of a captured model, with the signature of the original."""
    forward: Callable[..., Any] = functools.partial(forward_of_graphs, model)
    if is_functional(architecture.skeleton):
        forward = stateful(
            forward, lambda: max((number_of_features(captured.call.names) for captured in model.captured), default=0)
        )
    functools.update_wrapper(forward, architecture.skeleton.forward)
    forward.__signature__ = architecture.signature  # type: ignore[attr-defined]
    return forward


def forward_of_graphs(self: GraphModel, *args: Any, **kwargs: Any) -> Any:
    """Run the graph that serves a call; capture one if none exists yet."""
    if self._place.home is not None:  # Its tensors are elsewhere.
        if self._place.streaming is not None:
            begins = torch.compiler.is_dynamo_compiling() or torch_compile.callback() not in (None, False)
            return _stream(self, args, kwargs, begins)
        _arrive(self)
    if torch.compiler.is_dynamo_compiling() or (torch.compiler.is_compiling() and not is_traced_elsewhere()):
        # This call is inside a larger function that is being compiled.
        if self._cache is not None:
            _refuse_caching(self)
        given = self.architecture.canonical(args, kwargs)
        refuse_scale(self, given)
        captured = self.find_compiling(given)
        if captured is None:
            captured = _capture(self, given)
        inputs = captured.inputs(given.leaves)
        return captured.output(showing_nans(captured, inputs, captured.module(*inputs)))
    if (compiler := torch_compile.callback()) not in (None, False):  # Compilation would begin at this call.
        if self._cache is not None:
            _refuse_caching(self)
        call, strength = _begin(self, args, kwargs)
        try:
            leaves = call.code(call.module, *call.inputs)
        except TorchDynamoException as error:
            call = _begin_again(call, error)
            torch_compile.set_callback(compiler)
            leaves = call.code(call.module, *call.inputs)
        finally:
            _unwatch(self, strength)
        return _end(call, leaves)
    captured, inputs, strength = _choose(self, args, kwargs)
    run = _call if self._pieces is None else self._pieces.run
    return _outputs(self, captured, inputs, strength, run)


torch_compile.leave_alone(forward_of_graphs.__code__)


def _choose(
    self: GraphModel, args: Any, kwargs: Mapping[str, Any]
) -> tuple[CapturedGraph, list[torch.Tensor], float | None]:
    """Return the graph that serves a call, captured now if none exists yet, its inputs, and the scale of LoRAs."""
    args, kwargs, strength = with_scale(self, args, kwargs)
    call = self.architecture.canonical(args, kwargs)
    captured = self.find(call)
    self.watch(call)
    if captured is None:
        captured = _capture(self, call)
    return captured, captured.inputs(call.leaves), strength


@torch.compiler.disable
def _stream(self: GraphModel, args: Any, kwargs: Mapping[str, Any], begins: bool) -> Any:
    """Run a call of an offloaded model; ``begins`` says that ``torch.compile`` was to compile it."""
    streaming = self._place.streaming
    assert streaming is not None
    if begins:
        streaming.warn_uncompiled()
    captured, inputs, strength = _choose(self, *streaming.arrived((args, dict(kwargs))))
    run = streaming.run if self._pieces is None else functools.partial(self._pieces.run, moved=streaming.moved)
    return _outputs(self, captured, inputs, strength, run)


def _outputs(
    self: GraphModel, captured: CapturedGraph, inputs: Sequence[torch.Tensor], strength: float | None, run: Run
) -> Any:
    """The output of a graph that ``run`` runs, with LoRAs at their strength in this call."""
    take_turn(self, strength)
    try:
        leaves = self._run_graph(captured, inputs, run)
    finally:
        give_turn(self, strength)
    return captured.output(showing_nans(captured, inputs, leaves))


def _call(module: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Any:
    return module(*inputs)


@torch.compiler.disable
def _refuse_caching(self: GraphModel) -> None:
    refuse_compiling(self)


@torch.compiler.disable
def _arrive(self: GraphModel) -> None:
    self._arrive()


@torch.compiler.disable
def _begin(self: GraphModel, args: Any, kwargs: Mapping[str, Any]) -> tuple[torch_compile.Call, float | None]:
    captured, inputs, strength = _choose(self, args, kwargs)
    call = torch_compile.begin(captured, inputs)
    torch_compile.watch(self.backend)
    take_turn(self, strength)
    return call, strength


@torch.compiler.disable
def _begin_again(call: torch_compile.Call, error: Exception) -> torch_compile.Call:
    return torch_compile.begin_again(call, error)


@torch.compiler.disable
def _unwatch(self: GraphModel, strength: float | None) -> None:
    give_turn(self, strength)
    torch_compile.unwatch(self.backend)


@torch.compiler.disable
def _end(call: torch_compile.Call, leaves: Sequence[Any]) -> Any:
    return call.captured.output(showing_nans(call.captured, call.inputs, leaves))


@torch.compiler.disable
def _capture(self: GraphModel, call: Call) -> CapturedGraph:
    with tracing_alone(), without_autocast(self.runs_on.type):
        if (made := self.find(call)) is not None:  # Captured by another thread in the meantime.
            return made
        captured = self.capture(call)
    warn_of_many(call, [graph.call for graph in self.serving])
    known = [graph for graph in self.serving if graph.call.known]
    if captured.call.known and len(known) == _MANY_VALUES:
        warnings.warn(
            f"{len(known)} graphs were captured, one for each new value: {captured.static_batch}. Each capture "
            "takes time; let calls share values where possible, for example by padding prompts to a few lengths.",
            stacklevel=4,
        )
    return captured
