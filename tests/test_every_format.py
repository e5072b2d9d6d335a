"""Every number format through everything that a quantized model is used for, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import BackendError, CheckpointError, ConfigurationError, FxquantError
from fxquant.export.int8 import export_int8
from fxquant.export.onnx import export_onnx
from fxquant.numerics.formats import FORMATS
from fxquant.numerics.weights import stored_bytes
from fxquant.planning.decisions import AttentionPlan
from fxquant.planning.plan import PLAN_FILE
from fxquant.testing.lifecycle import check_lifecycle
from tests.tiny import calibrate, inputs, make_dit, run

WIDE: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
"""A width of 32, which blocks of 32 channels divide."""

LIVES = (
    *("rtn-wfp8afp8", "rtn-dynamic-wfp8e5m2afp8-b16", "htg-wnvfp4anvfp4", "ptq4dit-gptq-wmxfp4amxfp8"),
    *("rtn-dynamic-wnvfp4anvfp4", "rtn-wnf4a16-g16", "rtn-wmxfp6amxfp6e3m2", "rtn-w4afp8-tensor"),
)
SAMPLE = LIVES[2:3]


def model() -> nn.Module:
    return make_dit(**WIDE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.exhaustive) for name in LIVES]
)
def test_a_whole_life(recipe: str) -> None:
    calls = [inputs(timestep=step, seed=seed) for seed, step in enumerate((50, 500, 900))]
    found = check_lifecycle(recipe, model(), calls, other_shape=inputs(size=4))
    assert found.output_sqnr_db > 20


def test_an_error_falls_with_bits_and_finer_scales() -> None:
    float_model = model()
    expected, statistics = run(float_model), fxquant.Statistics()
    errors = {}
    for precision in ("wfp8afp8", "wnvfp4anvfp4", "wmxfp4amxfp4"):
        made = fxquant.compile(
            float_model, recipe=f"rtn-{precision}", calibrate=calibrate(float_model), statistics=statistics, measure=0
        )
        errors[precision] = float((run(made) - expected).square().mean())
        report = fxquant.report(made)
        layer = next(layer for layer in report.layers if layer.role == "block")
        assert precision in str(report) and layer.precision == precision
    assert [*errors.values()] == sorted(errors.values())


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    float_model = model()
    made = fxquant.compile(float_model, recipe="rtn-wnvfp4a16", measure=0, calibrate=calibrate(float_model))
    plan = made.plan
    assert plan is not None
    tensors = made.tensors()
    name, layer = next((name, layer) for name, layer in plan.layers.items() if layer.weight_format == "nvfp4")
    held = [value for key, value in tensors.items() if key.startswith(f"{name}.weight_")]
    shape = layer.shape[0], layer.shape[1]
    assert sum(value.nbytes for value in held) == stored_bytes(FORMATS["nvfp4"], shape, 16)
    # 4 bits a value, 8 bits per 16 values, and one float32.
    assert sum(value.nbytes for value in held) == shape[0] * shape[1] // 2 + shape[0] * shape[1] // 16 + 4


def test_codes_survive_another_dtype() -> None:
    float_model = model()
    made = fxquant.compile(float_model, recipe="rtn-wnvfp4anvfp4", measure=0, calibrate=calibrate(float_model))
    before = {name: value.clone() for name, value in made.tensors().items() if value.dtype == torch.uint8}
    made.to(torch.bfloat16)
    after = made.tensors()
    assert before and all(torch.equal(after[name], value) for name, value in before.items())


def test_native_decodes_weights_of_every_format_and_refuses_products_of_floats() -> None:
    float_model = model()
    for recipe in ("rtn-wnf4a16-b16", "rtn-wnvfp4a16", "rtn-w4a16-tensor"):
        reference = fxquant.compile(float_model, recipe=recipe, measure=0, calibrate=calibrate(float_model))
        native = fxquant.compile(float_model, plan=reference.plan, backend="native{attention=float}")
        torch.testing.assert_close(run(native), run(reference), rtol=1e-4, atol=1e-5)
    with pytest.raises(BackendError, match=r"its weight has the format mxfp4, and the products .* take int2, .* int8"):
        fxquant.compile(
            float_model, recipe="rtn-wmxfp4amxfp8", measure=0, calibrate=calibrate(float_model), backend="native"
        )


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("rtn-wmxfp4amxfp4", {}, r"groups of 32 do not divide the 16 input channels of .* layers"),
        ("rtn-wfp8afp8-b48", WIDE, r"blocks of 48 output channels|groups of 48"),
        ("rtn-adaround-wfp8afp8", WIDE, r"learned rounding chooses between two neighbouring integers"),
        ("q-diffusion-w8afp8", WIDE, r"learns the steps of integer activations"),
    ],
)
def test_what_does_not_fit_is_refused(recipe: str, options: dict[str, Any], message: str) -> None:
    float_model = make_dit(**options)
    with pytest.raises(ConfigurationError, match=message):
        fxquant.compile(float_model, recipe=recipe, measure=0, calibrate=calibrate(float_model))


@pytest.mark.parametrize("precision", ["wfp9afp8", "wmxfp4afoo", "wfpafp8"])
def test_unknown_formats_list_those_known(precision: str) -> None:
    with pytest.raises(FxquantError, match=r"Formats by name: fp8, fp8e5m2, mxfp4, .*nvfp4"):
        fxquant.make_recipe(f"rtn-{precision}")


def test_a_checkpoint_of_a_format_that_is_not_installed_says_so(tmp_path: Path) -> None:
    float_model = model()
    made = fxquant.compile(float_model, recipe="rtn-wfp8afp8", measure=0, calibrate=calibrate(float_model))
    made.plan.save(tmp_path)
    data = json.loads((tmp_path / PLAN_FILE).read_text())
    assert all("group_rows" not in layer for layer in data["layers"].values())
    for layer in data["layers"].values():
        if layer.get("weight_format"):
            layer["weight_format"] = "posit8"
    (tmp_path / PLAN_FILE).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="number format 'posit8', which is not known here; install the package"):
        fxquant.Plan.load(tmp_path)


def test_exports_of_integers_refuse_other_formats_by_layer(tmp_path: Path) -> None:
    float_model = model()
    made = fxquant.compile(float_model, recipe="rtn-wfp8afp8", measure=0, calibrate=calibrate(float_model))
    message = r"(?s)cannot hold this model:.*(weights in|input has|weight has) the format fp8: .*transformer_blocks.0"
    with pytest.raises(ConfigurationError, match=message):
        export_int8(made, tmp_path / "int8")
    with pytest.raises(ConfigurationError, match=message) as said:
        export_onnx(made, tmp_path / "onnx")
    listed = next(line for line in str(said.value).splitlines() if "its input has the format fp8" in line)
    assert "_codes" not in listed and "transformer_blocks.0.attn1.to_v" in listed
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "nf4"}, r"nf4 has 4 bits, not 8; set bits to 4"),
        ({"format": "nf4", "bits": 4}, r"nf4 is a format of weights only; .* null for integers, or to one of fp8"),
        ({"format": "nvfp4", "bits": 4}, r"nvfp4 needs other scales than one per q, k and v"),
        ({"format": "mxfp8"}, r"mxfp8 needs other scales"),
        ({"bits": 4}, r"fp8 has 8 bits, not 4"),
        ({"format": "int8"}, r"integers have no format"),
        ({"format": "posit8"}, r"unknown format 'posit8'. Known: fp8"),
        ({"softmax_bits": 9}, r"9 bits; 2 to 8"),
    ],
)
def test_formats_of_attention_in_a_plan_are_checked(changes: dict[str, Any], message: str) -> None:
    plan = fxquant.Plan("", "", None, attentions={"attn": AttentionPlan(8, 8, format="fp8")})
    plan.check()
    for name, value in changes.items():
        setattr(plan.attentions["attn"], name, value)
    with pytest.raises(ConfigurationError, match=f"attention attn: {message}"):
        plan.check()


def test_a_refused_block_says_how_to_leave_a_layer_out() -> None:
    float_model = make_dit()
    with pytest.raises(ConfigurationError, match=r"give these layers another one: overrides=transformer_blocks\.0\."):
        fxquant.compile(float_model, recipe="rtn-wmxfp4amxfp4", measure=0, calibrate=calibrate(float_model))
    recipe, float_model = fxquant.make_recipe("rtn-wmxfp4amxfp4", "all"), model()
    with pytest.raises(ConfigurationError, match=r"another format for it: overrides=pos_embed\.proj=w8a8"):
        fxquant.compile(float_model, recipe=recipe, measure=0, calibrate=calibrate(float_model))
