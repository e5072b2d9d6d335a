"""Finished segments of a reconstruction, one file per segment, so that an interrupted run continues from there."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxquant.disk.files import share
from fxquant.disk.whole_file import whole_file
from fxquant.numerics.weights import QuantizedWeight

log = logging.getLogger(__name__)

_KEY = "fxquant-reconstruction"
_FIELDS = ("packed", "scale", "zero_point")


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
    """A folder of finished segments; without a folder nothing is kept.

    Args:
        folder: The folder, created when there is something to keep; None to keep nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def load(self, name: str, fingerprint: str) -> Learned | None:
        """What was learned for a segment with this fingerprint; None if there is nothing, or if the file is damaged."""
        path = self._path(name)
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_KEY])
                if header["fingerprint"] != fingerprint:
                    log.info("%s is from another run; %s is learned anew", path, name)
                    return None
                codes = {layer: _weight(file, layer, *grid) for layer, grid in header["codes"].items()}
                ranges = {layer: (low, high) for layer, (low, high) in header["ranges"].items()}
                before, after = header["errors"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            log.warning("%s cannot be read (%s); %s is learned anew", path, error, name)
            return None
        return Learned(codes, ranges, (before, after))

    def save(self, name: str, fingerprint: str, learned: Learned) -> None:
        """Keep what was learned for a segment; the file is written completely or not at all.

        Raises:
            WriteError: If it cannot be written.
        """
        path = self._path(name)
        if path is None:
            return
        header = {
            "fingerprint": fingerprint,
            "codes": {layer: [w.bits, w.group_size, w.in_features] for layer, w in learned.codes.items()},
            "ranges": {layer: list(ends) for layer, ends in learned.ranges.items()},
            "errors": list(learned.errors),
        }
        tensors = {
            f"{layer}.{part}": getattr(weight, part).contiguous()
            for layer, weight in learned.codes.items()
            for part in _FIELDS
        }
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, metadata={_KEY: json.dumps(header)})
            share(unfinished)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name.replace('/', '_')}.safetensors"


def _weight(file: Any, layer: str, bits: int, group_size: int, in_features: int) -> QuantizedWeight:
    packed, scale, zero_point = (file.get_tensor(f"{layer}.{part}") for part in _FIELDS)
    return QuantizedWeight(packed, scale, zero_point, f"int{bits}", group_size, in_features)
