"""Rounded weights that several conversions from the same statistics share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from fxquant.numerics.weights import QuantizedWeight
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.plan import Plan
from fxquant.planning.precision import Precision
from fxquant.statistics.collection import Statistics


@dataclass(eq=False)
class Roundings:
    """Weights that were rounded by the statistics of their inputs, to be used by later conversions.

    Most of the time of such roundings goes into the second moments of the inputs, which are the same for all number
    formats and too large to be kept in factorized form. So a layer is rounded in all wanted precisions at once.

    Attributes:
        wanted: Gives the other precisions that a layer of a plan will be rounded in.
        found: The weights, by everything that they depend on.
    """

    wanted: Callable[[Plan, str], Sequence[Precision]]
    found: dict[Hashable, QuantizedWeight] = field(default_factory=dict)

    @contextmanager
    def used_with(self, statistics: Statistics) -> Iterator[None]:
        """Conversions from these statistics take roundings from here, and add theirs."""
        before, statistics.roundings = statistics.roundings, self
        try:
            yield
        finally:
            statistics.roundings = before


def digest_of_values(values: Tensor) -> bytes:
    """A digest of a float tensor's bits."""
    whole = values.detach().contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.sha256(whole.data).digest()


def with_precision(layer: LayerPlan, precision: Precision) -> LayerPlan:
    """A copy of a layer's entry in the plan, with another precision."""
    return replace(layer, **{option.name: getattr(precision, option.name) for option in fields(precision)})
