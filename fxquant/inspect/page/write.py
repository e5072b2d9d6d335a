"""``fxquant.inspect_page``: write the page of one or two quantized models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from torch import nn

from fxquant.disk.whole_file import whole_file
from fxquant.errors import ConfigurationError, check_type
from fxquant.inspect.history import rewrite_histories
from fxquant.inspect.page.build import page_html
from fxquant.inspect.page.data import model_data, page_data
from fxquant.inspect.page.graphs import graph_data
from fxquant.inspect.report import report
from fxquant.inspect.salience import weight_salience
from fxquant.inspect.sources import Source, graphs_of
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics

_FEW_GRAPHS = 4
"""The most kinds of calls whose graphs a page shows."""


def inspect_page(
    source: Source,
    path: str | Path,
    *,
    against: Source | None = None,
    model: nn.Module | type[nn.Module] | None = None,
    statistics: Statistics | None = None,
    errors: Mapping[str, Any] | None = None,
    names: Sequence[str] = (),
) -> Path:
    """Write one HTML file that shows a quantized model: every pass, every node, every decision.

    The file loads nothing from the network and opens from a disk. A second model is shown beside the first one.

    Args:
        source: What ``fxquant.compile`` or ``fxquant.load`` returned, the folder of a checkpoint or of a pipeline with
            one, or a plan.
        path: The file to write; an existing file is replaced.
        against: A second model to compare with.
        model: For a plan: the float model that it was made for. For a checkpoint of a model that is not from diffusers:
            its class, or an instance.
        statistics: Statistics of the calibration of ``source``, for the salience of channels.
        errors: Errors of ``source`` by layer and timestep (:mod:`fxquant.inspect.page.errors`); by default those that
            its plan holds.
        names: Names of the models in the page; by default those of their folders or classes.

    Returns:
        The path.

    Raises:
        ConfigurationError: If a source is none of these, the number of names is wrong, or an argument is of another
            type.
        CheckpointError: If a folder holds no checkpoint, or a damaged one.
        WriteError: If the file cannot be written.
    """
    check_type("path", path, (str, Path), "the path of the file to write")
    check_type("statistics", statistics, (Statistics, NoneType), "a fxquant.Statistics, such as Statistics.load(file)")
    check_type("errors", errors, (Mapping, NoneType), "a mapping, such as Attribution.to_json() gives")
    check_type("names", names, (list, tuple), "a list of names, one for each model")
    for name in names:
        check_type("each of names", name, str, "the name of a model")
    sources = [source] if against is None else [source, against]
    if names and len(names) != len(sources):
        raise ConfigurationError(f"{len(names)} names for {len(sources)} models; give one for each")
    shown = list(names) or _names(sources)
    models = [
        _model(name, one, model, statistics if number == 0 else None, errors if number == 0 else None)
        for number, (name, one) in enumerate(zip(shown, sources, strict=True))
    ]
    text = page_html(page_data(models), " and ".join(shown))
    with whole_file(path) as written:
        written.write_text(text, encoding="utf-8")
    return Path(path)


def _model(
    name: str,
    source: Source,
    model: nn.Module | type[nn.Module] | None,
    statistics: Statistics | None,
    errors: Mapping[str, Any] | None,
) -> dict[str, Any]:
    given = graphs_of(source, model)
    plan = given.plan
    if errors is None and plan.attribution is not None:
        errors = plan.attribution.to_json()
    calls = range(min(max(len(plan.calls), 1), _FEW_GRAPHS))  # Without a call, the first graph is refused.
    graphs = [graph_data(history) for history in rewrite_histories(given, calls)]
    weights = None
    if statistics is not None:
        holder = model if isinstance(source, Plan) else source
        weights = weight_salience(holder, plan) if isinstance(holder, (nn.Module, str, Path)) else None
    return model_data(name, plan, report(source), graphs, statistics, weights, errors)


def _names(sources: Sequence[Source]) -> list[str]:
    names = []
    for source in sources:
        if isinstance(source, (str, Path)):
            names.append(Path(source).resolve().name)
        else:
            plan = source if isinstance(source, Plan) else getattr(source, "plan", None)
            names.append(plan.model_class.rpartition(":")[2] if isinstance(plan, Plan) else type(source).__name__)
    return [f"{name} ({'AB'[number]})" if names.count(name) > 1 else name for number, name in enumerate(names)]
