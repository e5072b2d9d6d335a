"""Fold per-channel factors into the ops that produce the value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.channels.apply import agreed, fold_into_parameters
from fxquant.channels.solution import Edit, Seed, Solution
from fxquant.ir.arguments import args
from fxquant.ir.attention import ValueChange, note_change
from fxquant.ir.borders import note_factors
from fxquant.ir.layer_changes import note_rows
from fxquant.ir.places import place_of
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.shared import Fold, parameters_of, read_stored
from fxquant.ir.stages import Stage
from fxquant.passes._seeds import parse_cost
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext

_AFFINE = torch.ops.fxquant.channel_affine.default


@register_pass
@dataclass(frozen=True)
class AbsorbAffines(Pass):
    """Push each constant ``channel_affine(x, a)`` back through its producers until it ends in parameters.

    Before, for an adaLN::

        gamma, beta = chunk(linear(silu(cond), W, bias)); x = layer_norm(h) * (1 + gamma) + beta
        y = channel_affine(x, a)

    After::

        gamma, beta = chunk(linear(silu(cond), W', bias')); y = layer_norm(h) * (1 + gamma) + beta

    with W_gamma' = diag(a) W_gamma, bias_gamma' = a (bias_gamma + 1) - 1, W_beta' = diag(a) W_beta,
    bias_beta' = a bias_beta. The rules for all ops are in :mod:`fxquant.channels.rules`. Side conditions: a value that
    is scaled on the way has no other readers, or they ask for the same factor. If a path cannot be followed to
    parameters, the factor is multiplied onto a modulation vector instead. If that is not possible either, the
    ``channel_affine`` stays in place. Equal in real arithmetic; parameters are computed in float64 and cast once.

    A graph may be captured after the float weights are gone. If the stored parameters of an op then contain another
    factor than this graph needs, they do not change, and a ``channel_affine`` after the op corrects the result at run
    time.

    Attributes:
        dearest: The highest run-time cost allowed: ``in-place`` (only parameters that the model has), ``free`` or
            ``vector``. Factors that need more stay in the graph as a ``channel_affine``.
    """

    name: ClassVar[str] = "absorb-affines"
    tier: ClassVar[Tier] = Tier.ALGEBRAIC
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.TRANSFORMED
    keeps_inputs: ClassVar[bool] = True

    dearest: str = "vector"

    def __post_init__(self) -> None:
        parse_cost(self.dearest)

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        before, folds = parameters_of(rewriter.module), _Folds()
        while self._absorb(graph, rewriter, folds):  # Of several affines on one path, the first is absorbed first.
            pass
        before |= {copy: before[source] for copy, source in folds.copies.items()}
        for node, stored, fold in context.shared.unstored(rewriter.module, before, folds.made):
            _correct(read_stored(node, stored, rewriter), fold, rewriter)
            note_rows(rewriter.module, node, 1 / fold.scale.flatten())

    def _absorb(self, graph: fx.Graph, rewriter: Rewriter, folds: _Folds) -> bool:
        affines, factors = _constant_affines(graph, rewriter)
        seeds = [
            Seed(name, args(node).node("x"), (node,), alike=tuple(factors[name].tolist()))
            for name, node in affines.items()
        ]
        values = {name: factor.tolist() for name, factor in factors.items()}
        solution = agreed(graph, seeds, values, dearest=parse_cost(self.dearest))
        chosen = {name: factors[name] for name in solution.grants}
        stuck = {name for name in chosen if _stays(solution, name, factors[name])}
        for edit, a in solution.factors(chosen):
            if edit.end is None and edit.readers == tuple(n for n in edit.readers if n.name in stuck):
                continue
            if (a != 1).any():
                _carry_out(edit, a, rewriter, folds)
        for reader, a, c in solution.mixed_factors(chosen):
            note_change(reader, ValueChange(a, c[None]))
        for node, a, c in solution.marked_factors(chosen):
            note_factors(node, a, c)
        for name in chosen:
            if name not in stuck:
                _remove(affines[name], factors[name], solution, rewriter)
        return chosen.keys() > stuck


def _constant_affines(graph: fx.Graph, rewriter: Rewriter) -> tuple[dict[str, fx.Node], dict[str, Tensor]]:
    """The affines with a constant positive factor per channel and without shift, and these factors, float64."""
    affines, factors = {}, {}
    for node in graph.nodes:
        if node.target is not _AFFINE or args(node).shift is not None:
            continue
        scale = args(node).node("scale")
        if scale.op != "get_attr":
            continue
        if not node.meta["val"].dim():  # A scalar, which has no channels; the factor reached it on its way.
            continue
        factor, channels = rewriter.tensor(scale).double().cpu(), node.meta["val"].shape[-1]
        if (
            isinstance(channels, int)
            and factor.numel() in (1, channels)
            and factor.shape[-1:].numel() == factor.numel()
        ):
            factor = factor.flatten().expand(channels)
            if (factor > 0).all():  # relu needs positive factors.
                affines[node.name], factors[node.name] = node, factor
    return affines, factors


def _stays(solution: Solution, name: str, factor: Tensor) -> bool:
    """Whether absorbing an affine would leave it unchanged or put an equal affine in its place."""
    granted = solution.grants[name].granted
    return bool((factor[torch.from_numpy(granted)] == 1).all() and (factor != 1).any()) or any(
        edit.end is None and [reader.name for reader in edit.readers] == [name] for edit in solution.edits
    )


@dataclass
class _Folds:
    """Folds into the parameters of ops, and copies of parameters for some of their readers."""

    made: dict[fx.Node, Fold] = field(default_factory=dict)
    copies: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def add(self, node: fx.Node, a: Tensor, c: Tensor, source: fx.Node | None = None) -> None:
        self.made[node] = self.made.get(source or node, Fold.none()).then(a, c)
        if source is not None and source is not node:
            self.copies[node] = self.copies.get(source, source)


def _carry_out(edit: Edit, a: Tensor, rewriter: Rewriter, folds: _Folds) -> None:
    c = (a - 1) * torch.from_numpy(edit.want.offset.copy())
    if edit.end is not None:
        folds.add(fold_into_parameters(edit, edit.end, rewriter, a, c), a, c, edit.node)
    else:
        source = edit.node
        with rewriter.after(source):
            scale = rewriter.constant(f"{place_of(source)}_factor", a, [source])
            shift = rewriter.constant(f"{place_of(source)}_shift", c, [source]) if edit.want.offset.any() else None
            scaled = rewriter.call(_AFFINE, (source, scale, shift), [source], name=f"{source.name}_scaled", layer=True)
        for reader in edit.readers:
            rewriter.redirect(reader, source, scaled)


def _remove(affine: fx.Node, factor: Tensor, solution: Solution, rewriter: Rewriter) -> None:
    granted = torch.from_numpy(solution.grants[affine.name].granted)
    left = torch.where(granted, 1.0, factor)
    if (left == 1).all():
        rewriter.replace(affine, args(affine).node("x"))
    else:  # Factors of some channels could not be absorbed; they are applied at run time.
        old = args(affine).node("scale")
        rewriter.redirect(affine, old, rewriter.constant(f"{old.target}_left", left, [affine]))


def _correct(node: fx.Node, fold: Fold, rewriter: Rewriter) -> None:
    """Make all readers of a value read ``scale * value + shift``."""
    users = list(node.users)
    if (fold.scale == 1).all() and (fold.shift == 0).all():
        return
    with rewriter.after(node):
        scale = rewriter.constant(f"{place_of(node)}_correction", fold.scale, [node])
        shift = rewriter.constant(f"{place_of(node)}_correction_shift", fold.shift, [node])
        corrected = rewriter.call(_AFFINE, (node, scale, shift), [node], name=f"{node.name}_corrected")
    for user in users:
        rewriter.redirect(user, node, corrected)
