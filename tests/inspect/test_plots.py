"""Pictures for papers: what the figures show, and the files."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxquant
from fxquant.errors import (
    CalibrationError,
    CheckpointError,
    ConfigurationError,
    MissingPackageError,
    UnknownNameError,
    WriteError,
)
from fxquant.inspect import plots
from fxquant.inspect.history import rewrite_history
from fxquant.inspect.salience import layers_with_salience, salience, weight_salience
from fxquant.planning.decisions import LayerPlan, TimestepGroups
from fxquant.planning.plan import Plan
from tests.tiny import calibrate, make_dit

TO_Q = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def made():
    model = make_dit()
    statistics = fxquant.Statistics()
    quantized = fxquant.compile(model, recipe="ptq4dit-w4a8", calibrate=calibrate(model), statistics=statistics)
    return model, quantized, statistics


def grouped() -> Plan:
    plan = Plan("a ; b", "diffusers:Some", "timestep", timesteps=[100.0, 300.0, 500.0, 700.0])
    merges = [[100.0, 300.0, 1.0], [500.0, 700.0, 2.0], [100.0, 500.0, 9.0]]
    plan.layers["a"] = LayerPlan("linear", "block", [8, 8], 4, 8, timesteps=TimestepGroups([400.0], merges))
    plan.layers["b"] = LayerPlan("linear", "block", [8, 8], 4, 8)
    return plan


class TestSalience:
    def test_balancing_divides_the_input_and_multiplies_the_weight(self, made):
        model, quantized, statistics = made
        found = salience(quantized.plan, statistics, TO_Q, weight_salience(model, quantized.plan))
        factor = quantized.plan.vectors[TO_Q].double()
        assert found.timesteps == [100.0, 500.0, 900.0]
        torch.testing.assert_close(found.after, found.before / factor)
        weight = model.get_submodule(TO_Q).weight.detach().double().abs().amax(0)
        torch.testing.assert_close(found.weight_before, weight)
        torch.testing.assert_close(found.weight_after, weight * factor)

    def test_weights_of_a_model_and_of_its_checkpoint_agree(self, made, tmp_path):
        model, quantized, _ = made
        fxquant.save(quantized, tmp_path / "model")
        held = weight_salience(quantized, quantized.plan)
        read = weight_salience(tmp_path / "model", quantized.plan)
        exact = weight_salience(model, quantized.plan)
        assert held.keys() == read.keys() == exact.keys()
        assert all(torch.equal(held[name], read[name]) for name in held)
        for name in (TO_Q, "transformer_blocks.0.attn1.to_k"):  # Other weights also took up the factors of others.
            assert (held[name] - exact[name]).abs().max() < 0.1 * exact[name].max()

    def test_one_layer_for_each_observed_input(self, made):
        _, quantized, statistics = made
        names = layers_with_salience(quantized.plan, statistics)
        assert TO_Q in names and "transformer_blocks.0.attn1.to_k" not in names
        assert len(names) == len(set(names)) == len(statistics)


class TestFigures:
    def test_salience_has_a_curve_for_each_timestep(self, made):
        model, quantized, statistics = made
        weights = weight_salience(model, quantized.plan)
        figure = plots.salience_figure(quantized.plan, statistics, TO_Q, weights)
        axes = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
        assert [len(axis.lines) for axis in axes] == [3, 3, 1, 1]
        high = [max(line.get_ydata().max() for line in axis.lines) for axis in axes]
        factor = quantized.plan.vectors[TO_Q]
        assert high[1] <= high[0] / float(factor.min()) * 1.001

    def test_errors_leave_what_was_not_measured_empty(self):
        figure = plots.errors_figure(["a", "b"], [1.0, 2.0, 3.0], [[10, None, 30], [1, 2, 3]])
        shown = figure.axes[0].images[0].get_array()
        assert shown.shape == (2, 3) and bool(shown.mask[0, 1]) and shown[1, 2] == 3
        with pytest.raises(ConfigurationError, match="2 layers and 1 timesteps"):
            plots.errors_figure(["a", "b"], [1.0], [[1.0]])

    def test_output(self, made):
        _, quantized, _ = made
        figure = plots.output_figure({"ours": quantized.plan, "unmeasured": grouped()})
        (line,) = figure.axes[0].lines
        assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == quantized.plan.output_sqnr_db
        with pytest.raises(ConfigurationError, match="not measured"):
            plots.output_figure({"unmeasured": grouped()})

    def test_dendrogram(self):
        figure = plots.timesteps_figure(grouped(), "a")
        assert len(figure.axes[0].lines) == 3 + 1  # Three merges and one boundary.
        steps, groups = [100.0, 300.0, 500.0, 700.0], grouped().layers["a"].timesteps
        lines = plots.dendrogram_lines(steps, groups.dendrogram, groups.boundaries)
        assert lines == [
            ([0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0], 0),
            ([2.0, 2.0, 3.0, 3.0], [0.0, 2.0, 2.0, 0.0], 1),
            ([0.5, 0.5, 2.5, 2.5], [1.0, 9.0, 9.0, 2.0], None),
        ]
        with pytest.raises(ConfigurationError, match="group-timesteps"):
            plots.timesteps_figure(grouped(), "b")
        with pytest.raises(CalibrationError, match="no layer 'c'"):
            plots.timesteps_figure(grouped(), "c")

    def test_block_before_and_after_a_pass(self, made):
        history = rewrite_history(made[1])
        figure = plots.block_figure(history, "transformer_blocks.0", "quantize-linears")
        before, after = figure.axes
        words = [[text.get_text() for text in axis.texts] for axis in (before, after)]
        assert "quantize" not in words[0] and "quantize" in words[1]
        assert words[0].count("linear") == words[1].count("linear")
        colours = {tuple(round(part, 2) for part in patch.get_edgecolor()) for patch in after.patches}
        assert len(colours) >= 3  # Unchanged, added and rewired.
        with pytest.raises(UnknownNameError, match="module"):
            plots.block_figure(history, "blocks.9", "quantize-linears")
        with pytest.raises(UnknownNameError, match="step"):
            plots.block_figure(history, "transformer_blocks.0", "quantise")

    def test_lines_pass_by_the_nodes_in_between(self, made):
        from fxquant.inspect.drawing import HEIGHT, WIDTH, layered, nodes_inside

        nodes = nodes_inside(rewrite_history(made[1]).steps[-1].nodes, "transformer_blocks.0")
        layout = layered(nodes)
        assert set(layout.centres) == {state.name for state in nodes}
        for (source, reader), points in layout.lines.items():
            assert layout.centres[source][1] < layout.centres[reader][1]
            for name, (x, y) in layout.centres.items():
                if name not in (source, reader):
                    inside = [
                        p for p in points if abs(p[0] - x) < WIDTH / 2 - 0.01 and abs(p[1] - y) < HEIGHT / 2 - 0.01
                    ]
                    assert not inside, (source, reader, name)


class TestFiles:
    @pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
    def test_formats(self, suffix, start, tmp_path):
        plots.save_figure(plots.timesteps_figure(grouped(), "a"), tmp_path / f"picture{suffix}")
        assert (tmp_path / f"picture{suffix}").read_bytes().startswith(start)

    def test_text_of_svg_stays_text(self, tmp_path):
        plots.save_figure(plots.timesteps_figure(grouped(), "a"), tmp_path / "picture.svg")
        assert ">timestep<" in (tmp_path / "picture.svg").read_text()

    def test_bad_paths(self, tmp_path):
        figure = plots.timesteps_figure(grouped(), "a")
        with pytest.raises(ConfigurationError, match=r"\.svg"):
            plots.save_figure(figure, tmp_path / "picture.gif")
        (tmp_path / "folder.png").mkdir()
        with pytest.raises(WriteError, match="is a folder"):
            plots.save_figure(figure, tmp_path / "folder.png")

    def test_without_matplotlib_the_error_says_how_to_install_it(self, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
        with pytest.raises(MissingPackageError, match=r"pip install 'fxquant\[plots\]'"):
            plots.timesteps_figure(grouped(), "a")


def test_numbers_that_are_missing_are_nan():
    figure = plots.errors_figure(["a"], [1.0], [[None]])
    assert figure.axes[0].images[0].get_array().mask.all() or math.isnan(figure.axes[0].images[0].get_array()[0, 0])


def test_names_are_text_and_not_mathematics(tmp_path):
    plan = Plan("a ; b", "diffusers:Some", "timestep", output_sqnr_db={100.0: 20.0})
    plots.save_figure(plots.output_figure({r"$\bad$": plan, "_hidden": plan}), tmp_path / "output.svg")
    assert r"$\bad$" in (tmp_path / "output.svg").read_text()
    assert "_hidden" in (tmp_path / "output.svg").read_text()
    plots.save_figure(plots.errors_figure([r"$\bad$"], [1.0], [[3.0]]), tmp_path / "errors.svg")
    assert r"$\bad$" in (tmp_path / "errors.svg").read_text()


@pytest.mark.parametrize("length", [60, 3000])
def test_long_names_leave_room_for_the_heat_map(length, tmp_path, recwarn):
    figure = plots.errors_figure(["x" * length] * 3, [1.0, 2.0], [[1.0, 2.0]] * 3)
    plots.save_figure(figure, tmp_path / "errors.png")
    assert not [str(one.message) for one in recwarn if "layout" in str(one.message)]


def test_statistics_of_another_model_or_other_timesteps_are_refused(made):
    _, quantized, _ = made
    wide, others = fxquant.Statistics(), fxquant.Statistics()
    model = make_dit(num_attention_heads=4)
    fxquant.compile(model, recipe="ptq4dit-w8a8", calibrate=calibrate(model), statistics=wide, measure=0)
    model = make_dit()
    fxquant.compile(model, recipe="ptq4dit-w8a8", calibrate=calibrate(model, (7, 77)), statistics=others, measure=0)
    with pytest.raises(CalibrationError, match=f"another model: the input of {TO_Q} has 32 channels .* 16 in the plan"):
        salience(quantized.plan, wide, TO_Q)
    with pytest.raises(CalibrationError, match="another calibration: the model was calibrated at timestep 100"):
        salience(quantized.plan, others, TO_Q)


def test_an_unknown_layer_is_refused_with_the_nearest():
    with pytest.raises(CalibrationError, match="knows no layer 'c'; it has a, b"):
        plots.timesteps_figure(grouped(), "c")


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100])
def test_weights_that_cannot_be_read_are_refused_by_name(made, content, tmp_path):
    quantized = made[1]
    fxquant.save(quantized, tmp_path / "model")
    path = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        weight_salience(tmp_path / "model", quantized.plan)


def test_weights_of_another_shape_are_refused_by_name(made, tmp_path):
    quantized = made[1]
    fxquant.save(quantized, tmp_path / "model")
    path = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors[f"{TO_Q}.weight_packed"] = tensors[f"{TO_Q}.weight_packed"][:3].clone()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{TO_Q}"):
        weight_salience(tmp_path / "model", quantized.plan)
