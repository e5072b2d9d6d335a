"""Chrome traces of passes and profiles."""

from __future__ import annotations

import json

import pytest

from fxquant.errors import WriteError
from fxquant.inspect.profiling.results import NodeTime, Profile
from fxquant.inspect.profiling.roofline import Roofline
from fxquant.inspect.profiling.timing import Times
from fxquant.inspect.rows import PassReport
from fxquant.inspect.trace_events import save_trace, trace_of_passes, trace_of_profile

PASSES = [PassReport("balance-channels", 0.5, 3, {"aten::mul": 2}), PassReport("absorb-affines", 0.25, 1, {})]


def complete(trace):
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def test_passes_follow_each_other():
    first, second = complete(trace_of_passes(PASSES))
    assert (first["name"], first["ts"], first["dur"]) == ("balance-channels", 0.0, 500_000.0)
    assert (second["ts"], second["dur"]) == (500_000.0, 250_000.0)
    assert first["args"] == {"edits": 3, "aten::mul": 2}


def test_each_graph_of_a_profile_has_its_line():
    def node(graph: str, name: str, milliseconds: float) -> NodeTime:
        return NodeTime(graph, name, "aten::linear", "product", f"blocks.{name}", Times((milliseconds,) * 3))

    nodes = (node("float", "a", 2.0), node("float", "b", 1.0), node("quantized", "a", 0.5))
    profile = Profile("M", "native", "cpu", 2, Roofline(1.0, 1.0, "float32", 1.0, 1), {}, (), nodes)
    events = complete(trace_of_profile(profile))
    assert [(event["tid"], event["ts"], event["dur"]) for event in events] == [
        (1, 0, 2000),
        (1, 2000, 1000),
        (2, 0, 500),
    ]
    assert events[0]["args"]["layer"] == "blocks.a"


def test_file(tmp_path):
    save_trace(trace_of_passes(PASSES), tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["displayTimeUnit"] == "ms"
    with pytest.raises(WriteError):
        save_trace(trace_of_passes(PASSES), tmp_path)
