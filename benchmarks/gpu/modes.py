"""Ways to call a module: eager, compiled, or as a recorded CUDA graph."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable
from functools import partial
from types import FunctionType
from weakref import WeakSet

import torch
from torch import Tensor, nn

from benchmarks.shapes import Call
from fxquant.runtime.model import GraphModel

Run = Callable[[], Tensor]
"""Runs the timed call; the next call may overwrite the returned tensor."""


class Mode(enum.Enum):
    """Way to call a module; the table shows the value."""

    EAGER = "eager"
    COMPILED = "compiled"
    MAX_AUTOTUNE = "max-autotune"
    GRAPH = "CUDA graph"
    COMPILED_GRAPH = "compiled, CUDA graph"
    BLOCKS = "compiled blocks"
    BLOCKS_GRAPH = "compiled blocks, CUDA graph"


RECORDED = {Mode.GRAPH: Mode.EAGER, Mode.COMPILED_GRAPH: Mode.COMPILED, Mode.BLOCKS_GRAPH: Mode.BLOCKS}
"""Modes that record a CUDA graph, and the mode of the calls that they record."""


def runner(module: nn.Module, mode: Mode, call: Call, compiler: str = "inductor") -> Run:
    """A function that runs a call of a module.

    Args:
        module: The module. In the modes of compiled blocks, its blocks stay compiled.
        mode: The way to call it.
        call: Keyword arguments.
        compiler: Backend of ``torch.compile``.
    """
    if mode in (Mode.BLOCKS, Mode.BLOCKS_GRAPH):
        _compile_blocks(module, compiler)
    if mode in (Mode.GRAPH, Mode.BLOCKS_GRAPH):
        return record(lambda: _output(module(**call)))
    if mode in (Mode.EAGER, Mode.BLOCKS):
        return lambda: _output(module(**call))
    compiled = _compiled(module, "max-autotune" if mode is Mode.MAX_AUTOTUNE else "default", compiler)
    if mode is Mode.COMPILED_GRAPH:
        return record(lambda: compiled(**call))

    def run() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(**call)

    return run


def _output(outputs: tuple[Tensor, ...]) -> Tensor:
    return outputs[0]


_KEPT = "_compiled_by_the_benchmark"


def _compiled(module: nn.Module, mode: str, compiler: str) -> Callable[..., Tensor]:
    """The compiled module, made once per mode and kept with the module."""
    kept: dict[str, Callable[..., Tensor]] = module.__dict__.setdefault(_KEPT, {})
    if mode not in kept:
        # Other compilers than inductor have no modes.
        kept[mode] = torch.compile(_own(module), mode=mode if compiler == "inductor" else None, backend=compiler)
    return kept[mode]


_NUMBERS = itertools.count()


def _own(module: nn.Module) -> Callable[..., Tensor]:
    """A function that calls the module and has its own code object.

    All compiled versions of one code object share a cache. Every call searches this cache entry by entry, and it holds
    only a few entries.
    """

    def call_module(**call: object) -> Tensor:
        return module(**call)[0]

    assert isinstance(call_module, FunctionType)
    return _with_own_code(call_module)


def _with_own_code(function: FunctionType) -> FunctionType:
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_NUMBERS)}")
    return FunctionType(code, globals(), code.co_name, None, function.__closure__)


_IN_BLOCKS: WeakSet[nn.Module] = WeakSet()


def _compile_blocks(module: nn.Module, compiler: str) -> None:
    """Compile each distinct block once, for all blocks like it; a second time nothing is changed."""
    if module in _IN_BLOCKS:
        return
    _IN_BLOCKS.add(module)
    if isinstance(module, GraphModel):
        module.compile_repeated_blocks(dynamic=False, backend=compiler)
        return
    blocks = [block for child in module.children() if isinstance(child, nn.ModuleList) for block in child]
    if not blocks:
        raise ValueError(f"{type(module).__name__} has no list of blocks to compile")

    def call_block(block: nn.Module, forward: Callable[..., object], *args: object, **kwargs: object) -> object:
        return forward(block, *args, **kwargs)

    assert isinstance(call_block, FunctionType)
    compiled = torch.compile(_with_own_code(call_block), dynamic=False, backend=compiler)
    for block in blocks:
        # Calls of the module and its hooks stay as they are; diffusers compiles blocks of some classes only.
        block.forward = partial(compiled, block, type(block).forward)


def record(work: Run) -> Run:
    """Record the work as a CUDA graph, after three warm-up calls.

    All runs write the same tensor. Without a GPU, where measurements are rehearsed, the work itself is run.
    """
    if not torch.cuda.is_available():
        return work
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
