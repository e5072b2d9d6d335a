"""Traces leave nothing behind when their graph is gone."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import TrackedFake

import fxquant
from fxquant.capture.exporting import export
from fxquant.ir.tensors import fake_mode_of
from fxquant.testing import tiny_dit
from fxquant.testing.models import example_call
from tests.traces import traced_anew


class Model(nn.Module):
    """Adds its inputs, and branches on their values if that is asked for."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.branches = branches

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.branches and x.sum() > 0:
            return x
        return x + y


ARGUMENTS = {"x": torch.ones(3, 4), "y": torch.ones(3, 4)}
OPEN = {"x": {0: Dim.AUTO}, "y": {0: Dim.AUTO}}


def inputs_of_traces() -> list[TrackedFake]:
    """The inputs of traces that exist."""
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, TrackedFake)]


@pytest.mark.parametrize("branches", [False, True])
def test_inputs_go_with_the_graph(branches: bool) -> None:
    before = inputs_of_traces()
    if branches:
        with pytest.raises(Exception, match="data-dependent"):
            export(Model(True), (), ARGUMENTS, OPEN)
    else:
        assert "add" in str(export(Model(False), (), ARGUMENTS, OPEN).graph)
    # Those of earlier tests may go at any time; as they are kept here, no new one has the identity of one of them.
    known = {id(one) for one in before}
    assert not [one for one in inputs_of_traces() if id(one) not in known]


@pytest.mark.parametrize("cached", [False, True])
def test_only_the_trace_itself_is_without_the_cache_of_fake_tensors(cached: bool) -> None:
    model = tiny_dit(layers=1)
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=cached), traced_anew(), torch.no_grad():
        traced = fxquant.trace(model)
        traced(**example_call(model))
        assert fake_mode_of(traced.graphs[0].graph).cache_enabled == cached
        assert torch._dynamo.config.fake_tensor_cache_enabled == cached
