"""Wrappers that libraries put around a quantized model. Light, for code that need not import ``torch.compile``."""

from __future__ import annotations

from typing import Any


def unwrapped(model: Any) -> Any:
    """The model inside what ``torch.compile`` returned; anything else is returned unchanged."""
    return getattr(model, "_orig_mod", model)
