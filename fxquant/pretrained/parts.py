"""The class by which pipelines of diffusers recognize their models, and what these are asked before they are moved."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch

from fxquant.runtime.drop_in import DropIn


class _Kinds(type):
    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, (diffusers.ModelMixin, DropIn))

    def __instancecheck__(cls, instance: Any) -> bool:
        return issubclass(type(instance), cls)


class PipelineModel(metaclass=_Kinds):
    """Base class of all models of diffusers and of all quantized models, for ``issubclass`` and ``isinstance``.

    Pipelines compare a component that they are given with the last base class of their table that fits the class that
    the index names. A quantized model is not a ``ModelMixin``: it has no layers, so it cannot do what these do.
    """


def asking_first(to: Callable[..., Any]) -> Callable[..., Any]:
    """``DiffusionPipeline.to`` that a quantized part refuses before another part was moved or converted.

    Args:
        to: The method of diffusers, which calls ``to`` of one part after another.
    """

    @functools.wraps(to)
    def asking(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        given = (*args, kwargs.get("device"), kwargs.get("dtype"))
        dtype = next((value for value in given if isinstance(value, torch.dtype)), None)
        device = next((torch.device(value) for value in given if isinstance(value, (str, int, torch.device))), None)
        for model in _captured_models(pipe):
            model.check_to(device, dtype)
        return to(pipe, *args, **kwargs)

    return asking


def _captured_models(pipe: Any) -> Iterator[DropIn]:
    from fxquant.runtime.parts import quantized_parts  # Not when diffusers is imported: it takes time.
    from fxquant.runtime.wrappers import unwrapped

    for part in pipe.components.values():
        yield from (model for model in (unwrapped(part), *quantized_parts(part).values()) if isinstance(model, DropIn))


def drop_warnings_about_types() -> None:
    """Leave out the line that diffusers logs for a quantized component, which is not of the class it stands for."""
    logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(_is_needed)


def _is_needed(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not (message.startswith("Expected types for ") and ", got <class 'fxquant." in message)
