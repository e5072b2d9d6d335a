"""Times of layers by themselves and of whole calls, on the machine that searches.

A layer is timed as the backend lowers it: a linear of its shape with random weights, with the quantization of its
input and the branch beside it. Layers of the same shape and precision are timed once. What is compared runs in turns,
so that a machine that slows down slows all of it.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxquant import api
from fxquant.errors import QualityWarning
from fxquant.inspect.profiling.roofline import timed
from fxquant.pipeline.backend import Backend
from fxquant.pipeline.recipes import Recipe
from fxquant.planning.branches import branch_rank
from fxquant.planning.plan import Plan
from fxquant.planning.precision import FLOAT, ROLES
from fxquant.planning.sensitivities import LayerSensitivity

_ROUNDS = (5, 40)
"""The fewest and the most measured rounds."""
_SECONDS = 0.5
"""Seconds for the rounds of layers of one shape, if the fewest take no longer."""
_CALL_SECONDS = 4.0

Work = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """What the time of a layer depends on.

    Attributes:
        rows: Vectors that a call multiplies with the weight: tokens of all samples.
        shape: Output and input features.
        precision: The precision, such as ``w4a8-g64``.
        by_token: Whether the range of its input is found for each token.
        rank: Rank of the branch beside it.
    """

    rows: int
    shape: tuple[int, int]
    precision: str
    by_token: bool
    rank: int

    @classmethod
    def of(cls, layer: LayerSensitivity, plan: Plan, by_token: bool, batch: int) -> Timed:
        """What is timed for a layer of a plan, in calls with this many samples."""
        own = plan.layer(layer.name)
        by_token = by_token and own.activation_bits is not None
        rows = max(layer.macs // max(layer.weights, 1), 1) * max(batch, 1)
        return cls(rows, (own.shape[0], own.shape[1]), str(own.precision), by_token, branch_rank(plan, layer.name))


class _Linears(nn.Module):
    """Linears that read the same value."""

    def __init__(self, shape: tuple[int, int], count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(shape[1], shape[0]) for _ in range(count))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(block(x) for block in self.blocks)


def time_layers(
    wanted: Sequence[Timed], backend: Backend, dtype: torch.dtype, device: torch.device
) -> dict[Timed, tuple[float, float]]:
    """Milliseconds of layers: the quantization of the input, which readers of a value share, and all else.

    One linear takes q + l, two that read the same value take q + 2 l; both are timed.
    """
    found: dict[Timed, tuple[float, float]] = {}
    shapes = dict.fromkeys((one.rows, one.shape) for one in wanted)
    for rows, shape in shapes:
        own = [one for one in dict.fromkeys(wanted) if (one.rows, one.shape) == (rows, shape)]
        x = torch.randn(1, rows, shape[1], generator=torch.Generator().manual_seed(0)).to(device, dtype)
        works = [_work(one, count, x, backend) for one in own for count in (1, 2)]
        times = in_turns(works, device, _SECONDS)
        for number, one in enumerate(own):
            alone, both = (statistics.median(times[2 * number + extra]) for extra in (0, 1))
            shared = 0.0 if one.precision == str(FLOAT) else min(max(2 * alone - both, 0.0), alone)
            found[one] = (shared, alone - shared)
    return found


def _work(one: Timed, count: int, x: Tensor, backend: Backend) -> Work:
    """One or two such layers, lowered to the backend."""
    with torch.random.fork_rng(devices=[]):
        model = _Linears(one.shape, count).to(x.device, x.dtype).eval()
    if one.precision == str(FLOAT):
        return lambda: model(x)
    search = "dynamic" if one.by_token else "minmax"
    branch = f"split-low-rank{{rank={one.rank} roles={'+'.join(ROLES)}}}," if one.rank else ""
    text = (
        f"remove-no-ops,assign-precision{{precision={one.precision} layers=all}} ; "
        f"{branch}quantize-linears{{activation-range={search}}}"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QualityWarning)  # About random weights.
        made = api.compile(
            model, recipe=Recipe.parse(text), calibrate=lambda: model(x), backend=backend, timestep=None, measure=0
        )
    module = made.captured[0].module
    return lambda: module(x)


def time_calls(
    model: nn.Module, quantized: nn.Module, arguments: Mapping[str, Any], device: torch.device
) -> tuple[float, float]:
    """Milliseconds of a call of both models, medians of calls in turns."""
    works: list[Work] = [lambda: model(**arguments), lambda: quantized(**arguments)]
    first, second = in_turns(works, device, _CALL_SECONDS)
    return statistics.median(first), statistics.median(second)


def in_turns(works: Sequence[Work], device: torch.device, seconds: float) -> list[list[float]]:
    """Milliseconds of each piece of work in each round: a few rounds, or as many as fit in these seconds."""
    least, most = _ROUNDS
    found: list[list[float]] = [[] for _ in works]
    with torch.no_grad():
        for work in works:  # The first run allocates, and may compile kernels.
            work()
        began = time.monotonic()
        for number in range(most):
            if number >= least and time.monotonic() - began > seconds:
                break
            for work, own in zip(works, found, strict=True):
                own.append(1e3 * timed(work, device)[1])
    return found


def machine_text(device: torch.device) -> str:
    """The machine that measures, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
