"""The quantized model that a function of the API received."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxquant.errors import ConfigurationError
from fxquant.planning.plan import Plan
from fxquant.runtime.model import GraphModel
from fxquant.runtime.wrappers import unwrapped


def quantized_model(model: Any, taker: str) -> tuple[GraphModel, Plan]:
    """Return the quantized model that a function received, without a ``torch.compile`` wrapper, and its plan.

    Args:
        model: What the function received.
        taker: Name of the function, for the message.

    Raises:
        ConfigurationError: If it is not a quantized model.
    """
    model = unwrapped(model)
    if not isinstance(model, GraphModel):
        inner = model.named_children() if isinstance(model, nn.Module) else ()
        parts = " or ".join(f"model.{name}" for name, part in inner if isinstance(part, GraphModel))
        raise ConfigurationError(
            f"{taker} takes a model that fxquant.compile made, not a {type(model).__name__}"
            f"{f'; give a part of it: {parts}' if parts else ''}"
        )
    if model.plan is None:
        raise ConfigurationError(
            f"{taker} takes a model that fxquant.compile made; this one was traced by fxquant.trace, and is not "
            "quantized"
        )
    return model, model.plan
