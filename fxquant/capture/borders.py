"""Marks the values that modules receive and return, for :mod:`fxquant.ir.borders`.

While a model is traced, hooks on its modules mark the nodes of these values. Marks are metadata: the graph computes the
same.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

from fxquant.ir.borders import Border
from fxquant.ir.meta import BORDERS

_TRACED = "fxquant_borders"
"""Key of the ``custom`` metadata of nodes, which ``torch.export`` keeps."""


@contextmanager
def marking(model: nn.Module) -> Iterator[None]:
    """Within this context, traces of a model mark what its modules return, and what repeated blocks receive."""
    blocks = {id(block) for part in model.children() if isinstance(part, nn.ModuleList) for block in part}
    handles = []
    for path, module in model.named_modules():
        if not path or isinstance(module, (torch.jit.ScriptModule, nn.ModuleList, nn.ModuleDict)):
            continue
        marker = _Marker(path, inspect.signature(module.forward) if id(module) in blocks else None)
        handles.append(module.register_forward_hook(marker.mark, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def settle(graph: fx.Graph) -> None:
    """Turn the marks of a trace into metadata of fxquant, which passes keep."""
    for node in graph.nodes:
        if found := node.meta.get("custom", {}).pop(_TRACED, ()):
            node.meta[BORDERS] = tuple(dict.fromkeys(found))


def unmark(nodes: Iterable[fx.Node]) -> None:
    """Drop the marks of values that code writes into, because the node of a value holds it before or after a write."""
    for node in nodes:
        node.meta.get("custom", {}).pop(_TRACED, None)


class _Marker:
    """The hook of one module."""

    def __init__(self, path: str, signature: inspect.Signature | None) -> None:
        self._path = path
        self._signature = signature

    def mark(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        mode = get_proxy_mode()
        if mode is None:
            return
        if self._signature is not None:
            for name, value in self._signature.bind(*args, **kwargs).arguments.items():
                _mark(value, Border(self._path, name, 0), mode.tracer)
        for position, value in enumerate(output if isinstance(output, (tuple, list)) else (output,)):
            _mark(value, Border(self._path, None, position), mode.tracer)


def _mark(value: Any, border: Border, tracer: Any) -> None:
    slot = get_proxy_slot(value, tracer, None) if isinstance(value, Tensor) else None
    if slot is not None:
        custom = slot.proxy.node.meta.setdefault("custom", {})
        custom[_TRACED] = (*custom.get(_TRACED, ()), border)
