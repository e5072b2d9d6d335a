"""Errors by layer and timestep for the heat map of the page, from the JSON form of an attribution of errors.

The JSON form is that of ``errors.json`` in the folder of a checkpoint: ``layers``, ``timesteps``, ``method`` (text) and
matrices of layers by timesteps: ``measured``, ``estimated``, ``local``, ``weights`` and ``inputs``. All numbers are
energies of errors relative to that of the float value; null where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxquant.errors import ConfigurationError
from fxquant.planning.attribution import to_db

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
        {
            "title": title,
            "about": about,
            "values": [[_shown(row[number]) for number in order] for row in matrices[name]],
        }
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


def _shown(ratio: float | None) -> float | None:
    """SQNR in dB of a relative error, as far as it is told apart."""
    db = to_db(ratio)
    return None if db is None else round(min(db, MOST_DB), 2)
