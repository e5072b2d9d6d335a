"""The commands that answer questions: inspect, explain, diff, graph and opt."""

from __future__ import annotations

import json
import os
from pathlib import Path

import networkx as nx
import pytest

import fxquant
from fxquant.storage.diffusers_io import save_pipeline
from tests.cli.test_cli import run
from tests.tiny import calibrate, make_dit, make_pipeline

VALUE = "transformer_blocks.0.attn1.to_v"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two pipelines of one model, W4A8 and W8A8."""
    place = tmp_path_factory.mktemp("quantized")
    for name, recipe in (("four", "ptq4dit-w4a8"), ("eight", "rtn-w8a8")):
        pipe = make_pipeline(make_dit(layers=2))
        pipe.transformer = fxquant.compile(
            pipe.transformer, recipe=recipe, calibrate=calibrate(pipe.transformer), measure=0
        )
        save_pipeline(pipe, place / name)
    return place / "four", place / "eight"


def good(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def bad(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr.replace("\n", " ")


def test_inspect(folders: tuple[Path, Path]) -> None:
    text = good("inspect", folders[0])
    assert "DiTTransformer2DModel on fake-quant" in text
    line = next(line for line in text.splitlines() if line.startswith("absorb-affines"))
    assert line.split()[1:3] == ["convert", "transformed"] and "+0 -12 ~10" in line
    data = json.loads(good("inspect", folders[0], "--json"))
    assert [step["name"] for step in data["steps"]][-1] == "lower"


def test_explain(folders: tuple[Path, Path]) -> None:
    text = good("explain", folders[0], "transformer_blocks.1.attn1.to_out.0", "--timestep", 500)
    for expected in ("absorbed at cost free into transformer_blocks.1.attn1.to_v", "ranges at timestep 500", "kernel"):
        assert expected in text
    assert json.loads(good("explain", folders[0], "proj_out_2", "--json"))["precision"] == "float"
    assert "transformer_blocks.1.attn1.to_q" in bad("explain", folders[0], "transformer_blocks.1.attn.to_q")


@pytest.mark.slow
def test_diff(folders: tuple[Path, Path]) -> None:
    text = good("diff", *folders)
    assert "transformer_blocks.0-1.attn1.to_q" in text and "w_format=int4 -> w_format=int8" in text
    block = good("diff", folders[0], "--pass", "absorb-affines", "--block", 1)
    assert "transformer_blocks.1.norm1.linear.weight: absorb-affines: folded times" in block
    assert "transformer_blocks.0" not in block
    assert "balance-channels" in good("diff", "ptq4dit-w4a8", "rtn-w4a8")
    assert json.loads(good("diff", folders[0], folders[0], "--json"))["layers"] == []
    assert "neither a folder nor a recipe" in bad("diff", folders[0], "dit-w4a8")
    assert "there is no folder" in bad("diff", folders[0], "nowhere")
    assert "name a second plan" in bad("diff", folders[0])


@pytest.mark.parametrize("form", ["text", "dot", "json", "networkx", "model-explorer"])
def test_graph(folders: tuple[Path, Path], form: str, tmp_path: Path) -> None:
    arguments = ("graph", folders[0], "--layer", VALUE, "--after", "balance-channels", "--format", form)
    assert run(*arguments, "--out", tmp_path / "graph").exit_code == 0
    text = (tmp_path / "graph").read_text()
    assert form != "text" or good(*arguments) == text
    assert f"{VALUE}.weight" in text
    if form == "text":
        line = next(line for line in text.splitlines() if " = linear(" in line)
        assert f"product of {VALUE}" in line and "attention_processor.py:" in line
    elif form == "dot":
        assert text.startswith("digraph {") and "add_3_balanced" in text and text.count("{") == text.count("}")
    elif form == "networkx":
        graph = nx.node_link_graph(json.loads(text), edges="edges")
        (product,) = [name for name, roles in graph.nodes(data="roles", default={}) if roles.get(VALUE) == "product"]
        assert {data["argument"] for _, _, data in graph.in_edges(product, data=True)} == {"input", "weight", "bias"}
    elif form == "model-explorer":
        (graph,) = json.loads(text)["graphs"]
        known = {node["id"] for node in graph["nodes"]}
        node = next(node for node in graph["nodes"] if node["label"] == "linear")
        assert node["namespace"] == VALUE.replace(".", "/")
        assert {edge["sourceNodeId"] for edge in node["incomingEdges"]} <= known
        assert all(isinstance(attr["value"], str) for node in graph["nodes"] for attr in node["attrs"])


def test_graph_as_a_picture(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "dot"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\ncat > "$3"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    arguments = ("graph", folders[0], "--layer", VALUE, "--format")
    assert "name it: --out graph.svg" in bad(*arguments, "svg")
    assert "does not end in .svg" in bad(*arguments, "svg", "-o", tmp_path / "graph.png")
    assert run(*arguments, "svg", "-o", tmp_path / "graph.svg").exit_code == 0
    assert (tmp_path / "graph.svg").read_text() == good(*arguments, "dot")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install graphviz" in bad(*arguments, "png", "-o", tmp_path / "graph.png")


def test_graph_of_a_block(folders: tuple[Path, Path]) -> None:
    text = good("graph", folders[0], "--block", 1)
    assert "transformer_blocks.1.attn1.to_q" in text and "product of transformer_blocks.0" not in text
    assert "unknown block '7'" in bad("graph", folders[0], "--block", 7)
    assert "unknown step 'absorb'" in bad("graph", folders[0], "--after", "absorb")
    assert "there is no graph 3" in bad("graph", folders[0], "--graph", 3)


def test_a_layer_that_is_not_in_the_block(folders: tuple[Path, Path]) -> None:
    result = run("graph", folders[0], "--block", "0", "--layer", "pos_embed.proj")
    assert result.exit_code == 2
    assert "layer 'pos_embed.proj' is not in block '0'" in result.stderr


@pytest.mark.parametrize("name", ["../x", "", "broken"])
def test_opt_names_a_module_that_cannot_be_imported(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0")
    result = run("opt", tmp_path / "x.json", "--passes", "remove-no-ops", "--import", name)
    assert result.exit_code == 2
    assert f"--import {name}: it cannot be imported" in result.stderr


@pytest.mark.slow
def test_a_graph_is_written_as_other_files_are(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert "choose another name for the file" in bad("graph", folders[0], "--block", 1, "-o", tmp_path)
    assert run("graph", folders[0], "--block", 1, "-o", tmp_path / "new" / "graph.txt").exit_code == 0
    assert (tmp_path / "new" / "graph.txt").is_file()


def test_opt_refuses(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert "cannot be read" in bad("opt", tmp_path / "nowhere", "--passes", "remove-no-ops")
    (tmp_path / "odd.json").write_text("[]")
    assert "is not a dump" in bad("opt", tmp_path / "odd", "--passes", "remove-no-ops")
    assert "cannot be imported" in bad("opt", tmp_path / "odd", "--passes", "a", "--import", "no_such_module_here")


@pytest.mark.slow
def test_inspect_writes_a_page_and_a_trace(folders: tuple[Path, Path], tmp_path: Path) -> None:
    page, trace = tmp_path / "page.html", tmp_path / "trace.json"
    assert good("inspect", folders[0], "-o", page, "--against", folders[1], "--trace", trace).count("wrote") == 2
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "four" in text and "eight" in text
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert "absorb-affines" in names
    assert "name its file too" in bad("inspect", folders[0], "--against", folders[1])
    assert "no folder" in bad("inspect", folders[0], "-o", page, "--against", tmp_path / "nothing")
    for option in (("--json",), ("--graph", 1)):
        assert "--json and --graph are for the table" in bad("inspect", folders[0], "-o", page, *option)


@pytest.mark.slow
def test_plot(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "block.svg"
    assert "wrote" in good("plot", folders[0], "block", "--layer", "transformer_blocks.0", "-o", out)
    assert "quantize" in out.read_text()
    assert "not measured" in bad("plot", folders[0], "output", "-o", out)
    assert "fxquant attribute" in bad("plot", folders[0], "errors", "-o", out)
    assert "--layer" in bad("plot", folders[0], "timesteps", "-o", out)
    assert "group-timesteps" in bad("plot", folders[0], "timesteps", "--layer", VALUE, "-o", out)
    assert "--statistics" in bad("plot", folders[0], "salience", "--layer", VALUE, "-o", out)
    assert ".svg" in bad("plot", folders[0], "output", "-o", tmp_path / "picture.gif")
