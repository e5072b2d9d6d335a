"""Tensors in the form that kernels read, derived from tensors of the quantized graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def shared_or_made(
    name: str, source: Tensor, others: Mapping[str, Tensor], make: Callable[[], Tensor | None]
) -> Tensor | None:
    """The derived tensor that another graph of the model holds, or one made here; None if there is none.

    Args:
        name: Name of the derived tensor.
        source: The tensor that it is derived from.
        others: Tensors that other graphs of the model read, by name.
        make: Makes the tensor; returns None if there is none.
    """
    if name in others:
        return others[name]
    # A fake tensor has no values to derive from. The other graphs have shown that there is no such tensor.
    return None if isinstance(source, FakeTensor) else make()
