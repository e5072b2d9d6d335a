"""Samples of calibration calls with the float output, and the error of a quantized model on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.capture.calls import Call
from fxquant.numerics.sqnr import sqnr_db

if TYPE_CHECKING:
    from fxquant.distributed.team import Team

RUN_SAMPLES = 16  # Samples of a call that are kept to run the graph again.
KEPT_SAMPLES = 4  # Samples of a call that are kept to measure the output error.


@dataclass
class Sample:
    """Part of one calibration call, with the float model's output.

    Attributes:
        timestep: The timestep of the first kept sample. If each token has a timestep, that of the noisiest token.
        arguments: Keyword arguments of the call, with a few samples of the batch.
        output: The first tensor of the float output.
    """

    timestep: float
    arguments: dict[str, Any]
    output: Tensor


def timestep_of(call: Call, name: str | None) -> float:
    """The timestep of the first sample of a call. If each token has a timestep, that of the noisiest token.

    0 for a model without a timestep.
    """
    if name is None:
        return 0.0
    step = call.leaf(str(name))
    return float((step[0] if step.dim() > 1 else step.flatten()[:1]).max())


def output_sqnr(model: nn.Module, samples: Sequence[Sample], team: Team | None = None) -> dict[float, float]:
    """SQNR in dB of a model's output against the float output, by timestep, the noisiest first.

    Args:
        model: The quantized model.
        samples: The samples; the same on all ranks of a team.
        team: Processes that run the samples together, or None.
    """
    by_step: dict[float, list[tuple[Tensor, Tensor]]] = {}
    mine = samples if team is None else [samples[number] for number in team.share(len(samples))]
    outputs = [_first_output(model, sample) for sample in mine]
    if team is not None:
        outputs = [output for found in team.gather(outputs) for output in found]
    for sample, output in zip(samples, outputs, strict=True):
        by_step.setdefault(sample.timestep, []).append((sample.output.flatten(), output.flatten()))
    found = {}
    for step in sorted(by_step, reverse=True):
        reference, actual = (torch.cat(side) for side in zip(*by_step[step], strict=True))
        found[step] = sqnr_db(reference, actual)
    return found


def _first_output(model: nn.Module, sample: Sample) -> Tensor:
    with torch.no_grad():
        output = model(**sample.arguments)
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
