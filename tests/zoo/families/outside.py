"""Models that are not from diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.zoo.entry import Entry, Maker
from tests.zoo.own import OwnDiT
from tests.zoo.own_published import PublishedDiT, PublishedMMDiT
from tests.zoo.own_streams import OwnStreams
from tests.zoo.own_uvit import OwnUViT
from tests.zoo.own_video import OwnVideoDiT


def _labels(make: Maker) -> Tensor:
    return torch.randint(0, 10, (make.batch,), generator=make.generator)


def _own(make: Maker) -> dict[str, Any]:
    return {"x": make.latents(4), "t": make.time(), "y": _labels(make)}


def _video(make: Maker) -> dict[str, Any]:
    """Videos of two frames, padded by three tokens, and a prompt for each."""
    return {
        "x": list(make.latents(4, 2).unbind()), "t": make.time(), "context": list(make.text(16).unbind()),
        "seq_len": 2 * (make.size // 2) ** 2 + 3,
    }  # fmt: skip


def _streams(make: Maker) -> dict[str, Any]:
    return {
        "img": make.tokens(4), "img_ids": make.grid()[:, 1:].expand(make.batch, -1, -1), "txt": make.text(12),
        "txt_ids": make.no_grid(2).expand(make.batch, -1, -1), "timesteps": make.unit_time(),
        "y": make.normal(make.batch, 10),
    }  # fmt: skip


def _mmdit(make: Maker) -> dict[str, Any]:
    return {"x": make.latents(4), "t": make.time(), "y": make.normal(make.batch, 10), "context": make.text(12)}


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
    Entry("OwnVideoDiT", {}, _video, timestep="t", make=OwnVideoDiT),
    Entry("OwnStreams", {}, _streams, timestep="timesteps", make=OwnStreams),
    Entry(
        "OwnUViT",
        {},
        lambda make: {"x": make.latents(4), "timesteps": make.time(), "y": _labels(make)},
        timestep="timesteps",
        other_size=None,
        other_prompt=None,
        make=OwnUViT,
    ),
    Entry("PublishedDiT", {}, _own, timestep="t", other_size=None, other_prompt=None, make=PublishedDiT),
    Entry("PublishedMMDiT", {}, _mmdit, timestep="t", make=PublishedMMDiT),
]
