"""The report: one structure behind the table and the JSON, the same for a model, its plan and its checkpoint."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.inspect.report import Report, report
from fxquant.planning.decisions import ActivationRange, Balance, LayerPlan
from fxquant.planning.plan import Plan
from tests.tiny import calibrate, make_dit


@pytest.fixture(scope="module")
def quantized():
    model = make_dit(layers=3)
    return fxquant.compile(model, recipe="ptq4dit-w4a8", calibrate=calibrate(model))


def hand_made() -> Plan:
    """A plan with every kind of row, made without a model."""
    plan = Plan("a ; b", "diffusers:SomeTransformer", "timestep")
    for number in range(12):
        name = f"blocks.{number}"
        plan.layers[f"{name}.attn.to_q"] = LayerPlan(
            "linear", "block", [8, 4], 4, 8, 0, "k", ActivationRange(-1.0, 2.0 + number, "minmax"),
            Balance("free", [f"{name}.norm.linear"], 4, f"{name}.attn.to_q"), [1.0, 2.0 + number], 20.0 + number, 30.0,
        )  # fmt: skip
        plan.layers[f"{name}.attn.to_out"] = LayerPlan(
            "linear", "block", [8, 8], 4, 8, 0, "k", None,
            Balance("vector", [f"layer_norm_{number}"], 3, "g", "gelu is nonlinear"),
        )  # fmt: skip
        plan.layers[f"{name}.ff"] = LayerPlan(
            "linear", "block", [8, 8], 4, None, 64, balance=Balance("not", reason="gelu is nonlinear")
        )
    plan.layers["proj_out"] = LayerPlan("linear", "final", [8, 8], None, None, weight_sqnr_db=math.inf)
    plan.bytes_before, plan.bytes_after = 4000, 1000
    plan.output_sqnr_db = {900.0: 30.0, 500.0: 10.0, 0.0: 20.0}
    plan.passes = [{"pass": "balance-channels", "seconds": 0.5, "edits": 3, "ops": {"aten::mul": 2, "aten::add": -1}}]
    return plan


class TestStructure:
    @pytest.mark.slow
    def test_model_plan_and_checkpoint_agree(self, quantized, tmp_path):
        fxquant.save(quantized, tmp_path / "transformer")
        assert isinstance(fxquant.report(quantized), Report)
        assert report(quantized) == report(quantized.plan) == report(tmp_path / "transformer") == report(str(tmp_path))

    def test_a_row_says_all_that_was_decided(self, quantized):
        found = report(quantized)
        row = next(layer for layer in found.layers if layer.name == "transformer_blocks.1.attn1.to_q")
        assert (row.role, row.precision, row.weight_bits, row.activation_bits) == ("block", "w4a8", 4, 8)
        assert (row.cost, row.absorbed_into) == ("free", ("transformer_blocks.1.norm1.linear",))
        assert row.balanced_channels == row.shape[1] == 16
        assert row.activation_low < 0 < row.activation_high
        assert 0 < row.spread[0] <= row.spread[1]
        assert 10 < row.weight_sqnr_db < 40 < row.activation_sqnr_db + 20
        assert "fxquant::linear" in row.kernel
        stuck = next(layer for layer in found.layers if layer.name.endswith("1.ff.net.2"))
        assert (stuck.cost, stuck.balanced_channels, stuck.reason) == ("not", 0, "gelu is nonlinear")

    def test_totals(self):
        totals = report(hand_made()).totals
        assert totals.ratio == 4.0
        assert (totals.mean_sqnr_db, totals.worst_sqnr_db, totals.worst_timestep) == (20.0, 10.0, 500.0)
        assert totals.layers_by_precision == {"w4a8": 24, "w4a16-g64": 12, "float": 1}
        assert totals.balance_by_cost == {"free": 12, "vector": 12, "tokens": 0, "not": 12}

    def test_sizes_are_those_of_the_tensors(self, quantized):
        totals = report(quantized).totals
        assert totals.bytes_before == sum(p.numel() * p.element_size() for p in make_dit(layers=3).parameters()) + sum(
            b.numel() * b.element_size() for b in make_dit(layers=3).buffers()
        )
        assert totals.bytes_after < totals.bytes_before / 2

    def test_nothing_measured(self):
        plan = hand_made()
        plan.output_sqnr_db = {}
        plan.bytes_before = 0
        found = report(plan)
        assert found.totals.mean_sqnr_db is found.totals.worst_timestep is found.totals.ratio is None
        assert "not measured" in found.table()

    def test_unknown_backend_is_no_obstacle(self):
        plan = hand_made()
        plan.backend = "somebody-elses"
        assert {layer.kernel for layer in report(plan).layers} == {"?"}

    def test_empty_plan(self):
        assert "no layers" in str(report(Plan("a ; b", "m:M", None)))


class TestJson:
    def test_it_is_strict_json_and_complete(self):
        data = json.loads(json.dumps(report(hand_made()).to_json(), allow_nan=False))
        assert len(data["layers"]) == 37
        assert data["layers"][0]["absorbed_into"] == ["blocks.0.norm.linear"]
        assert data["output_sqnr_db"] == [[900.0, 30.0], [500.0, 10.0], [0.0, 20.0]]
        assert data["totals"]["balance_by_cost"]["free"] == 12
        assert data["passes"] == [
            {"text": "balance-channels", "seconds": 0.5, "edits": 3, "ops": {"aten::mul": 2, "aten::add": -1}}
        ]

    def test_what_is_not_finite_is_a_string(self):
        assert report(hand_made()).to_json()["layers"][-1]["weight_sqnr_db"] == "inf"


class TestTable:
    def test_alike_blocks_share_a_row(self):
        lines = report(hand_made()).table().splitlines()
        row = next(line for line in lines if "attn.to_q" in line)
        assert "free: norm.linear" in row
        assert "-1..13" in row
        assert "20.0..31.0" in row
        assert sum("attn.to_q" in line for line in lines) == 1
        assert "blocks.0-11" in lines
        assert any("vector 3/8: layer_norm" in line for line in lines)

    def test_numbers_of_nodes_keep_nothing_apart(self):
        plan = hand_made()
        for number in range(12):
            plan.layers[f"blocks.{number}.ff"].balance.reason = f"add_{4 * number} is also read by add_{4 * number + 1}"
        text = report(plan).table()
        assert "blocks.*.ff (12x): add is also read by add" in text
        assert sum("ff  " in line for line in text.splitlines()) == 1
        assert "add_8 is also read by add_9" in json.dumps(report(plan).to_json())

    def test_targets_in_other_blocks_are_told_apart(self):
        plan = hand_made()
        plan.layers["blocks.2.attn.to_q"].balance.into = ["table", "blocks.2.table", "blocks.1.table", "blocks.0.table"]
        text = report(plan).table()
        assert all(name in text for name in ("blocks.2.table", "blocks.1.table", "blocks.0.table"))

    def test_every_layer_on_demand(self):
        text = report(hand_made()).table(every=True)
        assert text.count("attn.to_q") == 12
        assert "vector 3/8: layer_norm_7" in text

    def test_a_block_that_differs_stands_apart(self):
        plan = hand_made()
        plan.layers["blocks.4.attn.to_q"].weight_bits = 8
        lines = report(plan).table().splitlines()
        assert "blocks.0-3,5-11" in lines
        assert "blocks.4" in lines

    def test_reasons_are_given_once(self):
        text = report(hand_made()).table()
        assert text.count("gelu is nonlinear") == 1
        assert "blocks.*.ff (12x)" in text

    @pytest.mark.parametrize("every", [False, True])
    def test_it_fits_the_page(self, quantized, every):
        plan = hand_made()
        long = "some_transformer_blocks.3.a_very_long_submodule_name.another_one.proj_with_a_name_that_does_not_end"
        plan.layers[long] = LayerPlan("linear", "block", [8, 8], 4, 8, balance=Balance("free", [long + ".x"] * 5, 8))
        plan.layers["x" * 200] = LayerPlan("linear", "embedder", [8, 8], 8, None)
        for found in (report(plan), report(quantized)):
            assert max(map(len, found.table(every=every).splitlines())) <= 140

    def test_str_is_the_table(self, quantized):
        found = report(quantized)
        assert str(found) == found.table()
        for expected in ("output SQNR", "times smaller", "transformer_blocks.0-2", "balance-channels"):
            assert expected in str(found)


class TestDevices:
    def test_plans_and_folders_are_for_any(self, quantized, tmp_path):
        fxquant.save(quantized, tmp_path / "model")
        for source in (quantized.plan, tmp_path / "model"):
            assert str(report(source, device="cpu")) == str(report(source))

    def test_a_model_has_its_own(self, quantized):
        with pytest.raises(ConfigurationError, match="has its device already"):
            report(quantized, device="cpu")


class TestRefusals:
    def test_float_model(self):
        with pytest.raises(ConfigurationError, match="takes a quantized model"):
            report(nn.Linear(2, 2))

    def test_traced_model(self):
        with pytest.raises(ConfigurationError, match="takes a quantized model"):
            report(fxquant.trace(make_dit()))

    def test_no_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match="there is no folder"):
            report(tmp_path / "nowhere")

    def test_folder_without_checkpoint(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"holds no plan\.json"):
            report(tmp_path)

    def test_folder_with_two(self, tmp_path):
        for name in ("one", "two"):
            hand_made().save(tmp_path / name)
        with pytest.raises(CheckpointError, match="several"):
            report(tmp_path)


def test_compiled_by_torch(quantized):
    assert report(torch.compile(quantized)) == report(quantized)
