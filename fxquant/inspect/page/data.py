"""The data of the page: what is known about one or two quantized models, as JSON values.

The format, as :func:`page_data` returns it::

    {"format": 1, "models": [MODEL, ...]}                    one model, or two to compare

    MODEL
      name, model_class, recipe, backend                     text
      totals, attentions, products, passes, decisions        as in Report.to_json
      timesteps                                              the calibrated timesteps, ascending
      output_sqnr_db                                         [[timestep, dB], ...], ascending by timestep
      layers                                                 as in Report.to_json, and per layer:
        observed       key of its statistics, or null
        range          {method, low: [...], high: [...]}, one number per group of timesteps; null without a static range
        boundaries     of the groups of timesteps, ascending
        dendrogram     [[timestep, timestep, distance], ...], the closest pair first
        groups_reason  why there is only one group, or null
        balance        {cost, into, channels, group, reason, factors: [least, median, largest] or null}, or null
        shift          {cost, into, channels, reason, balanced}, or null
      errors                                                 see fxquant.inspect.page.errors
      salience                                               {layers: {name: CURVES}}
      calls                                                  number of kinds of call; there may be fewer graphs
      graphs                                                 see fxquant.inspect.page.graphs

    CURVES
      channels, points, pooled     each of `points` values is the largest of `pooled` neighbouring channels
      timesteps                    those shown; `before` and `after` have one SERIES for each
      before, after                of the input; `after` is null if the layer was not balanced
      weight_before, weight_after  SERIES or null
      readers                      further layers that read the same input
      overall                      {timesteps, before, after}: the largest channel at every timestep

    SERIES
      data, scale                  base64 of unsigned 16-bit integers, little-endian; a value is `scale` times one

In place of `errors` and `salience` there may be {"missing": text}: why it is not there, and how to get it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxquant.inspect.page.errors import errors_data
from fxquant.inspect.report import Report
from fxquant.inspect.salience import Salience, layers_with_salience, salience
from fxquant.planning.decisions import ActivationRange
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics
from fxquant.text import json_values

FORMAT = 1
_POINTS = 384
"""The most points of a curve."""
_ALL_POINTS = 45_000
"""The most points of one curve of every layer, all layers together: they bound the size of the page."""
_TIMESTEPS = 8
"""The most timesteps whose curves are shown."""

_FROM_REPORT = ("model_class", "recipe", "backend", "totals", "attentions", "products", "passes")

NO_STATISTICS = (
    "There are no statistics of the calibration. Keep them when you quantize, with fxquant quantize --keep-statistics "
    "FILE, and give them to the page: fxquant inspect DIR --statistics FILE -o page.html, or "
    "fxquant.inspect_page(model, path, statistics=statistics)."
)
NO_ERRORS = (
    "The errors of the layers were not measured. Measure them with fxquant attribute, or fxquant.attribute(quantized, "
    "model, statistics) and fxquant.save, and make the page again."
)


def page_data(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The data of a page from what :func:`model_data` returns, as strict JSON values."""
    values = json_values({"format": FORMAT, "models": list(models)})
    assert isinstance(values, dict)
    return values


def model_data(
    name: str,
    plan: Plan,
    report: Report,
    graphs: Sequence[Mapping[str, Any]],
    statistics: Statistics | None = None,
    weights: Mapping[str, Tensor] | None = None,
    errors: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The data of one model.

    Args:
        name: A short name of the model.
        plan: What was decided.
        report: The report of the plan.
        graphs: What :func:`fxquant.inspect.page.graphs.graph_data` returns, for each kind of call.
        statistics: Statistics of the calibration, for the salience.
        weights: Salience of weights; see :func:`fxquant.inspect.salience.weight_salience`.
        errors: Errors by layer and timestep; see :mod:`fxquant.inspect.page.errors`.
    """
    told = report.to_json()
    layers = [{**row, **_layer(row["name"], plan)} for row in told["layers"]]
    return {
        "name": name,
        **{key: told[key] for key in _FROM_REPORT},
        "decisions": told.get("decisions", []),
        "timesteps": sorted(plan.timesteps),
        "output_sqnr_db": sorted(told["output_sqnr_db"]),
        "layers": layers,
        "errors": {"missing": NO_ERRORS} if errors is None else errors_data(errors),
        "salience": _saliences(plan, statistics, weights),
        "calls": max(len(plan.calls), len(graphs)),
        "graphs": list(graphs),
    }


def _layer(name: str, plan: Plan) -> dict[str, Any]:
    layer, factor = plan.layers[name], plan.vectors.get(name)
    factors = None
    if factor is not None and factor.numel():
        factors = [float(value) for value in torch.quantile(factor.double(), torch.tensor([0.0, 0.5, 1.0]).double())]
    groups = layer.timesteps
    return {
        "observed": layer.observed,
        "range": _range(layer.activation),
        "boundaries": list(layer.boundaries),
        "dendrogram": groups.dendrogram if groups else [],
        "groups_reason": groups.reason if groups else None,
        "balance": {**asdict(layer.balance), "factors": factors} if layer.balance else None,
        "shift": asdict(layer.shift) if layer.shift else None,
    }


def _range(found: ActivationRange | None) -> dict[str, Any] | None:
    if found is None:
        return None
    low, high = found.ends
    return {"method": found.method, "low": low, "high": high}


def _saliences(plan: Plan, statistics: Statistics | None, weights: Mapping[str, Tensor] | None) -> dict[str, Any]:
    if statistics is None:
        return {"missing": NO_STATISTICS}
    names = layers_with_salience(plan, statistics)
    if not names:
        return {"missing": "The statistics hold no input of a linear of this plan: they belong to another model."}
    points = min(_POINTS, max(64, _ALL_POINTS // len(names)))
    shown = {name: _curves(salience(plan, statistics, name, weights), points) for name in names}
    for name, curves in shown.items():
        key = plan.layers[name].observed or name
        curves["readers"] = [other for other, layer in plan.layers.items() if layer.observed == key and other != name]
    return {"layers": shown}


def _curves(found: Salience, most: int) -> dict[str, Any]:
    steps, channels = len(found.timesteps), found.before.shape[1]
    pooled = -(-channels // most)
    chosen = sorted({round(number) for number in np.linspace(0, steps - 1, min(steps, _TIMESTEPS))})

    def series(values: Tensor | None) -> dict[str, Any] | None:
        return None if values is None else series_of(_pooled(values, pooled))

    return {
        "channels": channels,
        "points": -(-channels // pooled),
        "pooled": pooled,
        "timesteps": [found.timesteps[number] for number in chosen],
        "before": [series(found.before[number]) for number in chosen],
        "after": None if found.after is None else [series(found.after[number]) for number in chosen],
        "weight_before": series(found.weight_before),
        "weight_after": series(found.weight_after),
        "overall": {
            "timesteps": found.timesteps,
            "before": [float(f"{value:.4g}") for value in found.before.amax(1).tolist()],
            "after": None if found.after is None else [float(f"{value:.4g}") for value in found.after.amax(1).tolist()],
        },
    }


def _pooled(values: Tensor, size: int) -> Tensor:
    """The largest of each ``size`` neighbouring values, none of which is negative."""
    if size == 1:
        return values
    return torch.nn.functional.pad(values, (0, -len(values) % size)).unflatten(0, (-1, size)).amax(1)


def series_of(values: Tensor) -> dict[str, Any]:
    """Numbers of at least 0 in few bytes; see the module's docstring."""
    scale = (float(values.max()) if len(values) else 0.0) / 65535 or 1.0
    codes = (values.double() / scale).round().clamp(0, 65535).numpy().astype("<u2")
    return {"data": base64.b64encode(codes.tobytes()).decode(), "scale": scale}
