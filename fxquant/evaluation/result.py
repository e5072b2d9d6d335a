"""The result of an evaluation: figures as a table, as JSON, and against limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from fxquant.errors import ConfigurationError, GateError, UnknownNameError
from fxquant.text import fitted, json_values, wrapped

HIGHER = frozenset({"inception_score", "precision", "recall", "clip_score", "psnr", "psnr_per_image", "ssim"})
"""Metrics that are better when they are higher."""

_HUNDREDTHS = ("inception_score", "inception_score_std", "psnr", "psnr_per_image", "clip_score")


@dataclass
class Evaluation:
    """Figures of a quantized pipeline, and those of the float one.

    Attributes:
        metrics: Figures of the quantized pipeline's images, by metric.
        float_metrics: The same of the float pipeline's images; empty without a float pipeline.
        images: Number of images of each; frames count as images.
        counts: Numbers of images of metrics that use fewer, by metric.
        left_out: Why other metrics were not computed, by metric.
        settings: How the images were made, and what measured them.
        notes: What was found in the folder of images.
    """

    metrics: dict[str, float]
    float_metrics: dict[str, float] = field(default_factory=dict)
    images: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return self.table()

    def __getitem__(self, metric: str) -> float:
        """A figure of the quantized pipeline.

        Raises:
            UnknownNameError: If it was not computed; lists those that were.
        """
        if metric not in self.metrics:
            raise UnknownNameError("metric", metric, self.metrics)
        return self.metrics[metric]

    def table(self) -> str:
        """The figures, one metric per line, and below them what was left out."""
        with_float = bool(self.float_metrics)
        rows = [
            [
                name,
                _shown(name, value),
                _shown(name, self.float_metrics[name]) if name in self.float_metrics else "",
                "" if name.endswith(("_std", "_per_image")) else ("higher" if name in HIGHER else "lower"),
                str(self.counts.get(name, self.images)),
            ]
            for name, value in self.metrics.items()
        ]
        header = ["metric", "quantized", "float" if with_float else "", "better", "images"]
        text = fitted(header, rows, {}, right=(1, 2, 4))
        if not self.left_out:
            return text
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        rest = [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]
        return "\n".join([text, "", "Not computed:", *(line for each in rest for line in wrapped(each))])

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values; figures that are not finite are text, such as ``"inf"``."""
        found: dict[str, Any] = json_values(
            {
                "images": self.images,
                "metrics": self.metrics,
                "float_metrics": self.float_metrics,
                "counts": self.counts,
                "left_out": self.left_out,
                "settings": self.settings,
            }
        )
        return found

    def check(self, limits: Mapping[str, float]) -> None:
        """Compare with limits: the lowest value of metrics that are better when higher, the highest of the others.

        Raises:
            GateError: Names each metric that is beyond its limit, and by how much.
            ConfigurationError: If a metric was not computed, or a limit is not a number.
        """
        check_limits(limits)
        failures: dict[str, str] = {}
        for name, limit in limits.items():
            if name not in self.metrics:
                reason = self.left_out.get(name, "is not among the computed metrics")
                raise ConfigurationError(f"a limit cannot be checked: {name} {reason}")
            value = self.metrics[name]
            higher = name in HIGHER
            if not (value >= limit if higher else value <= limit):  # NaN fails too.
                failures[name] = f"{name} is {_beyond(name, value, limit, 'below' if higher else 'above')} {limit:.10g}"
        if failures:
            raise GateError("; ".join(failures.values()), failures)


def check_limits(limits: Mapping[str, object]) -> None:
    """Refuse limits that no figure can be compared with.

    Raises:
        ConfigurationError: If one is not a number.
    """
    for name, limit in limits.items():
        if isinstance(limit, bool) or not isinstance(limit, Real) or math.isnan(limit):
            raise ConfigurationError(f"the limit of {name} is not a number; give one such as 0.1")


def _beyond(name: str, value: float, limit: float, side: str) -> str:
    """A figure and how far it is beyond its limit, in as many digits as show this."""
    if math.isnan(value):
        return "not a number, so it does not keep its limit"
    apart = abs(value - limit)
    if float(_shown(name, apart)) == 0 or float(_shown(name, value)) == limit:
        return f"{value:.10g}, {apart:.2g} {side} its limit"
    return f"{_shown(name, value)}, {_shown(name, apart)} {side} its limit"


def _shown(name: str, value: float) -> str:
    return f"{value:.2f}" if name in _HUNDREDTHS else f"{value:.4g}"
