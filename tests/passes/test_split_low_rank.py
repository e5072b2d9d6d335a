from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fxquant
from fxquant.authoring import quantize_weight, sqnr_db
from fxquant.errors import ConfigurationError, NonFiniteError, QualityWarning
from fxquant.inspect.report import report
from fxquant.ir.roles import assign_roles, roles_of
from fxquant.ir.tensors import read_tensors
from fxquant.passes.split_low_rank import BranchType, SplitLowRank
from fxquant.planning.branches import Branch
from fxquant.testing import (
    check_lifecycle,
    example_call,
    example_calls,
    graph_text,
    prove,
    tiny_dit,
    tiny_linears,
    try_pass,
)

ALL = "assign-precision{precision=w4a4 layers=all} ; "
EACH = "block+adaln+embedder+patch+final"


def calls() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"x": torch.randn(2, 5, 16), "timestep": torch.full((2,), step)} for step in (0.9, 0.5, 0.1)]


def test_before_and_after() -> None:
    trial = try_pass(SplitLowRank(rank=4, roles=EACH), tiny_linears(), calls(), before=ALL)
    assert (
        "linear_low_rank: float32[B, 5, 16] = fxquant::low_rank"
        "(linear, x, @first.low_rank_in, @first.low_rank_out, None, @low_rank_strength)"
    ) in graph_text(trial.after).splitlines()
    assert trial.plan.decisions_of(Branch) == {"first": Branch(4, "model"), "second": Branch(4, "model")}


@pytest.mark.parametrize("options", ["", " iterations=3", " weighting=importance", " branch=bfloat16", " branch=half"])
def test_the_split_is_exact(options: str) -> None:
    proof = prove(f"split-low-rank{{rank=4 roles={EACH}{options}}}", tiny_linears(), calls(), before=ALL)
    assert proof.tier == "algebraic" and proof.error < 1e-12


def test_the_branch_is_that_of_a_plain_singular_value_decomposition() -> None:
    model = tiny_linears()
    trial = try_pass(SplitLowRank(rank=3, roles=EACH), model, calls(), before=ALL)
    tensors = read_tensors(trial.after)
    left, right = (tensors[f"first.low_rank_{side}"].numpy() for side in ("out", "in"))
    u, s, v = np.linalg.svd(model.first.weight.detach().double().numpy())
    np.testing.assert_allclose(left @ right, (u[:, :3] * s[:3]) @ v[:3], atol=1e-6)
    rest = model.first.weight.detach().numpy() - left @ right
    np.testing.assert_allclose(tensors["first.weight"].numpy(), rest, atol=1e-7)


def rounded_to_4_bits(weight: np.ndarray) -> np.ndarray:
    """Each row on a grid of its own from its smallest to its largest value, with 0 on it, in plain numpy."""
    low, high = np.minimum(weight.min(axis=1), 0), np.maximum(weight.max(axis=1), 0)
    scale = ((high - low) / 15).astype(np.float32).astype(np.float64)[:, None]
    zero = np.round(-low[:, None] / scale)
    return (np.clip(np.round(weight / scale) + zero, 0, 15) - zero) * scale


@pytest.mark.parametrize("iterations", [1, 6])
def test_iterations_are_those_of_plain_numpy(iterations: int) -> None:
    model = tiny_linears().double()
    weight = model.first.weight.detach().numpy()
    made = [{name: value.double() for name, value in call.items()} for call in calls()]
    trial = try_pass(SplitLowRank(rank=3, iterations=iterations, roles=EACH), model, made, before=ALL)
    tensors = read_tensors(trial.after)
    left, right = (tensors[f"first.low_rank_{side}"].numpy() for side in ("out", "in"))

    target, fits = weight, []
    for _ in range(iterations + 1):
        u, s, v = np.linalg.svd(target)
        branch = (u[:, :3] * s[:3]) @ v[:3]
        rest = weight - branch
        rounded = rounded_to_4_bits(rest)
        fits.append((((rest - rounded) ** 2).sum(), branch))
        target = weight - rounded
    errors = [error for error, _ in fits]
    best = errors.index(min(errors))
    assert iterations == 1 or best > 0, "no iteration was better than the first fit"
    np.testing.assert_allclose(left @ right, fits[best][1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(tensors["first.weight"].numpy(), weight - fits[best][1], rtol=0, atol=1e-12)


def test_more_iterations_never_make_the_rounded_weight_worse() -> None:
    def error(iterations: int) -> float:
        model = tiny_linears()
        step = SplitLowRank(rank=2, iterations=iterations, roles=EACH)
        trial = try_pass(step, model, calls(), before=ALL)
        tensors = read_tensors(trial.after)
        rest = tensors["first.weight"]
        rounded = quantize_weight(rest, bits=4).dequantize(torch.float32)
        return float((rest - rounded).square().sum())

    assert error(8) <= error(1) <= error(0) * 1.001
    assert error(8) < error(0)


def test_a_rank_above_the_width_is_refused_by_layer() -> None:
    with pytest.warns(
        QualityWarning, match=r"first, second: no branch, because rank 32 is above the width of a weight"
    ):
        trial = try_pass(SplitLowRank(rank=32, roles=EACH), tiny_linears(), calls(), before=ALL)
    assert trial.edits == 0
    assert trial.plan.decisions_of(Branch)["first"].rank == 0
    with pytest.warns(QualityWarning, match="a branch of rank 12 is not smaller than a weight of 16 x 16"):
        try_pass(SplitLowRank(rank=12, roles=EACH), tiny_linears(), calls(), before=ALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("rank=0", "rank 0 is not possible"),
        ("iterations=-1", "-1 iterations are not possible"),
        ("roles=blocks", "blocks is not a role"),
    ],
)
def test_options_that_are_refused(options: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fxquant.make_recipe(f"assign-precision ; split-low-rank{{{options}}}")


def test_a_pattern_that_fits_no_layer_and_a_rank_edited_in_the_plan() -> None:
    model = tiny_dit()

    def compile_it(**options: object) -> nn.Module:
        return fxquant.compile(model, calibrate=lambda: [model(**call) for call in example_calls(model)], **options)

    with pytest.raises(ConfigurationError, match=r"split-low-rank: layers='\*.ff.net.3' fits no layer"):
        compile_it(recipe="assign-precision ; split-low-rank{rank=2 layers=*.ff.net.3},quantize-linears")
    quantized = compile_it(recipe="assign-precision ; split-low-rank{rank=2 layers=*.ff.net.2},quantize-linears")
    assert list(quantized.plan.decisions_of(Branch)) == ["transformer_blocks.0.ff.net.2"]
    quantized.plan.decisions_of(Branch)["transformer_blocks.0.ff.net.2"].rank = 99
    with pytest.raises(ConfigurationError, match=r"layer 'transformer_blocks.0.ff.net.2': a branch of rank 99"):
        fxquant.compile(model, plan=quantized.plan)


def test_report_and_roles_count_the_branch() -> None:
    model = tiny_dit()
    recipe = "assign-precision{precision=w4a4} ; split-low-rank{rank=2 branch=float16},quantize-linears"
    quantized = fxquant.compile(
        model, recipe=recipe, calibrate=lambda: [model(**call) for call in example_calls(model)]
    )
    name = "transformer_blocks.0.ff.net.2"
    layer = next(layer for layer in report(quantized).layers if layer.name == name)
    out, columns = layer.shape
    assert layer.bytes_after == out * (columns // 2 + 5) + 2 * 2 * (out + columns)
    graph = quantized.graphs[0].graph
    assign_roles(graph)
    roles = [roles_of(node)[name] for node in graph.nodes if name in roles_of(node)]
    assert roles.count("branch") == 3


@pytest.mark.exhaustive  # ``make test`` runs the life of the composition with rotations, in test_rotate_channels.py.
def test_lifecycle() -> None:
    model = tiny_dit()
    recipe = "remove-no-ops,assign-precision{precision=w4a4} ; balance-channels,absorb-affines,"
    recipe += "split-low-rank{rank=4 iterations=1},quantize-linears"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QualityWarning)
        check_lifecycle(
            recipe,
            model,
            example_calls(model),
            other_shape=example_call(model, size=4),
            backends=["fake-quant", "native"],
        )


WEIGHTS_ONLY = "remove-no-ops,assign-precision{precision=w4a16} ; split-low-rank{rank=4},quantize-linears"


def test_the_split_of_layers_with_float_inputs_is_exact() -> None:
    before = "assign-precision{precision=w4a16 layers=all} ; "
    proof = prove(f"split-low-rank{{rank=4 roles={EACH}}}", tiny_linears(), calls(), before=before)
    assert proof.tier == "algebraic" and proof.error < 1e-12
    trial = try_pass(SplitLowRank(rank=4, roles=EACH), tiny_linears(), calls(), before=before)
    assert trial.plan.decisions_of(Branch) == {"first": Branch(4, "model"), "second": Branch(4, "model")}


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["", pytest.param("{rounding=gptq}", marks=pytest.mark.exhaustive)])
def test_lifecycle_with_float_inputs(rounding: str) -> None:
    model = tiny_dit()
    check_lifecycle(
        WEIGHTS_ONLY + rounding,
        model,
        example_calls(model),
        other_shape=example_call(model, size=4),
        backends=["fake-quant", "native", "torchao"],
    )


def test_branches_beside_float_inputs_lower_the_error() -> None:
    model = tiny_dit()

    def measured(recipe: str) -> float:
        made = fxquant.compile(model, recipe=recipe, calibrate=lambda: [model(**call) for call in example_calls(model)])
        pairs = [(model(**call).sample, made(**call).sample) for call in example_calls(model)]
        return min(sqnr_db(right, found) for right, found in pairs)

    with torch.no_grad():
        assert measured(WEIGHTS_ONLY) > measured(WEIGHTS_ONLY.replace("split-low-rank{rank=4},", "")) + 1


def test_weights_of_8_bits_beside_float_inputs_need_no_branch_and_a_warning_says_so() -> None:
    model = tiny_dit()
    with pytest.warns(QualityWarning, match=r"split-low-rank changes no layer, such as .*to_q: weights of 8 bits"):
        made = fxquant.compile(
            model,
            recipe=WEIGHTS_ONLY.replace("w4", "w8"),
            calibrate=lambda: [model(**call) for call in example_calls(model)],
        )
    assert not made.plan.decisions_of(Branch)


@pytest.mark.parametrize("iterations", [0, 2])
def test_factors_beyond_the_range_of_float16_are_refused(iterations: int) -> None:
    model = tiny_linears()
    model.first.weight.data.mul_(1e13)
    layers = {"rank": 2, "roles": EACH, "layers": "first", "iterations": iterations}
    with pytest.raises(NonFiniteError, match=r"layer 'first': .* too large for torch.float16; choose branch=bfloat16"):
        try_pass(SplitLowRank(branch=BranchType.HALF, **layers), model, calls(), before=ALL)
    try_pass(SplitLowRank(branch=BranchType.BFLOAT16, **layers), model, calls(), before=ALL)
