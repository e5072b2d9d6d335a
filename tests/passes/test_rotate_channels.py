from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import ConfigurationError, QualityWarning
from fxquant.ir.roles import assign_roles, roles_of
from fxquant.ir.tensors import read_tensors
from fxquant.numerics.hadamard import rotate
from fxquant.passes.rotate_channels import RotateChannels, draw_signs
from fxquant.planning.layer_inputs import layer_input, moments
from fxquant.planning.rotations import Rotation
from fxquant.testing import (
    check_lifecycle,
    example_call,
    example_calls,
    graph_text,
    prove,
    tiny_dit,
    tiny_linears,
    tiny_sd3,
    try_pass,
)

ALL = "assign-precision{precision=w4a4 layers=all} ; "
EACH = "block+adaln+embedder+patch+final"
BLOCK = "transformer_blocks.0"
HADAMARD = torch.ops.fxquant.hadamard.default


def calls() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"x": torch.randn(2, 5, 16), "timestep": torch.full((2,), step)} for step in (0.9, 0.5, 0.1)]


def compiled(model: nn.Module, recipe: str, **options: Any) -> nn.Module:
    return fxquant.compile(
        model, recipe=recipe, calibrate=lambda: [model(**call) for call in example_calls(model)], **options
    )


def test_before_and_after() -> None:
    trial = try_pass(RotateChannels(roles=EACH, offline=False), tiny_linears(), calls(), before=ALL)
    lines = graph_text(trial.after).splitlines()
    assert "x_rotated: float32[B, 5, 16] = fxquant::hadamard(x, @first.rotation_signs, 16)" in lines
    assert "linear: float32[B, 5, 16] = linear(x_rotated, @first.weight, @first.bias)" in lines
    rotation = trial.plan.decisions_of(Rotation)["first"]
    assert (rotation.block, rotation.cost) == (16, "tokens")
    assert torch.equal(rotation.signs, draw_signs(0, "first", 16))
    model = tiny_linears()
    expected = rotate(model.first.weight.detach().double(), rotation.signs, 16).float()
    assert torch.equal(read_tensors(trial.after)["first.weight"], expected)


def test_layers_that_read_one_value_are_rotated_once() -> None:
    model = tiny_dit()
    trial = try_pass(RotateChannels(least=4), model, example_calls(model))
    rotations = trial.plan.decisions_of(Rotation)
    assert sum(node.target is HADAMARD for node in trial.after.graph.nodes) == 3  # q, k and v share one.
    names = [f"{BLOCK}.attn1.to_{side}" for side in "qkv"]
    assert len({tuple(rotations[name].signs.tolist()) for name in names}) == 1
    out = rotations[f"{BLOCK}.attn1.to_out.0"]
    assert (out.cost, out.into, out.reason) == ("free", [f"{BLOCK}.attn1.to_v"], None)
    assert out.block == model.config.attention_head_dim
    assert rotations[f"{BLOCK}.ff.net.2"].reason == "gelu is nonlinear"


@pytest.mark.parametrize("options", ["", " offline=False", " online=off", " layers=*.ff.net.2", " block=4"])
def test_the_rotation_is_exact(options: str) -> None:
    model = tiny_dit()
    proof = prove(f"rotate-channels{{least=4{options}}}", model, example_calls(model))
    assert proof.tier == "algebraic" and proof.error < 1e-12


@pytest.mark.slow
def test_output_projections_that_share_one_v_are_rotated_together() -> None:
    model = tiny_sd3()
    trial = try_pass("rotate-channels{least=4 online=off}", model, example_calls(model))
    rotations = trial.plan.decisions_of(Rotation)
    out, added = (rotations[f"{BLOCK}.attn.{name}"] for name in ("to_out.0", "to_add_out"))
    assert out.cost == added.cost == "free"
    assert torch.equal(out.signs, added.signs)
    assert {f"{BLOCK}.attn.to_v", f"{BLOCK}.attn.add_v_proj"} <= {*out.into}
    assert prove("rotate-channels{least=4 online=off}", model, example_calls(model)).error < 1e-12


def test_inputs_that_only_producers_may_rotate() -> None:
    model = tiny_dit()
    trial = try_pass("rotate-channels{least=4 online=off}", model, example_calls(model))
    assert not any(node.target is HADAMARD for node in trial.after.graph.nodes)
    rotation = trial.plan.decisions_of(Rotation)[f"{BLOCK}.ff.net.2"]
    assert (rotation.block, rotation.cost, rotation.reason) == (1, "not", "gelu is nonlinear")


def test_small_blocks_are_not_worth_it() -> None:
    trial = try_pass(RotateChannels(least=32, roles=EACH), tiny_linears(), calls(), before=ALL)
    assert trial.edits == 0
    rotation = trial.plan.decisions_of(Rotation)["first"]
    assert (rotation.cost, rotation.reason) == ("not", "its 16 channels allow only blocks of 16")


@pytest.mark.parametrize(
    ("options", "message"),
    [("block=12", "a power of two"), ("block=-4", "a power of two"), ("least=1", "least=1 is not possible")],
)
def test_options_that_are_refused(options: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fxquant.make_recipe(f"assign-precision ; rotate-channels{{{options}}}")


def test_a_block_that_does_not_divide_the_width_and_a_pattern_that_fits_nothing() -> None:
    model = tiny_dit()
    recipe = "assign-precision ; rotate-channels{block=32},quantize-linears"
    with pytest.raises(ConfigurationError, match=r"attn1.to_q'.*blocks of 32 channels do not divide 16; .*at most 16"):
        compiled(model, recipe)
    with pytest.raises(ConfigurationError, match=r"rotate-channels: layers='\*.ff.net.9' fits no layer"):
        compiled(model, recipe.replace("block=32", "layers=*.ff.net.9"))


def test_what_is_edited_in_a_plan_is_checked() -> None:
    model = tiny_dit()
    quantized = compiled(model, "assign-precision ; rotate-channels{layers=*.ff.net.2},quantize-linears")
    (rotation,) = quantized.plan.decisions_of(Rotation).values()
    rotation.block = 24
    with pytest.raises(ConfigurationError, match=r"layer 'transformer_blocks.0.ff.net.2'.*Edit the block in the plan"):
        fxquant.compile(model, plan=quantized.plan)
    rotation.block, rotation.signs = 64, torch.zeros(64, dtype=torch.int8)
    with pytest.raises(ConfigurationError, match="one sign of 1 or -1 per channel"):
        fxquant.compile(model, plan=quantized.plan)


def test_statistics_are_those_of_the_rotated_input() -> None:
    model = tiny_dit()
    before = "assign-precision{precision=w4a4} ; balance-channels,absorb-affines,"
    step = "rotate-channels{least=4}"
    trial = try_pass(step, model, example_calls(model), before=before)
    for name in (f"{BLOCK}.ff.net.2", f"{BLOCK}.attn1.to_out.0"):
        rotation = trial.plan.decisions_of(Rotation)[name]
        seen = trial.context.observed(name)
        factor = trial.plan.vectors.get(name, torch.ones((), dtype=torch.float64))
        rows = torch.cat(seen.rows_by_timestep).double() / factor
        expected = rotate(rows, rotation.signs, rotation.block)
        found = layer_input(trial.context, name)
        torch.testing.assert_close(torch.cat(found.rows).double(), expected, atol=1e-5, rtol=1e-5)
        if seen.moments is not None:
            turned = rotate(rotate(seen.moments.of(trial.plan.vectors.get(name)), rotation.signs, rotation.block).T,
                            rotation.signs, rotation.block)  # fmt: skip
            torch.testing.assert_close(moments(trial.context, name), turned, atol=1e-9, rtol=1e-9)


def test_attention_that_is_quantized_keeps_its_v() -> None:
    model = tiny_dit()
    before = "assign-precision{precision=w8a8 attention=quantized} ; "
    trial = try_pass("rotate-channels{least=4}", model, example_calls(model), before=before)
    assert trial.plan.decisions_of(Rotation)[f"{BLOCK}.attn1.to_out.0"].cost == "tokens"


def test_roles() -> None:
    model = tiny_dit()
    quantized = compiled(model, "assign-precision ; rotate-channels{layers=*.ff.net.2},quantize-linears")
    graph = quantized.graphs[0].graph
    assign_roles(graph)
    roles = [roles_of(node).get(f"{BLOCK}.ff.net.2") for node in graph.nodes]
    assert roles.count("rotate") == 1 and roles.count("factor") == 1


@pytest.mark.exhaustive  # ``make test`` runs the life of the composition with other passes.
def test_lifecycle() -> None:
    model = tiny_dit()
    check_lifecycle(
        "remove-no-ops,assign-precision{precision=w4a4} ; rotate-channels{least=4},quantize-linears",
        model,
        example_calls(model),
        other_shape=example_call(model, size=4),
        backends=["fake-quant", "native"],
    )


def test_it_runs_after_calibration() -> None:
    recipe = "assign-precision,rotate-channels ; quantize-linears"
    with pytest.raises(ConfigurationError, match="rotate-channels comes before calibration"):
        compiled(tiny_dit(), recipe)


@pytest.mark.slow
def test_lifecycle_of_the_composition() -> None:
    model = tiny_dit()
    recipe = (
        "remove-no-ops,assign-precision{precision=w4a4} ; group-timesteps{groups=2},shift-channels,absorb-shifts,"
        "balance-channels,absorb-affines,rotate-channels{least=4},split-low-rank{rank=2},quantize-linears"
    )
    check_lifecycle(
        recipe, model, example_calls(model), other_shape=example_call(model, size=4), backends=["fake-quant", "native"]
    )


def test_inputs_that_stay_float_are_not_rotated_and_a_warning_says_so() -> None:
    model = tiny_dit()
    with pytest.warns(QualityWarning, match=r"rotate-channels changes no layer, such as .*: inputs that stay float"):
        made = fxquant.compile(
            model, recipe="quarot-w4a16", calibrate=lambda: [model(**call) for call in example_calls(model)]
        )
    assert not made.plan.decisions_of(Rotation)


def test_inputs_that_are_too_narrow_are_not_rotated_and_a_warning_says_so() -> None:
    with pytest.warns(QualityWarning, match=r"rotates no layer, such as first: its 16 channels .* of 16, and least=32"):
        trial = try_pass(RotateChannels(roles=EACH, least=32), tiny_linears(), calls(), before=ALL)
    assert {rotation.block for rotation in trial.plan.decisions_of(Rotation).values()} == {1}
