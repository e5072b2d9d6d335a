"""Lets tests share what conversions of equal models work out again: half of the time of a conversion of a small model.

Results are the same. The fixtures in ``tests/sharing.py`` do this in all tests.
"""

from __future__ import annotations

import builtins
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxquant.capture import rebuilding
from fxquant.ir import proofs, rewriter, stages
from tests.traces import described

_CODES: OrderedDict[str, types.CodeType] = OrderedDict()
"""Compiled code of graphs by its text, least recently used first."""

_MOST = 2000  # Texts that are kept, of about 10 kB each.

_OBSTACLES: dict[Hashable, str | None] = {}
_OBSTACLE = rebuilding.obstacle


def compiled(text: str, name: str, mode: str, **options: Any) -> types.CodeType:
    """In place of ``compile`` where graphs become functions: the code of equal graphs is compiled once.

    Each function gets code of its own, because ``torch.compile`` keeps what it finds by code object.
    """
    if text not in _CODES:
        _CODES[text] = builtins.compile(text, name, mode, **options)
        if len(_CODES) > _MOST:
            _CODES.popitem(last=False)
    _CODES.move_to_end(text)
    return _renamed(_CODES[text], name)


def _renamed(code: types.CodeType, name: str) -> types.CodeType:
    inner = (_renamed(each, name) if isinstance(each, types.CodeType) else each for each in code.co_consts)
    return code.replace(co_filename=name, co_consts=tuple(inner))


@contextmanager
def inferring(mode: FakeTensorMode) -> Iterator[None]:
    """In place of ``proofs.inferring``: with the cache of fake tensors that traces of the tests do without."""
    before = mode.cache_enabled
    mode.cache_enabled = True
    try:
        with proofs.inferring(mode):
            yield
    finally:
        mode.cache_enabled = before


def obstacle(model: nn.Module, timestep: str | None) -> str | None:
    """In place of ``rebuilding.obstacle``: equal models are built again from their config once."""
    known = described(model)
    if known is None:
        return _OBSTACLE(model, timestep)
    config = getattr(model, "config", None)
    # Other than in traces, it matters here whether a config holds tuples, or keys that are no texts.
    key = known, timestep, repr(dict(config) if isinstance(config, dict) else config), type(model).__init__
    if key not in _OBSTACLES:
        _OBSTACLES[key] = _OBSTACLE(model, timestep)
    return _OBSTACLES[key]


_TRUE: set[Hashable] = set()
"""What :func:`_facts` says of nodes whose recorded values were found to be true."""

_CHECK_VALUE = stages._check_value
_PLAIN = (int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class _UnknownError(Exception):
    """Something of which the facts that matter are not known."""


def check_value(node: fx.Node) -> None:
    """In place of ``stages._check_value``: an op on inputs of equal sizes is run once.

    torch's own cache holds results with open sizes for each trace of its own, although they are the same in all.
    """
    if proofs.is_proven(node):
        return
    try:
        key = node.target, torch.get_default_dtype(), _facts((node.args, dict(node.kwargs), node.meta["val"]))
    except (_UnknownError, KeyError):
        return _CHECK_VALUE(node)
    if key not in _TRUE:
        _CHECK_VALUE(node)
        _TRUE.add(key)
    proofs.prove(node)


@contextmanager
def checked_anew() -> Iterator[None]:
    """Within this context, values are checked in each graph, for tests of these checks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_check_value", _CHECK_VALUE)
        yield


def _facts(value: Any) -> Hashable:
    """Everything about arguments and results of an op that its shapes and dtypes depend on."""
    if isinstance(value, fx.Node):
        return _facts(value.meta["val"])
    if isinstance(value, FakeTensor):
        if value.constant is not None or value.layout != torch.strided:
            raise _UnknownError
        flags = value.dtype, value.device, type(value), value.requires_grad, value.is_conj(), value.is_neg()
        return flags, value.dim(), *map(_facts, (*value.shape, *value.stride(), value.storage_offset()))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        ranges = value.node.shape_env.var_to_range
        bounds = [ranges.get(symbol) for symbol in value.node.expr.free_symbols]
        return type(value), value.node.expr, *sorted(str(each) for each in bounds)
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, (list, tuple)):
        return type(value), *map(_facts, value)
    if isinstance(value, dict):
        return dict, *((key, _facts(each)) for key, each in value.items())
    raise _UnknownError


_RESETS: dict[Any, Callable[[Any], None]] = {
    kind: kind.reset_parameters for kind in (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm)
}


def without_values(reset: Callable[[Any], None]) -> Callable[[Any], None]:
    """In place of ``reset_parameters``: fake tensors have no values that could be set."""

    def reset_parameters(module: Any) -> None:
        if not isinstance(module.weight, FakeTensor):
            reset(module)

    return reset_parameters


@contextmanager
def worked_out_once() -> Iterator[None]:
    """Within this context, code of equal graphs is compiled once, and equal ops give their shapes once.

    Skeletons of models, which have no values, are made without setting them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fx.graph_module, "compile", compiled, raising=False)
        patch.setattr(rewriter, "inferring", inferring)
        patch.setattr(stages, "inferring", inferring)
        patch.setattr(stages, "_check_value", check_value)
        for kind, reset in _RESETS.items():
            patch.setattr(kind, "reset_parameters", without_values(reset))
        yield


@contextmanager
def rebuilt_once() -> Iterator[None]:
    """Within this context, equal models are checked once for whether loading can build them again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebuilding, "obstacle", obstacle)
        yield
