"""The class by which pipelines of diffusers recognize their models, quantized or not."""

from __future__ import annotations

import logging
from typing import Any

import diffusers

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


def drop_warnings_about_types() -> None:
    """Leave out the line that diffusers logs for a quantized component, which is not of the class it stands for."""
    logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(_is_needed)


def _is_needed(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not (message.startswith("Expected types for ") and ", got <class 'fxquant." in message)
