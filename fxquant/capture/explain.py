"""Explains in the user's terms why a model cannot be traced, and hides what torch prints about failed attempts."""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fxquant import errors
from fxquant.capture.calls import CallSpec
from fxquant.capture.threads import replaced
from fxquant.errors import CaptureError

_ABOUT_VALUES = ("data-dependent", "is not supported for tensor subclasses", "aten._local_scalar_dense")
_ON_VALUES = (
    "A graph is one path through the code: branch on shapes, options, masks and positions, not on tensor values "
    "that the model computes (no .item(), no `if tensor:`). Compute every branch and choose with torch.where, or "
    "move that part out of the transformer's forward."
)
_ON_OTHERS = (
    "The code raised this on tensors without values, for the call {call}. Call the model itself with such inputs. If "
    "it fails too, the call does not fit the model. If it does not fail, that line does something that torch.export "
    "cannot follow; write that line differently."
)
_TALKATIVE = (
    *("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.export._trace"),
    *("torch.export.dynamic_shapes", "torch._export.non_strict_utils"),
)


@contextmanager
def quietly() -> Iterator[None]:
    """Hide what torch prints about attempts: graphs, tracebacks, hints. Errors are still raised."""
    from torch.export import _trace  # Slow to import, so it is imported only when something is traced.

    ours = threading.get_ident()

    def is_wanted(record: logging.LogRecord) -> bool:
        return record.thread != ours or record.levelno < logging.WARNING

    def show(*values: Any, **options: Any) -> None:
        if threading.get_ident() != ours:
            print(*values, **options)

    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    for logger in loggers:
        logger.addFilter(is_wanted)
    try:
        with replaced(_trace, "print", show):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_wanted)


def explained(error: BaseException, model: nn.Module, call: CallSpec) -> CaptureError:
    """What went wrong in the user's terms: the innermost line of the model's own code, and torch's reason."""
    frames = [frame for frame in _frames(error) if _is_user_code(frame.filename)]
    where, short = "", ""
    if frames:
        last = frames[-1]
        where = f'\n  File "{last.filename}", line {last.lineno}, in {last.name}\n    {last.line}'
        short = f" ({Path(last.filename).name}, line {last.lineno})"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    advice = _ON_VALUES if any(map(_is_about_values, _chain(error))) else _ON_OTHERS.format(call=call)
    return CaptureError(
        f"{type(model).__name__} cannot be traced: {reason}{where}\n{advice}", reason=f"{reason}{short}"
    )


def _is_about_values(error: BaseException) -> bool:
    """Whether an error says that the code asked for the value of a tensor that has no values."""
    unknown = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)
    return isinstance(error, unknown) or any(words in str(error) for words in _ABOUT_VALUES)


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and its causes, the innermost last."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _frames(error: BaseException) -> Iterator[traceback.FrameSummary]:
    for link in _chain(error):  # The frames of the innermost cause are the ones closest to the user's line.
        yield from traceback.extract_tb(link.__traceback__)


def _is_user_code(filename: str) -> bool:
    libraries = {Path(torch.__file__).parent, Path(errors.__file__).parent}
    if Path(filename).parent == Path(contextlib.__file__).parent:  # Python's standard library.
        return False
    return not filename.startswith("<") and not any(Path(filename).is_relative_to(folder) for folder in libraries)
