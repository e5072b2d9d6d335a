""":class:`CapturedGraph`, the result of a capture: a traced graph and the calls that it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxquant.capture.calls import CallSpec
from fxquant.ir.tensors import copy_graph


@dataclass
class CapturedGraph:
    """One traced graph and the calls that it serves.

    Attributes:
        module: FX graph whose placeholders are the tensor inputs of ``call`` in order, and whose output is a tuple of
            the output's leaves.
        call: The inputs that the graph serves.
        out_spec: Pytree structure that turns the leaves back into the model's own output class.
        digest: Digest of the quantized graph, before a backend lowers it (:mod:`fxquant.ir.digest`).
        code: Text of the graph as it was traced, before any pass; see :func:`fxquant.capture.fingerprint.fingerprint`.
    """

    module: fx.GraphModule
    call: CallSpec
    out_spec: pytree.TreeSpec
    digest: str | None = None
    code: tuple[str, ...] = field(default=(), repr=False)

    @property
    def static_batch(self) -> str | None:
        """Why the batch size had to be fixed, or None when any batch size runs."""
        return self.call.fixed

    def inputs(self, leaves: Sequence[Any]) -> list[torch.Tensor]:
        """The tensor leaves of a call, in the order of the graph's placeholders."""
        return self.call.inputs(leaves)

    def copy(self) -> CapturedGraph:
        """The same with a copy of the graph, over the same tensors."""
        return replace(self, module=copy_graph(self.module))

    def output(self, leaves: Sequence[Any]) -> Any:
        """The model's own output, from the leaves that the graph returned."""
        return pytree.tree_unflatten(list(leaves), self.out_spec)
