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

_ROWS = 256  # Rows of second moments that are transformed at a time.
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


def linear(transforms: Sequence[Rows], channels: int) -> Rows | None:
    """A chain of functions of rows as one function; None if it is not linear.

    Nothing is as large as a matrix of all pairs of channels, which may be most of what memory has room for.

    Args:
        transforms: The functions, in order.
        channels: C of the rows ``[n, C]`` that the first one takes.
    """

    def chain(rows: Tensor) -> Tensor:
        for function in transforms:
            rows = function(rows).double()
        return rows

    generator = torch.Generator().manual_seed(0)
    ones, others = torch.randn(2, 4, 1, channels, generator=generator, dtype=torch.float64)
    together = chain((ones - 2 * others).flatten(0, 1))
    apart = torch.cat([chain(one) - 2 * chain(other) for one, other in zip(ones, others, strict=True)])
    if together.dim() != 2 or together.shape != apart.shape:
        return None
    error = (together - apart).abs().max()
    return chain if bool(error <= _LINEAR * apart.abs().max().clamp_min(1e-300)) else None


def transformed_moments(seen: SecondMoments, steps: Sequence[Rows], shifts: bool) -> Tensor | None:
    """Second moments ``[C', C']`` of the transformed input; None if they do not follow from the recorded ones.

    They follow if no shift is involved and all transforms are linear: M^T H M with the matrix M of the transforms,
    which is never made. A number of rows of H at a time, and then of columns, is replaced by its transform.
    """
    chain = None if shifts else linear(steps, seen.channels)
    if chain is None:
        return None
    found = seen.of()
    first = chain(found[:_ROWS].cpu()).to(found.device)
    half = found if first.shape[1] == len(found) else found.new_empty(len(found), first.shape[1])
    for start in range(0, len(found), _ROWS):
        rows = found[start : start + _ROWS].cpu()
        half[start : start + _ROWS] = first if start == 0 else chain(rows)
    whole = half if len(half) == half.shape[1] else half.new_empty(half.shape[1], half.shape[1])
    for start in range(0, half.shape[1], _ROWS):
        columns = half[:, start : start + _ROWS].T.cpu()
        whole[:, start : start + _ROWS] = chain(columns).T  # The result is symmetric: its rows are its columns.
    return whole
