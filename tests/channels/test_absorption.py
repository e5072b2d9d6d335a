"""Whole transformers in float64: balanced with calibrated factors and absorbed, they are what they were."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from fxquant.capture.graph import CapturedGraph
from fxquant.ir.ops import recording
from fxquant.ir.tensors import copy_graph
from fxquant.pipeline.pipeline import Pipeline
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics
from tests.support import AFFINE, captured, count, outputs, relative_error

Example = tuple[nn.Module, Callable[[int], dict[str, Tensor]]]


def randomized(model: nn.Module) -> nn.Module:
    """In float64, every parameter random: zeros of the initialization would hide whole branches."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5)
    return model


def dit() -> Example:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(num_layers=2, num_attention_heads=2, attention_head_dim=8, sample_size=8)

    def inputs(batch: int) -> dict[str, Tensor]:
        return {
            "hidden_states": torch.randn(batch, 4, 8, 8, dtype=torch.float64),
            "timestep": torch.randint(0, 1000, (batch,)),
            "class_labels": torch.randint(0, 1000, (batch,)),
        }

    return model, inputs


def pixart() -> Example:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, sample_size=8,
        caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip

    def inputs(batch: int) -> dict[str, Tensor]:
        return {
            "hidden_states": torch.randn(batch, 4, 8, 8, dtype=torch.float64),
            "encoder_hidden_states": torch.randn(batch, 5, 12, dtype=torch.float64),
            "timestep": torch.randint(0, 1000, (batch,)),
        }

    return model, inputs


def sd3() -> Example:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip

    def inputs(batch: int) -> dict[str, Tensor]:
        return {
            "hidden_states": torch.randn(batch, 4, 8, 8, dtype=torch.float64),
            "encoder_hidden_states": torch.randn(batch, 5, 12, dtype=torch.float64),
            "pooled_projections": torch.randn(batch, 10, dtype=torch.float64),
            "timestep": torch.randint(0, 1000, (batch,)),
        }

    return model, inputs


def flux() -> Example:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip

    def inputs(batch: int) -> dict[str, Tensor]:
        return {
            "hidden_states": torch.randn(batch, 16, 4, dtype=torch.float64),
            "encoder_hidden_states": torch.randn(batch, 5, 12, dtype=torch.float64),
            "pooled_projections": torch.randn(batch, 10, dtype=torch.float64),
            "timestep": torch.rand(batch, dtype=torch.float64),
            "img_ids": torch.randint(0, 4, (16, 3)).double(),
            "txt_ids": torch.zeros(5, 3, dtype=torch.float64),
            "guidance": torch.ones(batch, dtype=torch.float64),
        }

    return model, inputs


def balanced(
    example: Example,
    dearest: str = "vector",
    roles: str = "block",
    layers: str = "default",
    overrides: str = "",
    first: str = "",
) -> tuple[CapturedGraph, Plan]:
    """Calibrate on random inputs, balance and absorb; the outputs must stay what they were, for any batch."""
    model, inputs = example
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = captured(randomized(model), timestep_name="timestep", **inputs(2))
    module, plan = found.module, Plan("", "", "timestep")
    arguments = {batch: call_inputs(found, inputs(batch)) for batch in (2, 3)}
    expected = {batch: outputs(module, *tensors) for batch, tensors in arguments.items()}
    Pipeline.parse(f"remove-no-ops,assign-precision{{layers={layers} overrides={overrides}}}").run(module, plan)
    observed, context = copy_graph(module), PassContext(plan, Statistics())
    Pipeline.parse("insert-observers").run(observed, plan)
    with recording(context.statistics.record):
        for batch in (2, 3):
            outputs(observed, *call_inputs(found, inputs(batch)))
    Pipeline.parse(f"{first}balance-channels{{dearest={dearest} roles={roles}}},absorb-affines").run(module, context)
    for batch, tensors in arguments.items():
        assert relative_error(outputs(module, *tensors), expected[batch]) < 1e-12
    assert plan.vectors
    assert all(not torch.equal(vector, torch.ones_like(vector)) for vector in plan.vectors.values())
    return found, plan


def call_inputs(found: CapturedGraph, inputs: dict[str, Tensor]) -> list[Tensor]:
    return [inputs[name] for name, _ in found.call.tensors]


def costs(plan: Plan, part: str) -> dict[str, str]:
    """Cost of each balanced layer whose name has this part."""
    return {name: layer.balance.cost for name, layer in plan.layers.items() if part in name and layer.balance}


def reasons(plan: Plan, part: str) -> set[Any]:
    return {layer.balance.reason for name, layer in plan.layers.items() if part in name and layer.balance}


BY_TIMESTEP = {("pixart", 3), ("flux", 1)}
"""Both ways to modulate, from a shared table and in each block, and attention of one stream and of two."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "groups"),
    [
        pytest.param(*case, marks=[pytest.mark.exhaustive] * (case not in BY_TIMESTEP))
        for case in itertools.product(["dit", "pixart", "sd3", "flux"], [1, 3])
    ],
)
def test_shifts_by_timestep_are_absorbed_too(make: str, groups: int) -> None:
    first = f"group-timesteps{{groups={groups}}},shift-channels,absorb-shifts,"
    found, plan = balanced(globals()[make](), first=first)
    shifts = {name: layer.shift for name, layer in plan.layers.items() if layer.shift}
    free = {name for name, shift in shifts.items() if shift.cost in ("free", "vector")}
    assert {name for name, layer in plan.layers.items() if layer.shift and layer.balance.cost == "free"} <= free
    assert all(shift.reason for name, shift in shifts.items() if name not in free)
    assert all(plan.vectors[f"{name}.shift"].shape[0] == groups for name in free)
    assert not [node for node in found.module.graph.nodes if node.target is AFFINE and node.args[2] is not None]


@pytest.fixture(scope="module")
def dit_result() -> tuple[CapturedGraph, Plan]:
    return balanced(dit())


@pytest.mark.slow
def test_dit_is_balanced_for_free(dit_result: tuple[CapturedGraph, Plan]) -> None:
    found, plan = dit_result
    for part in ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"):
        assert len(costs(plan, part)) == 2
        assert set(costs(plan, part).values()) == {"free"}, part
    assert count(found.module, AFFINE) == 0


def test_dit_second_feed_forward_is_behind_gelu(dit_result: tuple[CapturedGraph, Plan]) -> None:
    _, plan = dit_result
    assert set(costs(plan, "ff.net.2").values()) == {"not"}
    assert reasons(plan, "ff.net.2") == {"gelu is nonlinear"}
    assert not [name for name in plan.vectors if "ff.net.2" in name]


def test_dit_q_k_and_v_are_one_group(dit_result: tuple[CapturedGraph, Plan]) -> None:
    _, plan = dit_result
    groups = {plan.layers[f"transformer_blocks.0.attn1.{name}"].balance.group for name in ("to_q", "to_k", "to_v")}
    assert groups == {"transformer_blocks.0.attn1.to_q"}
    assert torch.equal(plan.vectors["transformer_blocks.0.attn1.to_q"], plan.vectors["transformer_blocks.0.attn1.to_v"])
    assert len({id(layer) for layer in plan.layers.values() if layer.balance}) == 12


def test_pixart_takes_a_multiplication_of_its_shared_time_vector() -> None:
    found, plan = balanced(pixart())
    for part in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.0.proj"):
        assert list(costs(plan, part).values()) == ["vector", "vector"], part
    for part in ("attn1.to_out.0", "attn2.to_out.0", "attn2.to_k"):
        assert list(costs(plan, part).values()) == ["free", "free"], part
    assert set(costs(plan, "attn2.to_q").values()) == {"not"}
    assert count(found.module, AFFINE) == 2  # One a block, for attention and feed-forward together.
    groups = {layer.balance.group for name, layer in plan.layers.items() if "attn1.to_q" in name}
    assert len(groups) == 2


def test_pixart_blocks_share_their_factors_if_only_free_ones_are_allowed() -> None:
    found, plan = balanced(pixart(), dearest="free")
    assert count(found.module, AFFINE) == 0
    assert set(costs(plan, "attn1.to_q").values()) == {"free"}
    assert torch.equal(*(plan.vectors[f"transformer_blocks.{block}.attn1.to_q"] for block in (0, 1)))


def test_sd3_text_and_image_projections_share_the_joint_value() -> None:
    found, plan = balanced(sd3())
    assert count(found.module, AFFINE) == 0
    for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_v_proj", "to_out.0", "to_add_out", "net.0.proj"):
        assert set(costs(plan, part).values()) == {"free"}, part
    names = [f"transformer_blocks.0.attn.{name}" for name in ("to_out.0", "to_add_out")]
    first, second = (plan.layers[name].balance for name in names)
    assert first.group == second.group
    assert torch.equal(plan.vectors[names[0]], plan.vectors[names[1]])


def test_flux_is_balanced_and_its_single_stream_in_part() -> None:
    found, plan = balanced(flux())
    assert count(found.module, AFFINE) == 0
    for part in ("attn.to_q", "attn.to_v", "add_v_proj", "to_out.0", "to_add_out", "net.0.proj", "proj_mlp"):
        assert set(costs(plan, part).values()) == {"free"}, part
    balance = plan.layers["single_transformer_blocks.0.proj_out"].balance
    assert (balance.cost, balance.channels, balance.reason) == ("free", 16, "gelu is nonlinear")


def test_layers_outside_of_blocks_may_be_balanced() -> None:
    # But for the embedders: the sinusoids that these read are in float32, whatever the model's dtype.
    _, plan = balanced(pixart(), roles="block+patch+final", layers="all")
    assert plan.layers["proj_out"].balance.cost == "vector"


def test_a_float_layer_does_not_stand_in_the_way_of_those_that_read_the_same_value() -> None:
    _, plan = balanced(dit(), overrides="*.to_q=float")
    for part in ("to_k", "to_v"):
        assert set(costs(plan, part).values()) == {"free"}
    assert not costs(plan, "to_q")  # It was not balanced itself, but its weight undoes the factor.
