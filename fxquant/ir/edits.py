"""The record of what one pass did to a graph: nodes made, erased and rewired, and tensors made and changed.

The rewriter writes the record. It lives as long as its reader keeps it: an instrument gets it with the record of the
pass (:class:`fxquant.pipeline.pipeline.PassRecord`). Plans hold only the counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

NodeChange = Literal["made", "erased", "rewired"]
TensorChange = Literal["made", "copied", "folded", "replaced", "dropped"]
Span = tuple[float, float]
"""The smallest and the largest of some numbers."""

KINDS = ("rows", "columns", "affine")
"""First entries of ``by`` (:meth:`fxquant.ir.rewriter.Rewriter.fold`) that a factor follows, and maybe a shift."""


@dataclass(frozen=True)
class NodeEdit:
    """A change of one node.

    Attributes:
        what: ``made``, ``erased``, or ``rewired``: it has other arguments.
        node: Name of the node.
    """

    what: NodeChange
    node: str


@dataclass(frozen=True)
class TensorEdit:
    """A change of one tensor.

    Attributes:
        what: ``made``; ``copied``, because other nodes still read the original; ``folded``: multiplied and shifted, or
            ``replaced`` by a tensor computed from it in another way; ``dropped``: its values are gone, because the
            tensor is about to lose its last reader.
        tensor: Name of the tensor.
        source: For a copy: name of the original.
        along: What the factor has one number for: ``rows``, ``columns`` or ``affine`` (it broadcasts against the
            tensor); None if there is no factor.
        factor: Smallest and largest number of the factor; None without a factor, and if its values are not known.
        shift: The same for what was added.
    """

    what: TensorChange
    tensor: str
    source: str | None = None
    along: str | None = None
    factor: Span | None = None
    shift: Span | None = None

    @classmethod
    def folded(cls, tensor: str, by: Sequence[Tensor | str]) -> TensorEdit:
        """The edit for a fold that depends on ``by``; see :meth:`fxquant.ir.rewriter.Rewriter.fold`."""
        kind, *rest = by or ("",)
        if kind in KINDS and isinstance(kind, str):
            factor, shift = [*rest, None, None][:2]
            return cls("folded", tensor, along=kind, factor=span_of(factor), shift=span_of(shift))
        if kind == "shift" and isinstance(kind, str):
            return cls("folded", tensor, shift=span_of(next(iter(rest), None)))
        return cls("replaced", tensor)


@dataclass
class EditLog:
    """What one pass did, in order.

    Attributes:
        nodes: Changes of nodes. Nodes that the pipeline removes afterwards because nothing reads them are not listed.
        tensors: Changes of tensors.
    """

    nodes: list[NodeEdit] = field(default_factory=list)
    tensors: list[TensorEdit] = field(default_factory=list)

    def note_shift(self, shift: Tensor) -> None:
        """Say what the latest fold added, if ``by`` held only a digest of it."""
        self.tensors[-1] = replace(self.tensors[-1], shift=span_of(shift))

    def counts(self) -> dict[str, int]:
        """The number of changes of each kind that occurs, such as ``{"made": 3, "rewired": 2, "folded": 1}``.

        ``made`` counts nodes; a tensor that was made has a node that reads it.
        """
        kinds = [edit.what for edit in self.nodes]
        kinds += [edit.what for edit in self.tensors if edit.what not in ("made", "copied")]  # type: ignore[misc]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {"nodes": [asdict(edit) for edit in self.nodes], "tensors": [asdict(edit) for edit in self.tensors]}


def span_of(value: object) -> Span | None:
    """Smallest and largest number of a tensor; None if it has no numbers, or none that are known."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor) or not value.numel():
        return None
    low, high = torch.aminmax(value.detach())
    return float(low), float(high)
