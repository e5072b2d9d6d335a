"""Models that are not from diffusers."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import Entry, Maker
from tests.zoo.own import OwnDiT


def _own(make: Maker) -> dict[str, Any]:
    labels = torch.randint(0, 10, (make.batch,), generator=make.generator)
    return {"x": make.latents(4), "t": make.time(), "y": labels}


ENTRIES = [
    Entry("OwnDiT", {}, _own, timestep="t", other_prompt=None, make=OwnDiT),
    Entry(
        "OwnDiT",
        {"explicit": False, "gated": True},
        _own,
        timestep="t",
        other_prompt=None,
        variant="-gated",
        make=OwnDiT,
    ),
]
