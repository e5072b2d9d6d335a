"""Errors by layer and timestep for the heat map of the page, from the JSON form of an attribution of errors.

The JSON form is that of ``errors.json`` in the folder of a checkpoint: ``layers``, ``timesteps``, ``method`` (text) and
matrices of layers by timesteps: ``measured``, ``estimated``, ``local``, ``weights`` and ``inputs``. All numbers are
energies of errors relative to that of the float value; null where nothing was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fxquant.errors import ConfigurationError

Matrix = list[list[float | None]]

_TABLES = {
    "contribution": ("error of the model's output", "if only this layer is quantized; measured, or else estimated"),
    "local": ("error of the layer's output", "if only this layer is quantized"),
    "weights": ("error by its weight", "of the layer's output if only its weight is quantized"),
    "inputs": ("error by its input", "of the layer's output if only its input is quantized"),
}
MOST_DB = 120.0
"""The largest SQNR that is told apart; a smaller error is that of rounding in float."""


def errors_data(attribution: Mapping[str, Any]) -> dict[str, Any]:
    """Errors in dB: ``layers``, ``timesteps`` ascending, ``about``, and ``tables``, a list of {title, about, values}.

    Raises:
        ConfigurationError: If an entry is missing, or a matrix has not one number per layer and timestep.
    """
    try:
        layers, steps = list(attribution["layers"]), [float(step) for step in attribution["timesteps"]]
        matrices = {name: attribution[name] for name in ("measured", "estimated", "local", "weights", "inputs")}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"these are not errors by layer and timestep, as fxquant measures them: {error!r}"
        ) from None
    for name, rows in matrices.items():
        if len(rows) != len(layers) or any(len(row) != len(steps) for row in rows):
            raise ConfigurationError(
                f"errors {name!r}: {len(layers)} layers at {len(steps)} timesteps need as many rows and columns"
            )
    matrices["contribution"] = [
        [estimated if measured is None else measured for measured, estimated in zip(*pair, strict=True)]
        for pair in zip(matrices["measured"], matrices["estimated"], strict=True)
    ]
    order = sorted(range(len(steps)), key=steps.__getitem__)
    tables = [
        {"title": title, "about": about, "values": decibels(matrices[name], order)}
        for name, (title, about) in _TABLES.items()
        if any(value is not None for row in matrices[name] for value in row)
    ]
    if not tables:
        raise ConfigurationError("the attribution of errors holds no number; measure it again with more time")
    return {
        "layers": layers,
        "timesteps": [steps[number] for number in order],
        "about": str(attribution.get("method", "")),
        "tables": tables,
    }


def decibels(matrix: Sequence[Sequence[float | None]], order: Sequence[int]) -> Matrix:
    """SQNR in dB of relative errors, the columns in the given order."""
    return [[_decibels(row[number]) for number in order] for row in matrix]


def _decibels(ratio: float | None) -> float | None:
    if ratio is None:
        return None
    return MOST_DB if ratio <= 0 else round(min(-10 * math.log10(ratio), MOST_DB), 2)
