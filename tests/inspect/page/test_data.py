"""The data of the page: graphs in few bytes, curves, errors, and what is missing."""

from __future__ import annotations

import base64
import math

import numpy as np
import pytest
import torch

import fxquant
from fxquant.errors import CheckpointError, ConfigurationError, WriteError
from fxquant.inspect.history import rewrite_history
from fxquant.inspect.page.data import _pooled, model_data, page_data, series_of
from fxquant.inspect.page.errors import MOST_DB, errors_data
from fxquant.inspect.page.graphs import graph_data
from fxquant.inspect.page.write import inspect_page
from fxquant.planning.attribution import Attribution
from tests.inspect.page.conftest import data_of, errors
from tests.tiny import calibrate, make_dit


@pytest.fixture(scope="module")
def made():
    model = make_dit(layers=2)
    statistics = fxquant.Statistics()
    quantized = fxquant.compile(model, recipe="ptq4dit-w4a8", calibrate=calibrate(model), statistics=statistics)
    return quantized, statistics


def unpacked(graph, step, what):
    """The rows of ``nodes`` or ``tensors`` after a step."""
    while graph["steps"][step][what] is None:
        step -= 1
    return [graph[what][start + i] for start, count in graph["steps"][step][what] for i in range(count)]


class TestGraph:
    @pytest.mark.slow
    def test_holds_every_node_of_every_step(self, made):
        history = rewrite_history(made[0])
        graph = graph_data(history)
        text = graph["strings"].__getitem__
        assert [step["name"] for step in graph["steps"]] == [step.name for step in history.steps]
        for number, step in enumerate(history.steps):
            rows = unpacked(graph, number, "nodes")
            calls = [state for state in step.nodes if state.kind != "tensor"]
            stored = {state.name: state for state in step.nodes if state.kind == "tensor"}
            assert [text(row[0]) for row in rows] == [state.name for state in calls]
            for row, state in zip(rows, calls, strict=True):
                assert text(row[1]) == (state.target if state.kind == "call" else state.kind)
                assert [text(n) for n in row[8]] == [name for name in state.inputs if name not in stored]
                assert [text(n) for n in row[9]] == [stored[n].target for n in state.inputs if n in stored]
                assert [text(name) for name, _ in row[11]] == [name for name, _ in state.made_by]
            tensors = {text(row[0]): row for row in unpacked(graph, number, "tensors")}
            assert set(tensors) == {state.target for state in stored.values()}

    def test_equal_states_are_held_once(self, made):
        graph = graph_data(rewrite_history(made[0]))
        for what in ("nodes", "tensors"):
            assert len({repr(row) for row in graph[what]}) == len(graph[what])
        assert len(set(graph["strings"])) == len(graph["strings"])
        unchanged = [step for step in graph["steps"][1:] if not step["edits"]]
        assert unchanged and all(step["nodes"] is None for step in unchanged)

    def test_bytes_of_tensors_and_changes_of_tensors(self, made):
        graph = graph_data(rewrite_history(made[0]))
        text = graph["strings"].__getitem__
        name = "transformer_blocks.0.attn1.to_q.weight"
        first = {text(row[0]): row for row in unpacked(graph, 0, "tensors")}
        assert first[name][3] == 16 * 16 * 4
        assert [text(layer) for layer in first[name][5]] == ["transformer_blocks.0.attn1.to_q"]
        changed = {step["name"]: dict(step["changed"]) for step in graph["steps"]}
        assert "times" in changed["balance-channels"][name] and "columns" in changed["balance-channels"][name]


class TestCurves:
    @pytest.mark.parametrize("values", [[0.0, 0.5, 3.0, 1e-3], [0.0, 0.0], []])
    def test_series_keep_five_digits_of_the_largest(self, values):
        found = series_of(torch.tensor(values))
        codes = np.frombuffer(base64.b64decode(found["data"]), "<u2")
        assert codes * found["scale"] == pytest.approx(values, abs=max(values, default=0) / 65535)

    def test_pooling_keeps_the_largest_of_neighbours(self):
        assert _pooled(torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0]), 2).tolist() == [5.0, 4.0, 3.0]

    def test_salience_of_the_page_is_that_of_the_statistics(self, made):
        quantized, statistics = made
        data = model_data("m", quantized.plan, fxquant.report(quantized), [], statistics)
        curves = data["salience"]["layers"]["transformer_blocks.0.attn1.to_q"]
        assert curves["readers"] == ["transformer_blocks.0.attn1.to_k", "transformer_blocks.0.attn1.to_v"]
        assert curves["timesteps"] == [100.0, 500.0, 900.0] and curves["points"] == 16
        seen = statistics["transformer_blocks.0.attn1.to_q"].absmax
        assert curves["overall"]["before"] == pytest.approx(seen.amax(1).tolist(), rel=1e-3)
        factor = quantized.plan.vectors["transformer_blocks.0.attn1.to_q"]
        assert curves["overall"]["after"] == pytest.approx((seen / factor).amax(1).tolist(), rel=1e-3)
        assert curves["weight_before"] is None


class TestErrors:
    def test_in_decibels_with_timesteps_ascending(self, made):
        found = errors_data(errors(made[0].plan))
        assert found["timesteps"] == [100.0, 500.0, 900.0]
        contribution, local, weights = found["tables"]
        assert contribution["values"][0][2] is None  # The first of the noisiest timestep was not measured.
        assert local["values"][1] == pytest.approx([-10 * math.log10(0.001 * (2 + t)) for t in (2, 1, 0)], abs=0.01)
        assert contribution["values"][1][0] == pytest.approx(local["values"][1][0] + 10, abs=0.02)
        assert "weight" in weights["title"]

    def test_measured_numbers_replace_estimates_and_no_error_has_a_bound(self, made):
        given = errors(made[0].plan)
        given["measured"] = [[0.0] * 3 for _ in given["layers"]]
        assert errors_data(given)["tables"][0]["values"][1] == [MOST_DB] * 3

    @pytest.mark.parametrize("damage", ["no matrix", "a row too few", "layers are a number"])
    def test_other_data_are_refused(self, made, damage):
        given = errors(made[0].plan)
        if damage == "no matrix":
            del given["local"]
        elif damage == "a row too few":
            given["local"].pop()
        else:
            given["layers"] = 3
        with pytest.raises(ConfigurationError, match=r"errors"):
            errors_data(given)


class TestFile:
    @pytest.mark.slow
    def test_two_folders_of_one_name_are_told_apart(self, made, tmp_path):
        for part in ("a", "b"):
            fxquant.save(made[0], tmp_path / part / "transformer")
        path = inspect_page(tmp_path / "a" / "transformer", tmp_path / "p.html", against=tmp_path / "b" / "transformer")
        data = data_of(path)
        assert [model["name"] for model in data["models"]] == ["transformer (A)", "transformer (B)"]
        assert data["models"][0]["salience"].keys() == {"missing"}

    @pytest.mark.slow
    def test_model_and_checkpoint_give_the_same_page(self, made, tmp_path):
        quantized, statistics = made
        fxquant.save(quantized, tmp_path / "model")
        pages = [
            data_of(inspect_page(source, tmp_path / "page.html", statistics=statistics, names=["x"]))
            for source in (quantized, tmp_path / "model")
        ]
        assert pages[0] == pages[1]

    def test_shows_the_errors_that_the_plan_holds(self, made, tmp_path):
        quantized, _ = made
        quantized.plan.attribution = Attribution.from_json(errors(quantized.plan))
        fxquant.save(quantized, tmp_path / "model")
        quantized.plan.attribution = None
        data = data_of(inspect_page(tmp_path / "model", tmp_path / "p.html"))
        assert data["models"][0]["errors"] == errors_data(errors(quantized.plan))

    def test_bad_input(self, made, tmp_path):
        quantized, _ = made
        with pytest.raises(ConfigurationError, match="1 names for 2 models"):
            inspect_page(quantized, tmp_path / "p.html", against=quantized, names=["x"])
        with pytest.raises(CheckpointError, match="there is no folder"):
            inspect_page(tmp_path / "nothing", tmp_path / "p.html")
        with pytest.raises(WriteError, match="is a folder"):
            inspect_page(quantized, tmp_path)
        with pytest.raises(ConfigurationError):
            inspect_page(make_dit(), tmp_path / "p.html")
        plan = fxquant.Plan(quantized.plan.recipe, quantized.plan.model_class, "timestep")
        with pytest.raises(ConfigurationError, match="captured none"):
            inspect_page(plan, tmp_path / "p.html", model=make_dit())
        assert not (tmp_path / "p.html").exists()


def test_numbers_that_are_not_finite_are_text():
    data = page_data([{"weight_sqnr_db": math.inf}])
    assert data["models"][0]["weight_sqnr_db"] == "inf"
