"""Graphs in the formats of other tools: what Graphviz draws, and what Model Explorer accepts."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import fxquant
from fxquant.errors import ConfigurationError, MissingPackageError
from fxquant.inspect import graph_formats
from fxquant.inspect.graph_formats import part_of, to_dot, to_model_explorer
from fxquant.inspect.history import History
from fxquant.inspect.plots import draw_graph
from fxquant.inspect.snapshots import NodeState, Snapshot
from tests.tiny import calibrate, make_dit

TO_Q = "transformer_blocks.1.attn1.to_q"
QUOTED = r'"(?:[^"\\]|\\.)*"'


@pytest.fixture(scope="module")
def history() -> History:
    model = make_dit(layers=2)
    quantized = fxquant.compile(model, recipe="ptq4dit-w4a8", calibrate=calibrate(model), measure=0)
    return fxquant.rewrite_history(quantized)


@pytest.fixture
def block(history: History) -> Snapshot:
    return part_of(history, block=1)


def drawn(text: str) -> dict[str, str]:
    """The nodes of a text in DOT, with their attributes."""
    statements = re.findall(rf"^ +({QUOTED}) \[(.*)\];$", text, re.MULTILINE)
    return {json.loads(name): attributes for name, attributes in statements}


def labels(text: str) -> dict[str, list[str]]:
    """The lines of the label of each node."""
    found = {name: re.match(rf"label=({QUOTED})", attributes) for name, attributes in drawn(text).items()}
    return {name: json.loads(match[1]).split("\n") for name, match in found.items() if match}


def edges(text: str) -> list[tuple[str, str]]:
    return [(json.loads(a), json.loads(b)) for a, b in re.findall(rf"^ +({QUOTED}) -> ({QUOTED})", text, re.MULTILINE)]


class TestDot:
    def test_nodes_show_bits_roles_shapes_and_stored_tensors(self, block: Snapshot) -> None:
        (product,) = (state.name for state in block if state.roles.get(TO_Q) == "product")
        shown = labels(to_dot(block))[product]
        assert shown[:4] == ["fxquant::linear", "float32[B, 16, 16]", "4 bits", "product of attn1.to_q"]
        assert "wq: uint8[16, 8]" in shown and "bias: float32[16]" in shown

    def test_each_edge_joins_nodes_that_are_drawn(self, block: Snapshot) -> None:
        text = to_dot(block)
        nodes = drawn(text)
        calls = [state for state in block if state.kind != "tensor"]
        assert set(nodes) > {state.name for state in calls}
        assert {name for edge in edges(text) for name in edge} <= set(nodes)
        expected = {(source, state.name) for state in calls for source in state.inputs if source in nodes}
        assert set(edges(text)) == expected and len(expected) > 60
        assert [name for name, facts in nodes.items() if facts == "style=dashed"]  # What the block reads from outside.

    def test_modules_are_frames_named_within_the_part(self, block: Snapshot) -> None:
        text = to_dot(block)
        assert text.startswith('digraph { label="transformer_blocks.1"')
        assert "subgraph cluster_" in text and '{ label="attn1.to_q"; color=gray;' in text
        assert text.count("{") == text.count("}")

    def test_stored_tensors_that_nothing_reads_are_nodes(self, block: Snapshot) -> None:
        tensors = tuple(state for state in block if state.kind == "tensor")
        assert set(drawn(to_dot(tensors))) == {state.name for state in tensors} != set()

    def test_names_are_quoted(self) -> None:
        name = 'a"];}\\\n<b>'
        state = NodeState(name, "call", name, {}, (), None, None, None, {name: name}, name, name, None, ())
        text = to_dot((state,))
        assert set(drawn(text)) == {name}
        assert len(text.splitlines()) == 5

    def test_the_tooltip_is_the_line_of_the_text(self, block: Snapshot) -> None:
        (state,) = (state for state in block if state.roles.get(TO_Q) == "product")
        (line,) = (line for line in graph_formats.to_text(block).splitlines() if line.startswith(f"{state.name}:"))
        assert f"tooltip={json.dumps(line)}" in drawn(to_dot(block))[state.name]


def fake_dot(folder: Path, script: str) -> str:
    """A program ``dot``, and the value of PATH with which it is found."""
    folder.mkdir()
    (folder / "dot").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "dot").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


class TestPicture:
    def test_graphviz_gets_the_text_and_the_format(
        self, block: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", fake_dot(tmp_path / "bin", 'echo "$1" > "$3"; cat >> "$3"'))
        draw_graph(block, tmp_path / "block.PDF")
        assert (tmp_path / "block.PDF").read_text() == f"-Tpdf\n{to_dot(block)}"

    def test_a_failure_of_graphviz_is_reported_and_nothing_is_left(
        self, block: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", fake_dot(tmp_path / "bin", 'echo x > "$3"; echo "out of memory" >&2; exit 3'))
        with pytest.raises(ConfigurationError, match="out of memory; draw a smaller part, such as one block"):
            draw_graph(block, tmp_path / "block.svg")
        assert [path.name for path in tmp_path.iterdir()] == ["bin"]

    def test_without_graphviz(self, block: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(MissingPackageError, match="apt-get install graphviz"):
            draw_graph(block, tmp_path / "block.svg")

    def test_an_unknown_suffix(self, block: Snapshot, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="pictures are written as"):
            draw_graph(block, tmp_path / "block.gif")

    @pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz: apt-get install graphviz")
    def test_graphviz_draws_a_block(self, block: Snapshot, tmp_path: Path) -> None:
        draw_graph(block, tmp_path / "block.svg")
        assert "product of attn1.to_q" in (tmp_path / "block.svg").read_text()


KEYS: dict[str, set[str]] = {
    "collection": {"label", "graphs"},
    "graph": {"id", "nodes"},
    "node": {"id", "label", "namespace", "attrs", "incomingEdges", "outputsMetadata"},
    "edge": {"sourceNodeId", "sourceNodeOutputId", "targetNodeInputId"},
}
"""The keys that are written, of those that Model Explorer 0.1.34 reads (``model_explorer/graph_builder.py``)."""


def check_attributes(attributes: list[dict[str, Any]]) -> None:
    assert all(set(entry) == {"key", "value"} for entry in attributes)
    assert all(isinstance(value, str) for entry in attributes for value in entry.values())


def test_model_explorer(history: History) -> None:
    data = json.loads(graph_formats.FORMATS["model-explorer"](part_of(history)))
    assert set(data) == KEYS["collection"] and isinstance(data["label"], str)
    (graph,) = data["graphs"]
    assert set(graph) == KEYS["graph"] and isinstance(graph["id"], str)
    known = {node["id"]: node for node in graph["nodes"]}
    assert len(known) == len(graph["nodes"]) > 100
    for node in graph["nodes"]:
        assert set(node) <= KEYS["node"]
        assert all(isinstance(node[key], str) for key in ("id", "label", "namespace"))
        assert not re.search(r"^/|/$|//|\.", node["namespace"])
        check_attributes(node["attrs"])
        inputs = [edge["targetNodeInputId"] for edge in node["incomingEdges"]]
        assert inputs == [str(number) for number in range(len(inputs))]
        for edge in node["incomingEdges"]:
            assert set(edge) == KEYS["edge"] and edge["sourceNodeId"] in known and edge["sourceNodeOutputId"] == "0"
        for entry in node.get("outputsMetadata", []):
            assert set(entry) == {"id", "attrs"} and entry["id"] == "0"
            check_attributes(entry["attrs"])


def test_model_explorer_has_a_node_for_what_a_part_reads_from_outside(block: Snapshot) -> None:
    (graph,) = to_model_explorer(block)["graphs"]
    inside = {state.name for state in block}
    known = {node["id"] for node in graph["nodes"]}
    assert inside < known
    assert {edge["sourceNodeId"] for node in graph["nodes"] for edge in node["incomingEdges"]} <= known
