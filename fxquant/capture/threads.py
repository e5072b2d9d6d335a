"""Lets one thread trace at a time, while other threads may call models.

torch's tracers change state that all threads see. While one thread traces, all threads get the tracer's
``nn.Module.__call__`` and its modes that record ops, and the process counts as compiling. So tracing takes a lock, and
what other threads run meanwhile is kept out of the graph.

Also holds the contexts that turn compilation and autocast off.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.fx.experimental import proxy_tensor

_lock = threading.RLock()
_owners: list[int] = []  # The thread that traces; empty if none does.


@contextmanager
def taking_turns() -> Iterator[None]:
    """Wait until no other thread traces or is within this context, and let none begin.

    It is one lock for both, so that threads which need both cannot wait for each other.
    """
    with _lock:
        yield


@contextmanager
def tracing_alone() -> Iterator[None]:
    """Wait until no other thread traces, then keep others from tracing. Their calls of modules are not recorded."""
    with _lock:
        if _owners:
            yield
            return
        tracer, elsewhere, modes = (
            proxy_tensor._ModuleStackTracer,
            _Modes(),
            torch._ops.mode_stack_state_for_pre_dispatch,
        )

        def modes_here() -> Any:
            return elsewhere.stack if is_traced_elsewhere() else modes()

        _owners.append(threading.get_ident())
        try:
            with (
                replaced(tracer, "call_module", _only_here(tracer.call_module, _call)),
                replaced(tracer, "getattr", _only_here(tracer.getattr, _value)),
                replaced(torch._ops, "mode_stack_state_for_pre_dispatch", modes_here),
            ):
                yield
        finally:
            _owners.clear()


def is_traced_elsewhere() -> bool:
    """Whether another thread traces. If so, what torch reports for the process is not true for this thread."""
    return _owners[:] not in ([], [threading.get_ident()])


_eager_lock = threading.Lock()
_eager: list[Any] = []  # The stance of the compiler, once for each thread that is within uncompiled().


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run functions decorated with ``torch.compile`` without compilation.

    All threads share one stance of the compiler. The first thread that enters sets it, and the last thread that leaves
    restores it. If each thread restored the stance that it found, a thread that entered second would leave the process
    without compilation.
    """
    with _eager_lock:
        _eager.append(_eager[0] if _eager else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _eager_lock:
            stance = _eager.pop()
            if not _eager:
                stance.__exit__(None, None, None)


@contextmanager
def without_autocast(*devices: str) -> Iterator[None]:
    """Compute in the dtypes of the values, on the CPU and these devices, even within ``torch.autocast``."""
    with ExitStack() as stack:
        for device in sorted({"cpu", *devices}):
            if autocast_dtype(device) is not None:
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that ``torch.autocast`` casts to on this kind of device, or None where it is off."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Within this context, replace an attribute of a class or module."""
    missing = object()
    own = vars(holder).get(name, missing)
    setattr(holder, name, value)
    try:
        yield
    finally:
        if own is missing:
            delattr(holder, name)
        else:
            setattr(holder, name, own)


class _Modes(threading.local):
    """The modes that record ops in a thread that does not trace."""

    def __init__(self) -> None:
        self.stack = torch._ops._ModeStackStateForPreDispatch()


def _only_here(method: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        return otherwise(*args, **kwargs) if is_traced_elsewhere() else method(self, *args, **kwargs)

    return chosen


def _call(_: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


def _value(_: str, value: Any, __: Any) -> Any:
    return value
