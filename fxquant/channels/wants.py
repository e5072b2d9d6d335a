"""Requests on a value (the factor variable of each of its channels), and the answers that rules give to them."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import fx

Indices = npt.NDArray[np.int64]
Offsets = npt.NDArray[np.float64]

IDENTITY = 0
"""The variable whose factor is 1: a channel that must stay unchanged."""

UNREAD = -1
"""Marks positions that a reader does not read, and for which it therefore requests nothing."""


class Cost(enum.IntEnum):
    """What a rewrite costs at run time, the cheapest first."""

    IN_PLACE = -1
    """Only parameters that the model has change, and each of them for all of its readers: the graph stays as it was."""
    FREE = 0
    """Everything goes into weights that exist already, or into new weights of a norm that had none."""
    VECTOR = 1
    """A multiplication on a ``[batch, channels]`` vector, such as a modulation vector shared by all blocks."""
    TOKENS = 2
    """A multiplication on a whole activation ``[batch, tokens, channels]``."""
    NOT = 3
    """Not possible at any allowed cost."""

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True, eq=False)
class Want:
    """The request that a value v yield ``a * v + (a - 1) * offset``.

    ``a`` is known only later; here it is one variable per channel. Both arrays have one axis per axis of the value. The
    axis has the size of the value's axis if the request differs along it, else size 1, so the arrays broadcast against
    the value. Along an axis of open size, such as a batch with heads folded into it, the size of the arrays is a
    period: the request repeats after that many positions.

    Attributes:
        scale: Variable of each channel; :data:`IDENTITY` or :data:`UNREAD` where nothing is requested.
        offset: The constant k that accumulates on the way through ``u + k``, such as the 1 of ``1 + gamma``.
    """

    scale: Indices
    offset: Offsets

    @classmethod
    def of(cls, scale: Indices, offset: Offsets | float = 0.0) -> Want:
        """A want with the same offset everywhere, unless ``offset`` is an array."""
        return cls(scale, np.broadcast_to(np.asarray(offset, dtype=np.float64), scale.shape))

    @classmethod
    def identity(cls, rank: int) -> Want:
        """The request to leave a value of this rank unchanged."""
        return cls.of(np.full((1,) * rank, IDENTITY, dtype=np.int64))

    def map(self, function: Callable[[npt.NDArray[np.generic]], npt.NDArray[np.generic]]) -> Want:
        """The same request in another layout: ``function`` is applied to both arrays."""
        return Want(function(self.scale).astype(np.int64), function(self.offset).astype(np.float64))

    def varies(self, axis: int) -> bool:
        """Whether the request differs along an axis."""
        return self.scale.shape[axis] > 1

    @property
    def trivial(self) -> bool:
        """Whether nothing is requested."""
        return bool((self.scale <= IDENTITY).all())

    @property
    def variables(self) -> Indices:
        """The variables that occur, each once."""
        found = np.unique(self.scale)
        return found[found > IDENTITY]


@dataclass(frozen=True)
class Push:
    """The request can be met if each of these inputs meets its own request.

    Attributes:
        inputs: Pairs of an input and the request on it.
        ties: Pairs of equally shaped variable arrays that have to be equal, as when heads share a key or value.
    """

    inputs: Sequence[tuple[fx.Node, Want]]
    ties: Sequence[tuple[Indices, Indices]] = ()


@dataclass(frozen=True)
class Tie:
    """The request can be met if it is the same along some axes, as over the tokens that attention mixes.

    Attributes:
        want: The request, of size 1 along these axes.
        ties: Pairs of equally shaped variable arrays that have to be equal for that.
        reason: Why they must be equal; recorded if some channels have to stay unchanged.
    """

    want: Want
    ties: Sequence[tuple[Indices, Indices]]
    reason: str


@dataclass(frozen=True)
class Choose:
    """The request can be met in any one of these ways; the cheapest is taken."""

    ways: Sequence[Push]


@dataclass(frozen=True)
class End:
    """The request is met here, offline.

    Attributes:
        fold: Rewrites the parameters. It is called with the rewriter, ``a`` and ``c`` (float64, in the layout of the
            want); for a shift, with the rewriter and a table of rows in the layout of the want. The fold of a parameter
            also takes ``readers``, those that are to read the folded one, and returns the node that they read.
        into: What absorbs the factor, for the report.
        operands: Number of run-time operands that the fold adds; folds that add none are preferred.
        gives: Name of the parameter that the op lacks and that the fold gives it, such as ``bias``; None if it has all.
    """

    fold: Callable[..., fx.Node | None] = field(repr=False)
    into: str
    operands: int = 0
    gives: str | None = None


@dataclass(frozen=True)
class Barrier:
    """The request cannot pass this op, and why."""

    reason: str


Outcome = Push | Tie | Choose | End | Barrier
