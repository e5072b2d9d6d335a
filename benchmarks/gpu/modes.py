"""Ways to call a module: eager, compiled, or as a recorded CUDA graph."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor, nn

from benchmarks.shapes import Call

Run = Callable[[], Tensor]
"""Runs the timed call; the next call may overwrite the returned tensor."""


class Mode(enum.Enum):
    """Way to call a module; the table shows the value."""

    EAGER = "eager"
    COMPILED = "compiled"
    MAX_AUTOTUNE = "max-autotune"
    GRAPH = "CUDA graph"


def runner(module: nn.Module, mode: Mode, call: Call) -> Run:
    """A function that runs a call of a module."""
    if mode is Mode.GRAPH:
        return record(lambda: _output(module(**call)))
    if mode is Mode.EAGER:
        return lambda: _output(module(**call))
    compiled = torch.compile(_own(module), mode="max-autotune" if mode is Mode.MAX_AUTOTUNE else None)

    def run() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(**call)

    return run


def _output(outputs: tuple[Tensor, ...]) -> Tensor:
    return outputs[0]


_NUMBERS = itertools.count()


def _own(module: nn.Module) -> Callable[..., Tensor]:
    """A function that calls the module and has its own code object.

    All compiled versions of one code object share a cache. Every call searches this cache entry by entry, and it holds
    only a few entries.
    """

    def call_module(**call: object) -> Tensor:
        return module(**call)[0]

    assert isinstance(call_module, FunctionType)
    code = call_module.__code__.replace(co_name=f"call_module_{next(_NUMBERS)}")
    return FunctionType(code, globals(), code.co_name, None, call_module.__closure__)


def record(work: Run) -> Run:
    """Record the work as a CUDA graph, after three warm-up calls.

    All runs write the same tensor.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work()

    def run() -> Tensor:
        graph.replay()
        return output

    return run
