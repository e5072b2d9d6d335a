"""How passes changed what layers read since calibration, and the statistics of what they read now.

A pass may change a layer's input other than by shifting and scaling its channels: rotate it, permute it, drop channels.
It says so by :meth:`PassContext.transform_input`, and the sampled rows and second moments are transformed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.errors import PassError
from fxquant.statistics.moments import SecondMoments

_LINEAR = 1e-9  # Relative error up to which a function counts as affine.

Rows = Callable[[Tensor], Tensor]
"""Maps rows of a layer's input ``[n, C]``, float64, to rows ``[n, C']``, each row by itself."""


@dataclass(frozen=True, eq=False)
class InputTransform:
    """One change of a layer's input.

    Attributes:
        function: Maps the rows before to the rows after.
        after: Which of ``factor`` and ``shift`` the plan held for the layer at that time: they come before.
    """

    function: Rows
    after: frozenset[str]


def checked(function: Rows, rows: Tensor, name: str) -> Tensor:
    """The rows that a transform gives.

    Raises:
        PassError: If it does not give one finite row for each row.
    """
    found = function(rows)
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(rows):
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise PassError(
            f"layer {name}: a transform of its input gives {shape} for rows of shape {list(rows.shape)}; it should map "
            "rows [n, C] to rows [n, C'], each by itself"
        )
    if not bool(found.isfinite().all()):
        raise PassError(f"layer {name}: a transform of its input gives NaN or infinity")
    return found.double()


def in_order(
    transforms: Sequence[InputTransform], balanced: bool, factor: Rows | None, shift: Rows | None
) -> Iterator[Rows]:
    """Each change of a layer's input, in the order in which passes made them.

    Args:
        transforms: The transforms, in order.
        balanced: Whether the shift was decided for the balanced input.
        factor: Divides by the balance factors; None if there are none.
        shift: Subtracts the shift; None if there is none.
    """
    left = {"factor": factor, "shift": shift} if balanced else {"shift": shift, "factor": factor}

    def known(names: frozenset[str]) -> Iterator[Rows]:
        for name in [name for name in left if name in names]:
            function = left.pop(name)
            if function is not None:
                yield function

    for transform in transforms:
        yield from known(transform.after)
        yield transform.function
    yield from known(frozenset(left))


def as_matrix(transforms: Sequence[Rows], channels: int) -> Tensor | None:
    """The matrix ``[C, C']`` of a chain of functions of rows, float64; None if the chain is not linear."""

    def chain(rows: Tensor) -> Tensor:
        for function in transforms:
            rows = function(rows).double()
        return rows

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, channels, generator=generator, dtype=torch.float64)
    matrix = chain(torch.eye(channels, dtype=torch.float64))
    direct, composed = chain(rows), rows @ matrix
    if direct.shape != composed.shape:
        return None
    error = (direct - composed).abs().max()
    return matrix if bool(error <= _LINEAR * direct.abs().max().clamp_min(1e-300)) else None


def transformed_moments(seen: SecondMoments, steps: Sequence[Rows], shifts: bool) -> Tensor | None:
    """Second moments ``[C', C']`` of the transformed input; None if they do not follow from the recorded ones.

    They follow if no shift is involved and all transforms are linear.
    """
    if shifts:
        return None
    matrix = as_matrix(steps, seen.channels)
    if matrix is None:
        return None
    recorded = seen.of()
    matrix = matrix.to(recorded.device)
    return matrix.T @ recorded @ matrix
