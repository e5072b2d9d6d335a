"""Formats that other packages add: which are refused when they are registered, and unusual ones that work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxquant
from fxquant.authoring import Scales, register_format
from fxquant.errors import ConfigurationError, DuplicateNameError
from fxquant.numerics.activations import round_by_token
from fxquant.numerics.formats import FORMATS, Format
from fxquant.numerics.formats.blocks import MX
from fxquant.numerics.formats.elements import SmallFloat
from fxquant.planning.precision import Precision
from fxquant.registry import Registry
from tests.numerics.formats.own import BytesOfScales, Doubled, registered
from tests.tiny import calibrate, make_dit, run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, "has 9 bits"),
        ({"name": "other"}, "calls itself 'other'"),
        ({"scale_dtype": torch.float16}, "scales in torch.float16"),
        ({"global_scales": True}, "scales of scales and no block"),
        ({"zero_points": True}, "zero points and scales of 8 bits"),
        ({"zero_points": True, "block": 8, "scale_dtype": torch.float32}, "zero points and a block"),
    ],
)
def test_formats_that_cannot_work_are_refused_at_once(changes: dict[str, Any], message: str) -> None:
    format = BytesOfScales()
    for name, value in changes.items():
        setattr(format, name, value)
    with pytest.raises(ConfigurationError, match=message):
        register_format("byte4")(format)
    assert "byte4" not in FORMATS


def test_what_is_no_format_is_refused_at_once() -> None:
    with pytest.raises(ConfigurationError, match=r"not an instance of fxquant\.authoring\.Format"):
        register_format("byte4")(BytesOfScales)  # type: ignore[arg-type]


def boom(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("boom")


def writes(format: Any, x: torch.Tensor, scales: Scales) -> torch.Tensor:
    return BytesOfScales.encode(format, x.mul_(0.5), scales)


def asks_values(format: Any, x: torch.Tensor, scales: Scales) -> torch.Tensor:
    return BytesOfScales.encode(format, x if bool(x.sum() > 0) else -x, scales)


MISBEHAVING: tuple[tuple[str, Any, str], ...] = (
    ("encode", boom, r"encode failed: RuntimeError: boom; repair the format"),
    ("decode", boom, r"decode failed: RuntimeError: boom"),
    ("values", boom, r"values failed"),
    ("scales", lambda self, low: None, r"scales failed: TypeError"),
    ("scales", lambda self, low, high, **options: low, r"scales returned a Tensor, not fxquant\.authoring\.Scales"),
    (
        "scales",
        lambda self, low, high, **options: Scales(torch.ones(3)),
        r"scales returned the shape \[3\] in place of",
    ),
    ("scales", lambda self, low, high, **options: Scales(low.float()), r"scales returned torch.float32 in place of"),
    ("scale_values", lambda self, scale: scale * float("nan"), r"scales makes a scale of 0, NaN or infinity"),
    ("encode", lambda self, x, scales: None, r"encode returned a NoneType, not a tensor"),
    ("encode", lambda self, x, scales: BytesOfScales().encode(x, scales)[..., :1], r"encode returned the shape"),
    ("encode", lambda self, x, scales: BytesOfScales().encode(x, scales).int(), r"returned torch.int32 in place of"),
    ("encode", lambda self, x, scales: BytesOfScales().encode(x, scales) + 16, r"which 4 bits cannot hold"),
    ("encode", writes, r"encode writes into a tensor that it was given"),
    ("encode", asks_values, r"encode failed"),
    ("decode", lambda self, codes, scales, dtype: codes.double(), r"decode returned torch.float64 in place of"),
    ("decode", lambda self, codes, scales, dtype: codes.to(dtype) * float("nan"), r"makes NaN or infinity of codes"),
    ("values", lambda self: torch.arange(5.0), r"values returned the shape \[5\] in place of \[16\]"),
    ("global_scale", lambda self, low, high: high, r"the format says global_scales = False"),
)


@pytest.mark.parametrize(("method", "wrong", "message"), MISBEHAVING)
def test_formats_that_misbehave_are_refused_at_once(method: str, wrong: Any, message: str) -> None:
    made = type("Misbehaving", (BytesOfScales,), {method: wrong, "__module__": "somewhere"})()
    with pytest.raises(ConfigurationError, match=rf"the format 'byte4' \(somewhere\): its method .*{message}"):
        register_format("byte4")(made)
    assert "byte4" not in FORMATS


@pytest.mark.parametrize("changes", [{"bits": None}, {"bits": 4.0}, {"bits": True}, {"block": "8"}, {"block": 8.0}])
def test_attributes_of_another_type_are_refused_at_once(changes: dict[str, Any]) -> None:
    format = BytesOfScales()
    vars(format).update(changes)
    ((what, value),) = changes.items()
    with pytest.raises(ConfigurationError, match=f"'byte4' has {what}={value!r}; set a whole number"):
        register_format("byte4")(format)


def test_a_format_that_fails_on_the_values_of_a_model_is_named() -> None:
    class Fragile(BytesOfScales):
        def encode(self, x: torch.Tensor, scales: Scales) -> torch.Tensor:
            if x.numel() > 100:
                raise RuntimeError("boom")
            return super().encode(x, scales)

    model = make_dit()
    with (
        registered(Fragile()),
        pytest.raises(ConfigurationError, match=r"the format 'byte4' .*encode failed: RuntimeError: boom"),
    ):
        fxquant.compile(model, recipe="rtn-wbyte4a16", calibrate=calibrate(model), measure=0)


def test_a_cell_of_a_notebook_runs_twice_and_names_stay_unique() -> None:
    with registered(Doubled()):
        register_format("wide6")(Doubled())
        other = Doubled()
        other.weights_only = True
        with pytest.raises(DuplicateNameError, match="wide6"):
            register_format("wide6")(other)
    assert FORMATS["mxfp4"].block == 32
    with pytest.raises(DuplicateNameError, match="mxfp4"):
        register_format("mxfp4")(MX("mxfp4", SmallFloat(2, 1)))


def test_a_format_of_fxquant_is_not_replaced_before_it_is_loaded() -> None:
    registry: Registry[Format] = Registry("format", "fxquant.formats")  # As in a new process: nothing is loaded.
    with pytest.raises(DuplicateNameError, match="mxfp4"):
        registry.register("mxfp4")(MX("mxfp4", SmallFloat(3, 2)))
    assert registry["mxfp4"] is FORMATS["mxfp4"]
    registry.register("mxfp4")(FORMATS["mxfp4"])  # The one that the entry point names.


def test_names_that_can_be_read_in_two_ways_are_refused() -> None:
    first, second = Doubled(), Doubled()
    first.name, second.name = "x", "xax"
    with registered(first, second):
        assert Precision.parse("wxax") == Precision(6, 6, 0, "x", "x")
        with pytest.raises(ConfigurationError, match=r"weights in x and activations in xax or weights in xax"):
            Precision.parse("wxaxax")


@pytest.mark.parametrize("recipe", ["rtn-dynamic-w{0}a{0}", "rtn-w{0}a{0}"])
@pytest.mark.parametrize("format", [BytesOfScales(), Doubled()], ids=lambda format: format.name)
def test_scales_of_unusual_formats_are_those_of_the_format(format: Any, recipe: str) -> None:
    with registered(format):
        float_model = make_dit()
        made = fxquant.compile(
            float_model, recipe=recipe.format(format.name), measure=0, calibrate=calibrate(float_model)
        )
        exact, found = run(float_model), run(made)
        assert 0 < float((found - exact).square().mean() / exact.square().mean()) < 0.05
        if "dynamic" in recipe and format.zero_points:  # The op's scales are those of the format, not of integers.
            x = torch.randn(4, 16)
            grid = torch.ops.fxquant.token_grid(x, format.name)
            codes = torch.ops.fxquant.quantize(x, grid[0], grid[1], format.name)
            decoded = (codes.float() - grid[1]) * grid[0]
            torch.testing.assert_close(decoded, round_by_token(x, format))


def test_convolutions_and_attention_refuse_scales_of_8_bits_before_calibration() -> None:
    with registered(BytesOfScales()):
        float_model = make_dit()
        recipe = fxquant.make_recipe("rtn-wbyte4abyte4", "all")
        with pytest.raises(ConfigurationError, match=r"layer pos_embed\.proj: .* byte4 has one of 8 bits; .*a16"):
            fxquant.compile(float_model, recipe=recipe, measure=0, calibrate=calibrate(float_model))
        recipe = recipe.with_options("assign-precision", overrides="pos_embed.proj=float")
        made = fxquant.compile(float_model, recipe=recipe, measure=0, calibrate=calibrate(float_model))
        (attention,) = made.plan.attentions.values()
        assert attention.bits is None and "no scales of 8 bits for byte4" in str(attention.reason)


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 1e-34])
def test_zeros_stay_0_where_the_scale_of_nvfp4_is_too_small(largest: float) -> None:
    x = torch.linspace(-largest, largest, 64).reshape(1, 64)
    x[0, 5] = 0.0
    rounded = round_by_token(x, FORMATS["nvfp4"])
    assert rounded[0, 5] == 0 and float(rounded.double().abs().max()) <= 1.25 * float(x.double().abs().max())
