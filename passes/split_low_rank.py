"""Split weights into a float branch of low rank and a rest that is easier to round."""

from __future__ import annotations

import enum
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.disk.finished_work import Part, digest_of_tensor
from fxquant.errors import ConfigurationError, NonFiniteError, QualityWarning
from fxquant.ir.histories import made_from
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage, is_replayed
from fxquant.ir.time_tables import plus_rows
from fxquant.numerics.finite import require_finite
from fxquant.numerics.low_rank import low_rank_factors
from fxquant.numerics.weights import encode_weight
from fxquant.passes._quantization import importance_of
from fxquant.passes._seeds import is_transformed, parse_roles
from fxquant.passes._sharing import on_ranks
from fxquant.passes._targets import check_patterns, is_targeted, targets, warn_of_none
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.branches import Branch, branch_dtype
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.kept_weights import kept
from fxquant.planning.linears import FloatLinear, changed_by, is_rounded
from fxquant.planning.plan import Plan

Factors = tuple[Tensor, Tensor]
"""L1 ``[out, rank]`` and L2 ``[rank, in]`` of a branch."""


class Weighting(enum.Enum):
    """How errors in the columns of a weight count when a branch is fitted."""

    NONE = "none"
    """All columns count equally, as in SVDQuant."""
    IMPORTANCE = "importance"
    """A column counts by the mean square of its input channel, which measures the error of the layer's output."""


class BranchType(enum.Enum):
    """Dtype of the factors of a branch."""

    MODEL = "model"
    """That of the layer's weight."""
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    HALF = "half"
    """That of the layer's weight, or float16 if that is wider than 16 bits."""


@register_pass
@dataclass(frozen=True)
class SplitLowRank(Pass):
    """Move the part of a weight that is hardest to round into a float branch of low rank beside the layer.

    Before::

        y = linear(x, W, bias)

    After, with W = L1 L2 + R::

        y = low_rank(linear(x, R, bias), x, L2, L1)         low_rank(y, x, a, b) = y + b (a x)

    ``quantize-linears`` then rounds R, and x for R only. L1 L2 is the best approximation of W of its rank, and takes
    with it the largest singular values, so R has a smaller range. R is computed in float64 from the factors as they are
    stored, so the split is exact in real arithmetic, whatever the factors are (SVDQuant, arXiv 2411.05007). It costs
    ``rank * (in + out)`` float products per token and as many float weights. Run it after the passes that fold factors
    into weights.

    Layers whose branch would not be smaller than the weight itself get none; a warning names them. Layers with float
    inputs are split if their weight has fewer than 8 bits.

    Attributes:
        rank: Rank of the branches.
        iterations: How often the branch is fitted again to ``W - Q(R)``, the error of rounding what the branch left, as
            SVDQuant does. The fit with the smallest error is kept.
        weighting: How errors in columns count in the fit: ``none`` or ``importance``. Counting them by their inputs
            leaves larger numbers in columns with small inputs, which widen the grids of all rows.
        branch: Dtype of the factors: ``model`` (that of the weight), ``float32``, ``float16``, ``bfloat16`` or ``half``
            (16 bits, as in SVDQuant: float16 beside float32 weights, else that of the weight).
        roles: Roles of the layers to split, joined by ``+``; see :mod:`fxquant.planning.precision`.
        layers: Patterns of the names of the layers to split, joined by ``;``.
    """

    name: ClassVar[str] = "split-low-rank"
    tier: ClassVar[Tier] = Tier.ALGEBRAIC
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.TRANSFORMED
    keeps_inputs: ClassVar[bool] = True

    rank: int = 32
    iterations: int = 0
    weighting: Weighting = Weighting.NONE
    branch: BranchType = BranchType.MODEL
    roles: str = "block"
    layers: str = "*"

    def __post_init__(self) -> None:
        parse_roles(self.name, self.roles)
        if self.rank < 1:
            raise ConfigurationError(f"{self.name}: rank {self.rank} is not possible; choose 1 or more")
        if self.iterations < 0:
            raise ConfigurationError(f"{self.name}: {self.iterations} iterations are not possible; choose 0 or more")

    def check_plan(self, plan: Plan) -> None:
        check_patterns(self.name, self.layers, plan)

    def wants_statistics(self, layer: LayerPlan) -> bool:
        """Whether errors are weighted by the inputs of a layer."""
        wanted = self.weighting is Weighting.IMPORTANCE and is_transformed(layer, self.roles.split("+"))
        return wanted and is_rounded(layer)

    def decides(self, name: str, layer: LayerPlan) -> bool:
        """Whether the pass decides about the branch of a layer, by its name, role and precision."""
        return layer.kind == "linear" and is_rounded(layer) and is_targeted(name, layer, self.roles, self.layers)

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        branches = context.plan.decisions_of(Branch)
        refused = []
        linears = targets(graph, context.plan, self.roles, self.layers, branches, weights_only=True)
        if not linears and not branches and not is_replayed(rewriter.module):
            what = "weights of 8 bits beside float inputs need no branch; leave the pass out, or choose fewer bits"
            warn_of_none(self.name, context.plan, self.roles, self.layers, what)
        shared = self._on_ranks(linears, branches, context, rewriter)
        for layer in linears:
            if changed_by(layer.weight, self.name):
                continue
            if layer.name not in branches:
                branches[layer.name] = self.branch_for(layer.plan)
                refused += [layer.name] * (branches[layer.name].rank == 0)
            branch = branches[layer.name]
            _check_rank(layer, branch.rank)
            if branch.rank:
                self._split(layer, branch, shared.get(layer.name), context, rewriter)
        if refused:
            more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
            warnings.warn(
                f"{self.name}: {', '.join(refused[:3])}{more}: no branch, because {branches[refused[0]].reason}",
                QualityWarning,
                stacklevel=2,
            )

    def branch_for(self, layer: LayerPlan) -> Branch:
        """The branch that a layer is given, by its shape; its rank is 0 if the layer gets none."""
        (out, columns), given = layer.shape, self.branch.value
        if self.rank > min(out, columns):
            return Branch(0, given, f"rank {self.rank} is above the width of a weight of {out} x {columns}")
        if self.rank * (out + columns) >= out * columns:
            return Branch(0, given, f"a branch of rank {self.rank} is not smaller than a weight of {out} x {columns}")
        return Branch(self.rank, given)

    def _on_ranks(
        self, linears: Sequence[FloatLinear], branches: Mapping[str, Branch], context: PassContext, rewriter: Rewriter
    ) -> dict[str, Factors]:
        """The factors of all branches by layer, if several processes share the work; otherwise none."""
        if context.team is None or is_replayed(rewriter.module):
            return {}
        layers: dict[str, tuple[FloatLinear, Branch]] = {}
        seen = set()
        for layer in linears:
            branch = branches.get(layer.name) or self.branch_for(layer.plan)
            if changed_by(layer.weight, self.name) or layer.weight in seen:
                continue
            _check_rank(layer, branch.rank)
            if branch.rank:
                seen.add(layer.weight)
                layers[layer.name] = layer, branch

        def compute(name: str) -> Factors:
            layer, branch = layers[name]
            return self._factors(layer, _finite(layer, rewriter), branch, context)

        costs = {
            name: float(min(layer.plan.shape) * math.prod(layer.plan.shape)) for name, (layer, _) in layers.items()
        }
        return on_ranks(costs, context.team, compute)

    def _split(
        self, layer: FloatLinear, branch: Branch, given: Factors | None, context: PassContext, rewriter: Rewriter
    ) -> None:
        values, history = _finite(layer, rewriter), rewriter.history(layer.weight)
        left, right = given or self._factors(layer, values, branch, context)
        by = ("split", str(branch.rank), branch.dtype, self.weighting.value, str(self.iterations))
        a, b = (
            rewriter.constant(f"{layer.name}.{what}", factor, [layer.weight], made_from(what, history, by))
            for what, factor in (("low_rank_in", right), ("low_rank_out", left))
        )
        rewriter.fold(layer.node, "weight", lambda w: w.double() - left.double() @ right.double(), by=by)
        total = plus_rows(layer.node) or layer.node  # A bias that depends on the timestep stays beside its layer.
        readers = list(total.users)
        if "strength" not in rewriter.memo:
            one = torch.ones((), dtype=torch.float64)
            rewriter.memo["strength"] = rewriter.constant("low_rank_strength", one, [layer.weight])
        with rewriter.after(total):
            arguments = (total, layer.input, a, b, None, rewriter.memo["strength"])
            name = f"{layer.node.name}_low_rank"
            new = rewriter.call(torch.ops.fxquant.low_rank.default, arguments, [layer.node], name=name, layer=True)
        for reader in readers:
            rewriter.redirect(reader, total, new)

    def _factors(
        self, layer: FloatLinear, weight: Tensor, branch: Branch, context: PassContext
    ) -> tuple[Tensor, Tensor]:
        """The factors L1 ``[out, rank]`` and L2 ``[rank, in]`` of a branch, in its dtype."""
        dtype = branch_dtype(branch, weight.dtype)
        # A float64 model computes in float64 only, so that proofs hold; the numbers are those of the narrower dtype.
        held = weight.dtype if weight.dtype == torch.float64 else dtype
        if isinstance(weight, FakeTensor):
            out, columns = weight.shape
            return weight.new_empty((out, branch.rank), dtype=held), weight.new_empty(
                (branch.rank, columns), dtype=held
            )
        importance = None
        if self.weighting is Weighting.IMPORTANCE:
            importance = importance_of(layer.name, context, weight.device)

        def made_from() -> dict[str, str]:
            inputs = "" if importance is None else digest_of_tensor(importance)
            options = f"{self} {branch} {held} {layer.plan.precision} {layer.plan.group_rows}"
            return {"inputs of layers": inputs, "options of the branch": options}

        def compute() -> Part:
            left, right = self._fitted(layer, weight, branch, importance)
            return Part({"left": left, "right": right}, None)

        def check(part: Part) -> None:
            shapes = [tuple(part.tensors[side].shape) for side in ("left", "right")]
            finite = all(bool(tensor.isfinite().all()) for tensor in part.tensors.values())
            if shapes != [(len(weight), branch.rank), (branch.rank, weight.shape[1])] or not finite:
                raise ValueError(f"factors of shapes {shapes} are not a branch of rank {branch.rank}")

        found = kept(context, "low-rank", layer.name, weight, made_from, compute, check).tensors
        return found["left"].to(weight.device), found["right"].to(weight.device)

    def _fitted(
        self, layer: FloatLinear, weight: Tensor, branch: Branch, importance: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The factors of a weight that has values."""
        dtype = branch_dtype(branch, weight.dtype)
        held = weight.dtype if weight.dtype == torch.float64 else dtype
        goal, best, least = weight.double(), None, float("inf")
        kind = layer.plan.format_of_weight
        assert kind is not None
        target = goal
        for _ in range(self.iterations + 1):
            parts = low_rank_factors(target, branch.rank, importance)
            left, right = (part.to(dtype).to(held).contiguous() for part in parts)
            self._check_range(layer, dtype, left, right)
            if not self.iterations:
                return left, right
            rest = goal - left.double() @ right.double()
            rounded = encode_weight(
                rest, format=kind.name, group_size=layer.plan.group_size, group_rows=layer.plan.group_rows
            ).dequantize(torch.float64)
            squares = (rest - rounded).square()
            error = float((squares if importance is None else squares * importance).sum())
            if error < least:
                best, least = (left, right), error
            target = goal - rounded
        assert best is not None
        return best

    def _check_range(self, layer: FloatLinear, dtype: torch.dtype, *factors: Tensor) -> None:
        """Refuse factors beyond the range of float16; without this check the rest of the weight would hold NaN.

        Raises:
            NonFiniteError: Names the layer.
        """
        if not all(bool(factor.isfinite().all()) for factor in factors):
            raise NonFiniteError(
                f"{self.name}: layer {layer.name!r}: the factors of its branch are too large for {dtype}; choose "
                "branch=bfloat16 or branch=float32, or leave the layer out (layers=...)"
            )


def _finite(layer: FloatLinear, rewriter: Rewriter) -> Tensor:
    values = rewriter.tensor(layer.weight)
    require_finite(values, f"the weight of layer {layer.name}")
    return values


def _check_rank(layer: FloatLinear, rank: int) -> None:
    """Refuse a rank that was edited in a plan, and that the layer cannot have.

    Raises:
        ConfigurationError: Names the layer.
    """
    if not 0 <= rank <= min(layer.plan.shape):
        raise ConfigurationError(
            f"layer {layer.name!r}: a branch of rank {rank} is not possible beside a weight of "
            f"{layer.plan.shape[0]} x {layer.plan.shape[1]}; edit the rank in the plan"
        )
