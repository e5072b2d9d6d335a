"""A picture of what a search found: size against quality, beside the uniform precisions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fxquant.allocation.result import Point, SearchResult
from fxquant.inspect.plots import for_papers, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@for_papers
def pareto_figure(found: SearchResult) -> Figure:
    """Size of the model against the SQNR of its output: searched, as estimated and as measured, and uniform.

    Args:
        found: The result of :func:`fxquant.search`.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    figure, axes = new_figure(3.6, 2.6)
    axis = axes[0][0]
    curve = [(one.size / 1e6, one.estimated_db) for one in found.curve if one.estimated_db is not None]
    axis.plot(*zip(*curve, strict=True), color="C0", linewidth=1, label="searched, estimated")
    checked = _measured(found.checks)
    if checked:
        sizes, values, _ = zip(*checked, strict=True)
        axis.plot(sizes, values, "o", color="C0", markersize=4, label="searched, measured")
    uniform = _measured(found.uniform)
    if uniform:
        sizes, values, _ = zip(*uniform, strict=True)
        axis.plot(sizes, values, "s", color="C1", markersize=4, label="uniform, measured")
        for x, y, name in uniform:
            axis.annotate(name, (x, y), textcoords="offset points", xytext=(4, -8), fontsize=7)
    axis.set(xlabel="MB", ylabel="output SQNR in dB", title=f"target: {found.target}")
    axis.margins(0.15)  # Room for the names of the points.
    axis.legend(loc="lower right")
    return figure


def _measured(points: tuple[Point, ...]) -> list[tuple[float, float, str]]:
    known = [(one.size / 1e6, one.measured_db, one.name) for one in points if one.measured_db is not None]
    return [point for point in known if math.isfinite(point[1])]
