"""Lets tests share what conversions of equal models work out again: half of the time of a conversion of a small model.

Results are the same. The fixtures in ``tests/sharing.py`` do this in all tests.
"""

from __future__ import annotations

import builtins
import types
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

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


@contextmanager
def worked_out_once() -> Iterator[None]:
    """Within this context, code of equal graphs is compiled once, and equal ops give their shapes once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fx.graph_module, "compile", compiled, raising=False)
        patch.setattr(rewriter, "inferring", inferring)
        patch.setattr(stages, "inferring", inferring)
        yield


@contextmanager
def rebuilt_once() -> Iterator[None]:
    """Within this context, equal models are checked once for whether loading can build them again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebuilding, "obstacle", obstacle)
        yield
