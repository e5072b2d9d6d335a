"""Names with options in text; those of passes are tested with pipelines."""

from __future__ import annotations

import enum
from typing import Any

import pytest

from fxquant.backends.fake_quant import FakeQuant
from fxquant.backends.native import Native
from fxquant.errors import BackendError, ConfigurationError, UnknownNameError
from fxquant.pipeline.backend import resolve_backend
from fxquant.pipeline.options import read_named


class Side(enum.Enum):
    LEFT = "left"
    RIGHT = "right"


TYPES = {"count": int, "share": float, "whole": bool, "side": Side, "text_of_it": str}


def read(text: str) -> tuple[str, dict[str, Any]]:
    return read_named(text, "thing", lambda name: TYPES)


def test_options_are_read_by_their_types() -> None:
    assert read(" thing_2 ") == ("thing_2", {})
    assert read("a-b{}") == ("a-b", {})
    found = read("x{count=3 share=0.5 whole=True side=right text-of-it=a=b}")
    assert found == ("x", {"count": 3, "share": 0.5, "whole": True, "side": Side.RIGHT, "text_of_it": "a=b"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b", "'a b' is not a thing; write name or name{option=value option=value}"),
        ("a{count=3", "is not a thing"),
        ("a{size=3}", "thing 'a' has no option 'size=3'. Its options: count, share, side, text-of-it, whole"),
        ("a{count}", "the option 'count' has no value; write count=value"),
        ("a{count=few}", "a: count='few' cannot be read as int"),
        ("a{whole=yes}", "a: whole='yes' cannot be read as bool"),
        ("a{side=up}", r"a: side='up' cannot be read as Side \(left, right\)"),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read(text)


def test_backends_by_text() -> None:
    assert isinstance(resolve_backend("fake-quant"), FakeQuant)
    made = resolve_backend("native{kernels=onednn packed=False attention=float}")
    assert isinstance(made, Native)
    assert (made._asked.value, made._packed, made._bf16_attention) == ("onednn", False, False)
    with pytest.raises(UnknownNameError, match="unknown backend 'abacus'"):
        resolve_backend("abacus{beads=10}")
    with pytest.raises(ConfigurationError, match=r"'fake-quant' has no option 'speed=2'\. Its options: none"):
        resolve_backend("fake-quant{speed=2}")
    with pytest.raises(ConfigurationError, match="Its options: attention, branches, kernels, packed"):
        resolve_backend("native{device=cuda}")  # That is the model's.
    with pytest.raises(BackendError, match="choose bf16 or float"):
        resolve_backend("native{attention=int7}")
