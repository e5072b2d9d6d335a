"""Lets tests share traces: tracing takes most of the time of a conversion, of a save and of a load of a small model.

Passes, comparisons, verification and kernels run again in each test, on a copy of the traced graph. The fixtures in
``tests/conftest.py`` do this in all tests except those of tracing itself, in ``tests/capture``.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, is_fake

from fxquant.capture import known_values, memoized
from fxquant.capture.calls import CallSpec
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.known_values import Tracing
from fxquant.capture.state import HOLLOW, OWN, kept_tensors
from fxquant.capture.threads import tracing_alone
from fxquant.capture.trace import Architecture
from fxquant.errors import CaptureError, VerificationError
from fxquant.ir.stages import SPECS, Stage, verify
from fxquant.ir.tensors import read_tensors, set_tensor, weights_and_buffers

_TRACED: OrderedDict[Hashable, tuple[CapturedGraph | CaptureError, int]] = OrderedDict()
"""Graphs or why there are none, each with the number of layers that its trace ran; least recently used first."""

_MOST = 200  # Graphs that are kept.
_TRACE = Architecture.capture_spec
_DEEP = 3  # Levels of objects within objects in attributes that a key describes.


def shared(self: Architecture, call: CallSpec, device: torch.device, numbers: Any = None) -> CapturedGraph:
    """In place of ``Architecture.capture_spec``: trace once, and copy the graph for further calls of an equal model."""
    model = described(self.skeleton)
    if model is None:
        return _TRACE(self, call, device, numbers)
    key = (model, repr(call), str(device), repr(numbers or {}))
    key += (torch.get_default_dtype(), torch.export.export, Architecture._export, Architecture._finish)
    if key not in _TRACED:
        with tracing_alone(), _counted() as layers_so_far:
            found = _traced(self, call, device, numbers)
        _TRACED[key] = found, max(layers_so_far, default=0)
        if len(_TRACED) > _MOST:
            _TRACED.popitem(last=False)
    _TRACED.move_to_end(key)
    found, layers = _TRACED[key]
    most = known_values._most_layers.get()
    if most is not None and layers > most:
        return _TRACE(self, call, device, numbers)  # Refuses it.
    if isinstance(found, CaptureError):
        raise found.with_traceback(None)
    return _with_own_buffers(found.copy(), self.skeleton)


def _traced(self: Architecture, call: CallSpec, device: torch.device, numbers: Any) -> CapturedGraph | CaptureError:
    try:
        graph = _TRACE(self, call, device, numbers)
    except CaptureError as error:
        return error
    with suppress(VerificationError):  # Pipelines verify each copy, and raise it then.
        verify(graph.module, SPECS[Stage.CAPTURED])  # The copies share the proofs.
    return graph


def _with_own_buffers(captured: CapturedGraph, skeleton: nn.Module) -> CapturedGraph:
    """Give a copied graph the buffers of this skeleton: true ones, or fake ones if a checkpoint must have them."""
    own = dict(skeleton.named_buffers(remove_duplicate=False))
    values = [node.meta.get("val") for node in captured.module.graph.nodes]
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    for name, held in read_tensors(captured.module).items():
        if name not in own or (is_fake(own[name]) and is_fake(held)):
            continue
        value = own[name].to(held.device)
        if is_fake(value):
            assert mode is not None
            value = mode.from_tensor(held)
        set_tensor(captured.module, name, value)
    return captured


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The running numbers of layers that traces come to within this context; see ``known_values.at_most``."""
    found: list[int] = []
    count = Tracing._count

    def counting(tracing: Tracing, weight: Any) -> None:
        count(tracing, weight)
        found.append(len(tracing._layers))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracing, "_count", counting)
        yield found


def described(model: nn.Module) -> Hashable | None:
    """Everything that a trace of a model depends on, or None if code was attached to it.

    Lists and tuples count as the same, because a config that was read from a file has lists where the class has tuples.
    """
    numbers: dict[int, int] = {}  # Of tensors; one that has several names is traced as one.
    found: list[Hashable] = [
        (name, t.shape, t.dtype, t.device, numbers.setdefault(id(t), len(numbers)))
        for name, t in weights_and_buffers(model)
    ]
    found.append(_value(getattr(model, "config", None)))
    # A skeleton for checkpoints is traced as any other if no tensors are kept in attributes.
    left_out = OWN | _ORIGIN if kept_tensors(model) else OWN | _ORIGIN | {HOLLOW}
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return None
        own = {key: value for key, value in vars(module).items() if key not in left_out}
        found.append((name, type(module), type(module).forward, module.training, _value(own)))
    return tuple(found)


class _Same:
    """An object that equals only itself. The key keeps it alive, so no other object gets its address."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


_ORIGIN = {"_name_or_path", "_class_name", "_diffusers_version", "_use_default_values", "_commit_hash"}
_ORIGIN |= {"_is_hf_initialized", "_weight_conversions"}
"""Entries of configs, and attributes, that say where a model came from."""

_PLAIN = (int, float, str, type(None), torch.dtype, torch.device, type, types.FunctionType, types.BuiltinFunctionType)


def _value(value: Any, depth: int = 0) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, types.MethodType):
        return types.MethodType, value.__func__, _value(value.__self__, depth + 1)
    if isinstance(value, functools.partial):
        return functools.partial, _value((value.func, value.args, value.keywords), depth + 1)
    if depth == _DEEP:
        return _Same(value)
    if isinstance(value, Mapping):
        entries = [(str(key), entry) for key, entry in value.items() if key not in _ORIGIN]
        return type(value), tuple((key, _value(entry, depth)) for key, entry in entries)
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = tuple if isinstance(value, list) else type(value)
        return kind, tuple(_value(entry, depth) for entry in value)
    return (type(value), _value(vars(value), depth + 1)) if hasattr(value, "__dict__") else _Same(value)


@contextmanager
def traced_once() -> Iterator[None]:
    """Within this context, equal models are traced once per process and kind of call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Architecture, "capture_spec", shared)
        yield


@contextmanager
def traced_anew() -> Iterator[None]:
    """Within this context nothing is shared, for tests of what a trace costs, leaves behind or depends on.

    It also decorates tests.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Architecture, "capture_spec", _TRACE)
        yield


ALL_MEMOS = memoized._all
_MEMOS: dict[int, list[memoized.Memo]] = {}
_NO_TENSORS = ("sympy.", "transformers.utils.", "torch._dynamo.", "torch._inductor.")


def known_memos() -> list[memoized.Memo]:
    """In place of ``memoized._all``, which looks at the attributes of thousands of modules in each trace.

    It looks again when a module was imported, and leaves out what holds no tensors. For a model of one layer, that is
    half of the time of a trace.
    """
    if (number := len(sys.modules)) not in _MEMOS:
        _MEMOS.clear()
        _MEMOS[number] = [memo for memo in ALL_MEMOS() if not str(memo.__module__).startswith(_NO_TENSORS)]
    return _MEMOS[number]


@contextmanager
def memos(find: Callable[[], list[memoized.Memo]]) -> Iterator[None]:
    """Within this context, traces find caches of functions in this way: by ``known_memos`` or by ``ALL_MEMOS``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memoized, "_all", find)
        yield
