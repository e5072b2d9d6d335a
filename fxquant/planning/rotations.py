"""Decisions about rotations of the inputs of linears."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxquant.planning.pass_decisions import Decision


@dataclass
class Rotation(Decision, of="rotate-channels"):
    """How the input of one linear is rotated: ``x' = (x * signs) H``.

    Attributes:
        block: Channels per Hadamard matrix; 1 if the input is not rotated.
        cost: ``free``: producers of the input are rotated offline; ``tokens``: the input is rotated at run time;
            ``not``: it is not rotated.
        signs: 1 or -1 per channel, int8 ``[in]``.
        into: The layers that are rotated offline.
        reason: Why the input is not rotated, or not offline; or None.
    """

    block: int
    cost: str
    signs: Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.int8))
    into: list[str] = field(default_factory=list)
    reason: str | None = None
