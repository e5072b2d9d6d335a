"""Codes that were kept are taken back only for a weight of their shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxquant.disk.finished_work import Part
from fxquant.numerics.weights import encode_weight
from fxquant.planning.kept_weights import check_weight, part_of_weights


def part(format: str = "int4", group_size: int = 16) -> Part:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    return part_of_weights({"a": encode_weight(weight, format=format, group_size=group_size)})


@pytest.mark.parametrize(
    ("format", "group_size"), [("int4", 0), ("int8", 16), ("nf4", 32), ("fp8", 0), ("mxfp4", 32), ("nvfp4", 16)]
)
def test_whole_codes_of_every_kind_are_taken(format: str, group_size: int) -> None:
    check_weight(part(format, group_size), "a", (8, 64))


DAMAGE: dict[str, Callable[[Part], Any]] = {
    "no codes": lambda part: part.tensors.pop("a.packed"),
    "another name": lambda part: part.data.update(b=part.data.pop("a")),
    "codes of another dtype": lambda part: part.tensors.update({"a.packed": part.tensors["a.packed"].float()}),
    "fewer rows": lambda part: part.tensors.update({"a.packed": part.tensors["a.packed"][:4]}),
    "fewer scales": lambda part: part.tensors.update({"a.scale": part.tensors["a.scale"][:, :1]}),
    "scales of another dtype": lambda part: part.tensors.update({"a.scale": part.tensors["a.scale"].int()}),
    "NaN": lambda part: part.tensors["a.scale"].fill_(float("nan")),
    "zero points of another dtype": lambda part: part.tensors.update({"a.zero_point": part.tensors["a.scale"]}),
    "another width": lambda part: part.data["a"].__setitem__(2, 63),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_codes_are_refused(name: str) -> None:
    damaged = part()
    DAMAGE[name](damaged)
    with pytest.raises((ValueError, KeyError, RuntimeError)):
        check_weight(damaged, "a", (8, 64))
