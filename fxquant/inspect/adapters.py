"""What reports show of the LoRAs that were loaded beside the layers of a quantized model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from fxquant.adapters.saving import check_saved, to_saved
from fxquant.disk.files import blaming
from fxquant.inspect.plans import checkpoint_folder
from fxquant.inspect.sources import plan_if_alone
from fxquant.planning.plan import PLAN_FILE
from fxquant.runtime.lora import adapters_of
from fxquant.runtime.model import GraphModel
from fxquant.runtime.wrappers import unwrapped
from fxquant.schemas.common import check
from fxquant.schemas.plan import CheckpointFile
from fxquant.storage.adapters import ADAPTERS_FILE
from fxquant.storage.skeleton import read_plan
from fxquant.storage.weights import headers_of
from fxquant.text import fitted, size

_FACTORS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class BranchReport:
    """What one LoRA adds beside one layer.

    Attributes:
        adapter: Name of the LoRA.
        layer: Path of the layer.
        rank: Its rank.
        scale: What multiplies the product of its factors: alpha by rank, times the weight that it was given.
        active: Whether it is added now.
        bytes: Size of its factors, as they were loaded.
    """

    adapter: str
    layer: str
    rank: int
    scale: float
    active: bool
    bytes: int

    def __str__(self) -> str:
        return f"{self.adapter}: rank {self.rank}, scale {self.scale:g}, {size(self.bytes)}, {_state(self.active)}"


@dataclass(frozen=True)
class AdapterReport:
    """One LoRA of a model.

    Attributes:
        name: Name of the LoRA.
        active: Whether it is added now.
        layers: Number of layers that it has factors for.
        ranks: Smallest and largest rank.
        scales: Smallest and largest scale; see :class:`BranchReport`.
        bytes: Size of its factors, as they were loaded. The graphs hold as much again, folded into the coordinates of
            the rewritten layers, or more if room was made for higher ranks.
    """

    name: str
    active: bool
    layers: int
    ranks: tuple[int, int]
    scales: tuple[float, float]
    bytes: int


def branches_of(source: object) -> tuple[BranchReport, ...]:
    """The branches of all LoRAs of a model, or of the folder of a checkpoint; none for a plan alone.

    Raises:
        CheckpointError: If the folder holds a damaged checkpoint.
    """
    if isinstance(source, (str, Path)):
        return _of_folder(Path(source))
    model = unwrapped(source) if isinstance(source, nn.Module) else None
    adapters = adapters_of(model) if isinstance(model, GraphModel) else None
    saved = None if adapters is None else to_saved(adapters)
    if saved is None:
        return ()
    tensors, described = saved
    return _branches(described, {name: (tuple(t.shape), t.element_size()) for name, t in tensors.items()})


def _of_folder(folder: Path) -> tuple[BranchReport, ...]:
    if not isinstance(plan_if_alone(folder), (str, Path)):
        return ()
    folder = checkpoint_folder(folder)
    data = read_plan(folder)
    with blaming(folder / PLAN_FILE):
        check(CheckpointFile, data, "the plan")
    described = data.get("adapters")
    if described is None:
        return ()
    headers = headers_of([folder / ADAPTERS_FILE])
    with blaming(folder / ADAPTERS_FILE):
        check_saved(described, headers)
    return _branches(described, {name: (one.shape, _bytes_of(one.dtype)) for name, one in headers.items()})


def _bytes_of(dtype: str) -> int:
    """Bytes of an element, from the name that safetensors gives a dtype: ``BF16``."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) // 8 if digits else 1


def _branches(
    described: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], int]]
) -> tuple[BranchReport, ...]:
    found = []
    for number, own in enumerate(described["adapters"]):
        active = own["name"] in described["active"] and not described["disabled"]
        for path, scale in own["scales"].items():
            (a, wide), (b, _) = (tensors[f"{number}.{path}{part}"] for part in _FACTORS)
            found.append(BranchReport(own["name"], path, a[0], scale, active, (prod(a) + prod(b)) * wide))
    return tuple(found)


def adapter_rows(branches: Sequence[BranchReport]) -> tuple[AdapterReport, ...]:
    """One row per LoRA."""
    rows = []
    for name in dict.fromkeys(branch.adapter for branch in branches):
        own = [branch for branch in branches if branch.adapter == name]
        ranks, scales = [branch.rank for branch in own], [branch.scale for branch in own]
        total = sum(branch.bytes for branch in own)
        ends = (min(ranks), max(ranks)), (min(scales), max(scales))
        rows.append(AdapterReport(name, own[0].active, len(own), *ends, total))
    return tuple(rows)


def adapter_table(rows: Sequence[AdapterReport]) -> str:
    """The LoRAs as text."""
    cells = [
        [row.name, _state(row.active), row.layers, _span(row.ranks), _span(row.scales), size(row.bytes)] for row in rows
    ]
    return fitted(["LoRA", "", "layers", "rank", "scale", "size"], cells, {0: 46}, right=(2, 5))


def _span(ends: tuple[float, float]) -> str:
    return "..".join(dict.fromkeys(f"{end:g}" for end in ends))


def _state(active: bool) -> str:
    return "active" if active else "off"
