"""Pictures for papers: the plots of the inspector page as figures of matplotlib, to be saved as PNG, SVG or PDF.

They need matplotlib: ``pip install 'fxquant[plots]'``. Every function but :func:`draw_graph`, which has Graphviz draw,
returns a ``matplotlib.figure.Figure``, which can be changed before :func:`save_figure` writes it.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from torch import Tensor

from fxquant.disk.whole_file import whole_file
from fxquant.errors import ConfigurationError, MissingPackageError
from fxquant.inspect.drawing import changes_of, draw_nodes, layered, nodes_inside
from fxquant.inspect.graph_formats import to_dot
from fxquant.inspect.history import History
from fxquant.inspect.salience import salience
from fxquant.inspect.snapshots import Snapshot
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
SUFFIXES = (".png", ".svg", ".pdf")
_SPAN = 60.0
"""Decibels that the colours of a heat map tell apart, from the worst; the rest has the last colour."""
_NAME = 60
"""The most characters of a layer's name beside a heat map; of a longer one the end is shown."""
_STYLE: Any = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "figure.titlesize", "legend.fontsize"), 8),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 7),
    "axes.linewidth": 0.6,
    "text.parse_math": False,  # Names of layers and folders are text, also with dollar signs.
    "svg.fonttype": "none",
    "savefig.dpi": 200,
}


def for_papers(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator: draw with the fonts and lines of papers, if matplotlib is there."""

    @functools.wraps(function)
    def draw(*args: P.args, **kwargs: P.kwargs) -> Figure:
        if importlib.util.find_spec("matplotlib") is None:
            raise MissingPackageError("pictures need matplotlib, which is not installed: pip install 'fxquant[plots]'")
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return function(*args, **kwargs)

    return draw


def check_suffix(path: str | Path) -> Path:
    """Return the path if a picture can be written there.

    Raises:
        ConfigurationError: If the suffix is not that of a known format.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigurationError(f"{path}: pictures are written as {', '.join(SUFFIXES)}; choose one of these suffixes")
    return path


@for_papers
def salience_figure(
    plan: Plan, statistics: Statistics, layer: str, weights: Mapping[str, Tensor] | None = None
) -> Figure:
    """Largest magnitude of each input channel of a layer at every timestep, before and after balancing.

    With weights, a second row shows the columns of the weight. Figures 3 and 4 of PTQ4DiT (arXiv 2405.16005).

    Args:
        plan: What was decided.
        statistics: Statistics of the calibration.
        layer: Name of a linear whose input was observed.
        weights: What :func:`fxquant.inspect.salience.weight_salience` returns.

    Raises:
        MissingPackageError: If matplotlib is not installed.
        CalibrationError: If the plan has no such layer, or calibration never reached its input.
    """
    found = salience(plan, statistics, layer, weights)
    rows: list[list[tuple[str, Tensor]]] = [[("input", found.before)]]
    if found.after is not None:
        rows[0] = [("input, before balancing", found.before), ("input, after balancing", found.after)]
    if found.weight_before is not None:
        rows.append([("weight", found.weight_before)])
    if found.weight_before is not None and found.weight_after is not None:
        rows[1] = [("weight, before", found.weight_before), ("weight, after", found.weight_after)]
    figure, axes = new_figure(3.4 * len(rows[0]), 1.9 * len(rows), len(rows), len(rows[0]))
    colours = _colours()
    for line, row in zip(axes, rows, strict=True):
        for axis, (title, values) in zip(line, row, strict=False):
            curves = values if values.dim() == 2 else values[None]
            last = max(len(curves) - 1, 1)
            for number, curve in enumerate(curves):
                axis.plot(curve.numpy(), color=colours(number / last) if len(curves) > 1 else "C0", linewidth=0.7)
            axis.set(title=title, ylim=(0, None), xlim=(0, max(curves.shape[1] - 1, 1)))
            axis.set_ylabel("max |W|" if title.startswith("weight") else "max |x|")
        for axis in line[len(row) :]:
            axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("input channel")
    if len(found.timesteps) > 1:
        _colour_bar(figure, axes[0], found.timesteps[0], found.timesteps[-1], "timestep")
    figure.suptitle(layer)
    return figure


@for_papers
def errors_figure(layers: Sequence[str], timesteps: Sequence[float], values: Any, unit: str = "SQNR in dB") -> Figure:
    """A heat map of errors, one row per layer and one column per timestep.

    Args:
        layers: Names of the layers.
        timesteps: The timesteps, ascending.
        values: ``[layers, timesteps]``; NaN or None where nothing was measured.
        unit: What the numbers are.

    Raises:
        MissingPackageError: If matplotlib is not installed.
        ConfigurationError: If there are no values, or not one for each layer and timestep.
    """
    rows = [[math.nan if value is None else float(value) for value in row] for row in values]
    if not rows or len(rows) != len(layers) or any(len(row) != len(timesteps) for row in rows):
        raise ConfigurationError(
            f"a heat map of {len(layers)} layers and {len(timesteps)} timesteps needs as many rows and columns"
        )
    names = min(max(map(len, layers)), _NAME)
    figure, axes = new_figure(1.4 + 0.05 * names + 0.28 * len(timesteps), 0.8 + 0.16 * len(layers))
    axis = axes[0][0]
    low = min((value for row in rows for value in row if not math.isnan(value)), default=0.0)
    high = max((value for row in rows for value in row if not math.isnan(value)), default=1.0)
    bounds = (low, min(high, low + _SPAN))
    shown = axis.imshow(rows, aspect="auto", cmap="viridis", interpolation="nearest", clim=bounds)
    axis.set_yticks(
        range(len(layers)),
        [_end_of(layer) for layer in layers],
        fontsize=6,
    )
    every = max(1, len(timesteps) // 12)
    axis.set_xticks(range(0, len(timesteps), every), [f"{step:g}" for step in timesteps[::every]], rotation=90)
    axis.set_xlabel("timestep")
    figure.colorbar(shown, ax=axis, label=unit, pad=0.02, extend="max" if bounds[1] < high else "neither")
    return figure


@for_papers
def output_figure(plans: Mapping[str, Plan]) -> Figure:
    """SQNR of the output against float by timestep, one curve per plan.

    Args:
        plans: Plans by the names in the legend.

    Raises:
        MissingPackageError: If matplotlib is not installed.
        ConfigurationError: If none of the plans holds measurements.
    """
    measured = {name: sorted(plan.output_sqnr_db.items()) for name, plan in plans.items() if plan.output_sqnr_db}
    if not measured:
        raise ConfigurationError("the output error was not measured; compile the model with measure=True")
    figure, axes = new_figure(3.4, 2.2)
    for name, values in measured.items():
        axes[0][0].plot(*zip(*values, strict=True), marker=".", linewidth=1, label=_legend_text(name))
    axes[0][0].set(xlabel="timestep", ylabel="output SQNR in dB")
    axes[0][0].legend(frameon=False)
    return figure


@for_papers
def timesteps_figure(plan: Plan, layer: str) -> Figure:
    """The dendrogram of the timesteps of a layer, with the boundaries of its groups.

    Args:
        plan: What was decided.
        layer: Name of a layer whose timesteps were grouped.

    Raises:
        MissingPackageError: If matplotlib is not installed.
        CalibrationError: If the plan has no such layer.
        ConfigurationError: If its timesteps were not grouped.
    """
    groups = plan.layer(layer).timesteps
    if groups is None or not groups.dendrogram:
        raise ConfigurationError(
            f"the timesteps of {layer} were not grouped; a recipe with the pass group-timesteps, such as htg-w4a8, does"
        )
    figure, axes = new_figure(5.0, 2.4)
    axis, steps = axes[0][0], sorted(plan.timesteps)
    for x, y, bin_ in dendrogram_lines(steps, groups.dendrogram, groups.boundaries):
        axis.plot(x, y, color="0.6" if bin_ is None else f"C{bin_ % 10}", linewidth=1)
    for boundary in groups.boundaries:
        axis.axvline(sum(step <= boundary for step in steps) - 0.5, color="tab:red", linestyle="--", linewidth=0.8)
    every = max(1, len(steps) // 12)
    axis.set_xticks(range(0, len(steps), every), [f"{step:g}" for step in steps[::every]])
    axis.set(xlabel="timestep", ylabel="squared distance", title=layer, ylim=(0, None))
    return figure


@for_papers
def block_figure(history: History, module: str, step: str) -> Figure:
    """The nodes of a module before and after a pass, side by side; what the pass changed is coloured.

    Green: added. Red: removed. Amber: reads other inputs or arguments. Purple: reads a tensor that the pass changed.

    Args:
        history: What :func:`fxquant.inspect.history.rewrite_history` returns.
        module: Path of the module, such as ``transformer_blocks.3``; empty for the whole model.
        step: Name of a step, such as ``quantize-linears``.

    Raises:
        MissingPackageError: If matplotlib is not installed.
        UnknownNameError: If there is no such step or module.
    """
    chosen = history.step(step)
    number = max(history.steps.index(chosen), 1)
    removed, changed = changes_of(history.steps[number])
    titles = (f"before {history.steps[number].name}", f"after {history.steps[number].name}")
    sides = [nodes_inside(entry.nodes, module) for entry in history.steps[number - 1 : number + 1]]
    layouts = [layered(nodes) for nodes in sides]
    sizes = [layout.size for layout in layouts]
    width, height = sum(wide for wide, _ in sizes), max(high for _, high in sizes)
    figure, axes = new_figure(width, height + 0.4, 1, 2, width_ratios=[wide for wide, _ in sizes])
    for axis, nodes, layout, changes, title in zip(axes[0], sides, layouts, (removed, changed), titles, strict=True):
        draw_nodes(axis, nodes, layout, changes, module)
        axis.set_title(f"{module or history.model_class}, {title}")
    return figure


def draw_graph(nodes: Snapshot, path: str | Path) -> None:
    """Lay out a graph, or a part of it, by Graphviz, with modules as frames, and write the picture.

    The picture is that of :func:`fxquant.inspect.graph_formats.to_dot`. It needs the program ``dot`` of Graphviz, and
    not matplotlib.

    Args:
        nodes: The nodes, such as :func:`fxquant.inspect.graph_formats.part_of` returns.
        path: The file; its suffix is ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        ConfigurationError: If the suffix is not that of a known format, or Graphviz cannot draw the graph.
        MissingPackageError: If Graphviz is not installed.
        WriteError: If the file cannot be written.
    """
    path = check_suffix(path)
    program = shutil.which("dot")
    if program is None:
        raise MissingPackageError(
            "pictures of graphs need the program dot of Graphviz, which is not installed: apt-get install graphviz, "
            "brew install graphviz, or https://graphviz.org/download. The format dot, the text that Graphviz reads, "
            "needs nothing"
        )
    with whole_file(path) as written:
        command = [program, f"-T{path.suffix.lower()[1:]}", "-o", str(written)]
        done = subprocess.run(
            command, input=to_dot(nodes), capture_output=True, text=True, encoding="utf-8", check=False
        )
        if done.returncode:
            why = done.stderr.strip() or f"exit status {done.returncode}"
            raise ConfigurationError(
                f"{program} could not draw {len(nodes)} nodes: {why}; draw a smaller part, such as one block"
            )


def dendrogram_lines(
    timesteps: Sequence[float], merges: Sequence[Sequence[float]], boundaries: Sequence[float]
) -> list[tuple[list[float], list[float], int | None]]:
    """The bars of a dendrogram: coordinates of a polyline, and the group that it lies in; None between groups.

    Args:
        timesteps: The timesteps, ascending; timestep number i is at x = i.
        merges: First timesteps of the two groups that were merged, and their distance; the closest pair first.
        boundaries: Boundaries between the groups, ascending.
    """
    heads = {step: (float(number), 0.0, [step]) for number, step in enumerate(timesteps)}
    lines = []
    for left, right, distance in merges:
        if left not in heads or right not in heads:
            continue
        (x, y, members), (other_x, other_y, others) = heads[left], heads.pop(right)
        top = max(distance, y, other_y)
        bins = {sum(step > boundary for boundary in boundaries) for step in (*members, *others)}
        lines.append(([x, x, other_x, other_x], [y, top, top, other_y], bins.pop() if len(bins) == 1 else None))
        heads[left] = ((x + other_x) / 2, top, [*members, *others])
    return lines


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure; the suffix of the path decides the format.

    Raises:
        ConfigurationError: If the suffix is not that of a known format.
        WriteError: If the file cannot be written.
    """
    path = check_suffix(path)
    import matplotlib

    with whole_file(path) as written, matplotlib.rc_context(_STYLE):
        figure.savefig(written, format=path.suffix.lower()[1:], bbox_inches="tight")


def _end_of(name: str) -> str:
    return name if len(name) <= _NAME else f"...{name[3 - _NAME :]}"


def _legend_text(name: str) -> str:
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves out what begins with an underscore.


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, width_ratios: Sequence[float] | None = None
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of a size in inches, not known to pyplot, and its axes by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, width_ratios=width_ratios)
    return figure, axes.tolist()


def _colours() -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"]


def _colour_bar(figure: Figure, axes: Sequence[Axes], low: float, high: float, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure.colorbar(ScalarMappable(Normalize(low, high), _colours()), ax=list(axes), label=label, pad=0.02)
