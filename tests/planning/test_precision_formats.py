"""Precisions that name number formats, and the groups of weights that share scales."""

from __future__ import annotations

import pytest

from fxquant.errors import ConfigurationError
from fxquant.numerics.formats import FORMATS, is_integer
from fxquant.planning.precision import Precision


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wfp8afp8", Precision(8, 8, 0, "fp8", "fp8")),
        ("wmxfp4amxfp8", Precision(4, 8, 32, "mxfp4", "mxfp8")),
        ("wnvfp4anvfp4", Precision(4, 4, 16, "nvfp4", "nvfp4")),
        ("wmxfp4a16", Precision(4, None, 32, "mxfp4")),
        ("wnf4a16-g64", Precision(4, None, 64, "nf4")),
        ("w4afp8", Precision(4, 8, 0, None, "fp8")),
        ("wfp8afp8-b128", Precision(8, 8, 128, "fp8", "fp8", 128)),
        ("wfp8a16-b64x128", Precision(8, None, 128, "fp8", None, 64)),
        ("w8a8-tensor", Precision(8, 8, 0, None, None, 0)),
    ],
)
def test_text_and_back(text: str, expected: Precision) -> None:
    assert Precision.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("name", [name for name in FORMATS if not is_integer(name)])
def test_every_format_has_a_precision(name: str) -> None:
    assert str(Precision.parse(f"w{name}a16")) == f"w{name}a16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wmxfp4a16-g32", "mxfp4 has blocks of 32 input channels; write wmxfp4a16"),
        ("w8anf4", "nf4 is a format of weights only"),
        ("wint4a8", "write w4a8"),
        ("w4aint8", "write w4a8"),
        ("wfp8afp16", "Formats by name: fp8"),
        ("wfp8afp8-b128x128", "write wfp8afp8-b128"),
    ],
)
def test_what_is_no_precision(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Precision.parse(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((8, 8, 32, "mxfp4"), "mxfp4 has 4 bits, not 8; set weight_bits to 4, or weight_format to null"),
        ((4, 8, 0, "mxfp4"), "set group_size to 32"),
        ((4, 8, 32, "mxfp4", None, 8), "group_rows to 1"),
        ((8, 8, 0, "posit8"), "weight_format: unknown format 'posit8'. Known: fp8, "),
        ((8, 8, 0, None, "posit8"), "activation_format: unknown format 'posit8'"),
        ((4, 8, 0, "int4"), "integers have no weight_format"),
        ((8, 8, 0, None, None, -1), "a group of -1 output channels"),
    ],
)
def test_edits_that_contradict_each_other(options: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Precision(*options)  # type: ignore[arg-type]
