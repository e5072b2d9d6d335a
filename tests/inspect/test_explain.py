"""The story of one layer: decisions with their passes and reasons, ranges, bytes, code and steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import fxquant
from fxquant.errors import ConfigurationError, UnknownNameError
from fxquant.inspect.choices import Choice
from fxquant.inspect.explain import Explanation, explain
from fxquant.planning.attribution import Attribution, LayerErrors
from fxquant.runtime.model import GraphModel
from tests.inspect.test_report import hand_made
from tests.tiny import calibrate, make_dit

OUT = "transformer_blocks.0.attn1.to_out.0"
KEY = "transformer_blocks.0.attn1.to_k"
EMBEDDER = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    model = make_dit()
    recipe = fxquant.make_recipe("htg-w4a8").with_options("group-timesteps", groups=2)
    return fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), measure=0)


@pytest.fixture(scope="module")
def out(quantized: GraphModel) -> Explanation:
    return explain(quantized, OUT)


def choice(found: Explanation, about: str) -> Choice:
    return next(one for one in found.choices if one.about == about)


def test_model_and_checkpoint_agree(quantized: GraphModel, out: Explanation, tmp_path: Path) -> None:
    fxquant.save(quantized, tmp_path / "model")
    assert explain(tmp_path / "model", OUT) == out


def test_decisions_with_their_passes_and_reasons(out: Explanation) -> None:
    assert [one.about for one in out.choices] == [
        *("precision", "statistics", "timesteps", "shift", "balance", "rounding", "range")
    ]
    assert choice(out, "timesteps").pass_text == "group-timesteps{groups=2}"
    balance = choice(out, "balance")
    assert balance.pass_text == "balance-channels{salience=moving-average}"
    assert balance.decided.startswith("16 of 16 channels, absorbed at cost free into transformer_blocks.0.attn1.to_v")


def test_where_a_factor_went(out: Explanation) -> None:
    event = next(event for event in out.events if event.step == "absorb-affines")
    assert event.elsewhere[0].startswith("transformer_blocks.0.attn1.to_v.weight: folded times ")
    own = next(event for event in out.events if event.step == "balance-channels")
    assert own.tensors[0].startswith(f"{OUT}.weight: folded times ")
    assert f"absorbed by {event.elsewhere[0]}" in str(out)


def test_a_layer_that_could_not_be_balanced(quantized: GraphModel) -> None:
    found = explain(quantized.plan, "transformer_blocks.0.ff.net.2")
    assert choice(found, "balance").decided == "not done: nothing upstream can absorb it"
    assert choice(found, "balance").reason == "gelu is nonlinear"


def test_why_float(quantized: GraphModel) -> None:
    found = explain(quantized.plan, "proj_out_2")
    assert (found.precision, found.kernel) == ("float", "aten float")
    assert found.reason == "layers=default keeps layers of role final in float; layers=all quantizes them"
    assert "its role is final" in choice(found, "balance").reason
    embedder = explain(quantized.plan, EMBEDDER)
    assert embedder.reason.endswith("in 8 bits and keeps their activations in float")
    assert f"float because  {found.reason}" in str(found)


def test_ranges_of_bins_and_of_a_timestep(quantized: GraphModel) -> None:
    found = explain(quantized.plan, KEY)
    plan = quantized.plan.layers[KEY]
    assert [(one.low, one.high) for one in found.ranges] == list(
        zip(plan.activation.low, plan.activation.high, strict=True)
    )
    assert [one.interval for one in found.ranges] == ["t <= 300", "300 < t"]
    assert [one.timesteps for one in found.ranges] == [(100.0,), (500.0, 900.0)]
    at = explain(quantized.plan, KEY, timestep=500)
    assert at.bin == 1
    text = str(at)
    assert "ranges at timestep 500" in text and "bin 1: 300 < t" in text and "bin 0" not in text
    assert explain(quantized.plan, KEY, timestep=300).bin == 0


def test_bytes_are_those_of_the_tensors(quantized: GraphModel, out: Explanation) -> None:
    held = {name: tensor for name, tensor in quantized.tensors().items() if name.startswith(f"{OUT}.")}
    assert out.bytes_after == sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    assert out.bytes_before == (16 * 16 + 16) * 4
    plan = explain(quantized.plan, OUT)  # The weight alone.
    assert (plan.bytes_before, plan.bytes_after) == (16 * 16 * 4, 16 * 16 // 2 + 16 * 5)
    assert explain(quantized, EMBEDDER).bytes_shared == (f"{EMBEDDER}@2",)


def test_code_and_nodes(out: Explanation) -> None:
    assert out.module_class == "torch.nn.modules.linear.Linear"
    assert out.source.startswith("diffusers/models/attention_processor.py:")
    assert any("fxquant::linear (product)" in node for node in out.nodes)
    event = next(event for event in out.events if event.step == "quantize-linears")
    assert any(text.startswith("- linear") for text in event.nodes)
    assert any(text.startswith("+ linear_default") for text in event.nodes)


def test_attentions_and_products(quantized: GraphModel) -> None:
    found = explain(quantized, "transformer_blocks.0.attn1")
    assert (found.kind, found.reason) == ("attention", "the recipe keeps attention in float")
    assert found.module_class == "diffusers.models.attention_processor.Attention"
    plan = hand_made()
    plan.products["mixer.matmul:53"] = "it is a product of two activations"
    assert explain(plan, "mixer.matmul:53").reason == "it is a product of two activations"


def test_decisions_of_other_passes_and_unreadable_recipes() -> None:
    plan = hand_made()
    plan.layers["blocks.1.ff"].activation_bits = None
    found = explain(plan, "blocks.1.attn.to_q")
    assert choice(found, "balance").pass_text == "balance-channels"
    assert "code" in str(found) and "not known from a plan alone" in str(found)


def test_measured_errors() -> None:
    plan, name = hand_made(), "blocks.1.attn.to_q"
    cells = (0.01, None)
    errors = LayerErrors(name, (900.0, 100.0), cells, cells, cells, (0.001, 0.1), (None, None))
    plan.attribution = Attribution("estimated", (900.0, 100.0), (0.1, 0.1), {name: errors}, 1, 8, 1.0)
    found = explain(plan, name)
    assert (found.errors, found.share) == (errors, 1.0)
    assert "errors of this layer alone; 100.0 % of the contributions of all layers" in str(found)
    assert "timestep 900: its output 20.0 dB, the model's output 30.0 dB" in str(found)
    assert "timestep 100: its output not measured, the model's output 10.0 dB" in str(found)
    plan.layers[name].activation.low, plan.layers[name].activation.high = -1.0, 1.0
    assert "timestep 900" not in str(explain(plan, name, timestep=90))
    assert json.loads(json.dumps(found.to_json()))["errors"]["local"] == [0.01, None]


def test_it_is_json(quantized: GraphModel, out: Explanation) -> None:
    data = json.loads(json.dumps(out.to_json(), allow_nan=False))
    assert data["choices"][0]["about"] == "precision" and data["events"][0]["step"] == "remove-no-ops"


class TestRefusals:
    def test_unknown_layer(self, quantized: GraphModel) -> None:
        with pytest.raises(UnknownNameError, match=r"unknown layer 'transformer_blocks\.0\.attn1\.to_o'.*to_out\.0"):
            explain(quantized, "transformer_blocks.0.attn1.to_o")

    @pytest.mark.parametrize("timestep", [math.nan, math.inf])
    def test_a_timestep_that_is_not_a_number(self, quantized: GraphModel, timestep: float) -> None:
        with pytest.raises(ConfigurationError, match="give a finite number"):
            explain(quantized, KEY, timestep=timestep)

    def test_no_range_at_a_timestep(self, quantized: GraphModel) -> None:
        with pytest.raises(ConfigurationError, match="proj_out_2 has no range of its input, so none at timestep 500"):
            explain(quantized, "proj_out_2", timestep=500)
