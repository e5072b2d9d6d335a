"""Decisions about float branches of low rank beside quantized linears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxquant.planning.linears import is_rounded
from fxquant.planning.pass_decisions import Decision
from fxquant.planning.plan import Plan


@dataclass
class Branch(Decision, of="split-low-rank"):
    """The branch beside one linear. To change a branch, edit its rank in the plan.

    Attributes:
        rank: Rank of the branch; 0 if the layer has none.
        dtype: Dtype of its two factors, such as ``bfloat16``; ``model`` for that of the weight; ``half`` for float16
            beside weights of more than 16 bits, and that of the weight beside others.
        reason: Why the layer has no branch, or None.
    """

    rank: int
    dtype: str
    reason: str | None = None


def branch_rank(plan: Plan, layer: str) -> int:
    """Rank of the branch beside a layer; 0 if it has none.

    Only layers whose weight is rounded have one, whatever was decided before they got another precision.
    """
    branch, own = plan.decisions_of(Branch).get(layer), plan.layers.get(layer)
    return 0 if branch is None or own is None or not is_rounded(own) else branch.rank


def branch_bytes(plan: Plan, layer: str, dtype: torch.dtype) -> int:
    """Bytes of the two factors beside a layer of a model of this dtype; 0 if it has no branch."""
    if not branch_rank(plan, layer):
        return 0
    return factor_bytes(plan.decisions_of(Branch)[layer], plan.layer(layer).shape, dtype)


def factor_bytes(branch: Branch, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of the two factors of a branch beside a weight of this shape ``[out, in]`` and dtype."""
    return branch.rank * sum(shape) * branch_dtype(branch, dtype).itemsize


def branch_dtype(branch: Branch, model: torch.dtype) -> torch.dtype:
    """Dtype of the factors of a branch beside a weight of this dtype."""
    if branch.dtype == "half":
        return torch.float16 if model.itemsize > 2 else model
    found = model if branch.dtype == "model" else getattr(torch, branch.dtype)
    assert isinstance(found, torch.dtype)
    return found
