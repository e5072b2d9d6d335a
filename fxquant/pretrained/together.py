"""Compiles several models in one calibration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn

from fxquant.api import compile as compile_model
from fxquant.errors import FxquantError, NotCalledError
from fxquant.runtime.model import GraphModel


def compile_together(
    models: Mapping[str, nn.Module],
    calibrate: Callable[[], Any] | None,
    options_of: Callable[[str], Mapping[str, Any]],
    optional: Collection[str] = (),
) -> dict[str, GraphModel]:
    """Quantize several models; calls of each are recorded while the others are calibrated.

    Args:
        models: The float models by name, each once.
        calibrate: Runs them in the way in which they will be used.
        options_of: The options of :func:`fxquant.compile` for the model of a name.
        optional: Names of models that are left out if ``calibrate`` does not call them.

    Returns:
        The quantized models by name.

    Raises:
        FxquantError: What :func:`fxquant.compile` raises. If there are several models, the message begins with a name.
    """
    made: dict[str, GraphModel] = {}

    def run(names: Sequence[str]) -> None:
        first, *rest = names
        inner = (lambda: run(rest)) if rest else calibrate
        try:
            made[first] = compile_model(models[first], calibrate=inner, **options_of(first))
        except FxquantError as error:
            of_first = error.component is None
            if of_first and first in optional and isinstance(error, NotCalledError):
                return
            if of_first and len(models) > 1:
                error.component = first
                error.args = (f"{first}: {error}", *error.args[1:])
            raise

    run(list(models))
    return {name: made[name] for name in models if name in made}
