"""Finished segments of a reconstruction, one file per segment, so that an interrupted run continues from there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxquant.disk.finished_work import FinishedWork, Part, check_numbers
from fxquant.numerics.weights import QuantizedWeight
from fxquant.planning.kept_weights import check_weight, part_of_weights, weights_of_part


@dataclass(frozen=True)
class Learned:
    """What was learned for one segment.

    Attributes:
        codes: Weights, by layer.
        ranges: Lowest and highest values of inputs, one per bin of timesteps, by layer.
        errors: Error of the outputs relative to their energy, before and after.
    """

    codes: Mapping[str, QuantizedWeight]
    ranges: Mapping[str, tuple[list[float], list[float]]]
    errors: tuple[float, float]


def digest(text: str, tensors: Iterable[Tensor]) -> str:
    """A fingerprint of what a segment is learned from: settings, weights, inputs."""
    found = hashlib.blake2b(text.encode(), digest_size=16)
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return found.hexdigest()


class Store:
    """Finished segments; without a folder nothing is kept.

    Args:
        work: Where they are kept, or None.
    """

    def __init__(self, work: FinishedWork | None) -> None:
        self.work = work

    def load(self, name: str, made_from: Mapping[str, str], device: torch.device | str = "cpu") -> Learned | None:
        """What was learned for a segment; None if there is nothing, it is damaged, or it was made from other data."""
        return None if self.work is None else self.work.load(name, made_from, lambda part: _learned(part, device))

    def save(self, name: str, made_from: Mapping[str, str], learned: Learned) -> None:
        """Keep what was learned for a segment; the file is written completely or not at all.

        Raises:
            WriteError: If it cannot be written.
        """
        if self.work is None:
            return
        codes = part_of_weights(learned.codes)
        ranges = {layer: list(ends) for layer, ends in learned.ranges.items()}
        data = {"codes": codes.data, "ranges": ranges, "errors": list(learned.errors)}
        self.work.save(name, made_from, codes.tensors, data)


def _learned(part: Part, device: torch.device | str) -> Learned:
    """What a part holds.

    Raises:
        ValueError: A range or an error is not a finite number, or a weight cannot be decoded.
    """
    ranges = {layer: (low, high) for layer, (low, high) in part.data["ranges"].items()}
    before, after = part.data["errors"]
    for low, high in ranges.values():
        if not (np.isfinite(low).all() and np.isfinite(high).all() and np.shape(low) == np.shape(high)):
            raise ValueError("a range does not consist of finite numbers")
    check_numbers(Part({}, [before, after]), 2)
    codes = Part(part.tensors, part.data["codes"])
    for name, held in codes.data.items():
        check_weight(codes, name, (len(part.tensors[f"{name}.packed"]), held[2]))
    return Learned(weights_of_part(codes, device), ranges, (before, after))
