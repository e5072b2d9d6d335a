"""Conversions of one model share its traces while they are asked to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxquant
from fxquant.capture.sharing import sharing_traces
from fxquant.capture.trace import Architecture
from fxquant.ir.digest import graph_digest
from tests.tiny import calibrate, inputs, make_dit


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the class of the model with each trace."""
    found, export = list[str](), torch.export.export

    def counted(model: nn.Module, *args: object, **options: object) -> object:
        found.append(type(model).__name__)
        return export(model, *args, **options)

    monkeypatch.setattr(torch.export, "export", counted)
    return found


@pytest.mark.slow
def test_a_model_is_traced_once_while_traces_are_shared(exports: list[str]) -> None:
    model, other = make_dit(), make_dit()
    call = Architecture.of(model, "timestep").canonical((), inputs())
    with sharing_traces(model):
        first = Architecture.of(model, "timestep").capture(call)
        once, digest = len(exports), graph_digest(first.module.graph)
        first.module.graph.erase_node(next(iter(reversed(first.module.graph.nodes))))
        second = Architecture.of(model, "timestep").capture(call)
        assert len(exports) == once
        assert graph_digest(second.module.graph) == digest
        Architecture.of(other, "timestep").capture(call)
        assert len(exports) == 2 * once
    Architecture.of(model, "timestep").capture(call)
    assert len(exports) == 3 * once


@pytest.mark.slow
def test_calls_of_another_kind_are_traced(exports: list[str]) -> None:
    model = make_dit()
    architecture = Architecture.of(model, "timestep")
    with sharing_traces(model):
        first = architecture.capture(architecture.canonical((), inputs()))
        once = len(exports)
        second = architecture.capture(architecture.canonical((), {**inputs(), "return_dict": False}))
        assert len(exports) == 2 * once
    assert first.call != second.call


@pytest.mark.slow
def test_a_search_traces_once(exports: list[str]) -> None:
    model = make_dit()
    statistics = fxquant.Statistics(keep_calls=2)
    fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), statistics=statistics, measure=0)
    once = len(exports)
    assert once
    result = fxquant.search(
        model, size=0.6, recipe="rtn", candidates=["w4a8", "w8a8"], statistics=statistics, timesteps=2, probes=1
    )
    assert len(exports) == 2 * once
    with torch.no_grad():
        assert result.model(**inputs()).sample.isfinite().all()
