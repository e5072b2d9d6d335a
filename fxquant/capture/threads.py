"""One thread traces at a time, and others may call models meanwhile.

torch's tracers change what all threads see: while one traces, ``nn.Module.__call__`` and the modes that record ops
are its own for everybody, and the process counts as compiling. So tracing takes a lock, and what other threads run
meanwhile is kept out of the graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.fx.experimental import proxy_tensor

_lock = threading.RLock()
_owners: list[int] = []  # The thread that traces, if any does.


@contextmanager
def tracing_alone() -> Iterator[None]:
    """Wait until no other thread traces, and keep them from it; calls of modules in other threads are not recorded."""
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
    """Whether another thread traces, so that what torch says of the process is not true of this thread."""
    return _owners[:] not in ([], [threading.get_ident()])


_eager_lock = threading.Lock()
_eager: list[Any] = []  # One stance of the compiler for each thread that is within uncompiled().


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run functions decorated with ``torch.compile`` as they are.

    The stance of the compiler is one for all threads. The first that is here sets it and the last one sets it back; if
    each set back what it had found, a thread that came second would leave the process without compilation.
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
    """Compute in the dtypes that values have, on the CPU and these devices, whatever ``torch.autocast`` is around."""
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
    """Give a class or module another attribute for a while."""
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
