"""Balance channels of activations against channels of weights."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import softmax
from scipy.stats import spearmanr
from torch import Tensor, fx

from fxquant.channels.solution import Grant, Seed
from fxquant.channels.walk import solve
from fxquant.errors import ConfigurationError
from fxquant.ir.arguments import args
from fxquant.ir.layers import parameter_of
from fxquant.ir.meta import LAYER, PROVENANCE
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.numerics.activations import round_in_range
from fxquant.numerics.finite import require_finite
from fxquant.numerics.weights import encode_weight
from fxquant.passes._seeds import (
    follow,
    is_target,
    is_transformed,
    parse_cost,
    parse_roles,
    parts_of,
    seeds_to_transform,
    seeds_undone_before,
)
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import Balance, LayerPlan
from fxquant.planning.layer_inputs import layer_input


class Salience(enum.Enum):
    """How the salience of activation channels is combined over timesteps."""

    SPEARMAN = "spearman"
    """As in PTQ4DiT (SSC): timesteps at which activation and weight salience disagree get larger weights."""
    MEAN = "mean"
    """The mean over timesteps."""
    MAX = "max"
    """The maximum over timesteps, as in SmoothQuant."""
    MOVING_AVERAGE = "moving-average"
    """As in HTG: an exponential moving average that starts with the first denoising step, the largest timestep."""


@register_pass
@dataclass(frozen=True)
class BalanceChannels(Pass):
    """Divide activation channels by b and multiply weight columns by b, so that neither side has salient channels.

    Before::

        y = linear(x, W, bias)

    After::

        y = linear(channel_affine(x, 1 / b), W diag(b), bias)

    With the salience sX_j of activation channel j and sW_j = max over outputs of |W_j|::

        b_j = sX_j ** exponent / sW_j ** (1 - exponent)

    With exponent 0.5, both saliences become sqrt(sX_j sW_j) (PTQ4DiT, CSB, arXiv 2405.16005). The general formula is
    SmoothQuant. sX_j is the maximum of |X_j| over tokens at each timestep, combined over timesteps by ``salience``.
    ``spearman`` (SSC) weights timestep t by the softmax over t of -rho_t, where rho_t is the Spearman correlation over
    channels of sX at timestep t with sW. If the plan has a shift for the layer, sX is the salience of the shifted
    activation.

    Linears with float activations are balanced too: the error of rounding their weights is smallest if no channel of
    the input is salient (AWQ, arXiv 2306.00978). Their other channels gain nothing, so recipes for such linears set
    ``salient``.

    A layer is balanced only if ops upstream can absorb ``1 / b`` at an allowed cost, so that the pass
    ``absorb-affines`` removes the multiplication again. Layers that read the same value, and layers whose factors meet
    in one producer, are decided together. Equal in real arithmetic.

    Attributes:
        exponent: Share of the salience that moves to the weights, 0 to 1.
        search: Number of exponents, evenly spaced from 0 to 1, that are tried on the sampled rows; 0 for no search.
            Each group of layers gets the exponent with the smallest error of its rounded products (a search for
            SmoothQuant's alpha).
        salience: How timesteps are combined.
        momentum: Momentum of the moving average.
        salient: If above 1, factors are divided by their median over the channels that are decided together. Then
            factors from ``1 / salient`` to ``salient`` become 1.
        dearest: The highest run-time cost allowed: ``in-place`` (only parameters that the model has change), ``free``,
            ``vector`` or ``tokens``.
        roles: Roles of the layers to balance, joined by ``+``. PTQ4DiT balances layers in blocks, but not adaLN, the
            embedders and the final layer; see :mod:`fxquant.planning.precision` for all roles.
    """

    name: ClassVar[str] = "balance-channels"
    tier: ClassVar[Tier] = Tier.ALGEBRAIC
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.TRANSFORMED
    keeps_inputs: ClassVar[bool] = True

    exponent: float = 0.5
    search: int = 0
    salience: Salience = Salience.SPEARMAN
    momentum: float = 0.99
    salient: float = 1.0
    dearest: str = "vector"
    roles: str = "block"

    def __post_init__(self) -> None:
        parse_roles(self.name, self.roles)
        if not 0 <= self.momentum < 1:
            raise ConfigurationError(f"balance-channels: momentum {self.momentum} must be at least 0 and below 1")
        if not 0 <= self.exponent <= 1:
            raise ConfigurationError(f"balance-channels: exponent {self.exponent} is not between 0 and 1")
        if not 1 <= self.salient < math.inf:
            raise ConfigurationError(f"balance-channels: salient {self.salient} is not a ratio of 1 or more")
        if self.search < 0 or self.search == 1:
            raise ConfigurationError(
                f"balance-channels: search {self.search} is not a number of exponents; choose 0, or 2 or more"
            )
        parse_cost(self.dearest)

    def wants_statistics(self, layer: LayerPlan) -> bool:
        return is_transformed(layer, self.roles.split("+"))

    def decides(self, name: str, layer: LayerPlan) -> bool:
        """Whether the pass decides the factors of a layer's input."""
        return layer.weight_bits is not None and is_transformed(layer, self.roles.split("+"))

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        roles = self.roles.split("+")
        dearest = parse_cost(self.dearest)
        seeds = seeds_to_transform(graph, context, roles, dearest, "weight")
        solution = solve(graph, seeds, dearest)
        for group in solution.groups():
            grants = [solution.grants[name] for name in group]
            targets = [[node for node in grant.seed.readers if is_target(node, context, roles)] for grant in grants]
            layers = [[node.meta[LAYER] for node in nodes] for nodes in targets]
            if all(context.plan.layer(name).balance is None for names in layers for name in names):
                weights = [[_weight(node, rewriter) for node in nodes] for nodes in targets]
                self._decide(grants, layers, weights, context)
            else:
                follow("balance", layers, context.plan)
        for seed in [*seeds, *seeds_undone_before(graph, context, seeds)]:
            for part in parts_of(seed, context, roles):
                if not self._is_done(part.readers):
                    _balance(part.seed(seed), part.vector, rewriter)

    def _is_done(self, readers: Sequence[fx.Node]) -> bool:
        """Whether this pass has balanced the weights of these linears already."""
        weights = [parameter_of(args(reader).node("weight")) for reader in readers]
        origins = (origin for weight in weights for origin in weight.meta.get(PROVENANCE, ()))
        return any(origin.pass_name == self.name for origin in origins)

    def _decide(
        self,
        grants: Sequence[Grant],
        layers: list[list[str]],
        weights: Sequence[Sequence[Tensor]],
        context: PassContext,
    ) -> None:
        """Write the factors of one group into the plan."""
        activation = [layer_input(context, names[0]).absmax.numpy() for names in layers]
        classes = np.concatenate([grant.classes for grant in grants])
        sx, sw = np.concatenate(activation, axis=1), np.concatenate([_weight_salience(own) for own in weights])
        combined = combine_timesteps(sx, sw, self.salience, self.momentum)
        # Channels of one class share a factor. On each side, the most salient of them decides.
        numbers, inverse = np.unique(classes, return_inverse=True)
        top_x, top_w = np.zeros(len(numbers)), np.zeros(len(numbers))
        np.maximum.at(top_x, inverse, combined)
        np.maximum.at(top_w, inverse, sw)

        def factors_for(exponent: float) -> Tensor:
            b = balance_factor(top_x, top_w, exponent)
            if self.salient > 1:
                b = of_salient_channels(b, (top_x > 0) & (top_w > 0) & (numbers > 0), self.salient)
            b[numbers == 0] = 1.0
            return torch.from_numpy(b[inverse])

        factors = factors_for(self.exponent)
        if self.search and any(grant.granted.any() for grant in grants):
            candidates = [factors_for(exponent) for exponent in np.linspace(0, 1, self.search)]
            factors = min(candidates, key=lambda b: _error(layers, weights, b, context))
        start = 0
        for grant, names in zip(grants, layers, strict=True):
            channels = grant.seed.channels
            for name in names:
                context.plan.layer(name).balance = Balance(
                    cost=str(grant.cost),
                    into=list(grant.into),
                    channels=int(grant.granted.sum()),
                    group=layers[0][0],
                    reason=grant.reason,
                )
                if grant.granted.any():
                    context.plan.vectors[name] = factors[start : start + channels].clone()
            start += channels


def combine_timesteps(
    activation: npt.NDArray[np.float64],
    weight: npt.NDArray[np.float64],
    salience: Salience,
    momentum: float = 0.99,
) -> npt.NDArray[np.float64]:
    """Combine activation salience over timesteps.

    Args:
        activation: max |X_j| per timestep, timesteps ascending, ``[timesteps, channels]``.
        weight: max |W_j|, ``[channels]``.
        salience: How to combine timesteps.
        momentum: Weight of the previous moving average at each step.

    Returns:
        Salience per channel, ``[channels]``.
    """
    if salience is Salience.MAX:
        return np.asarray(activation.max(axis=0))
    if salience is Salience.MOVING_AVERAGE:
        average = activation[-1]
        for row in activation[-2::-1]:
            average = momentum * average + (1 - momentum) * row
        return np.asarray(average)
    if salience is Salience.MEAN or len(activation) == 1:
        return np.asarray(activation.mean(axis=0))
    return np.asarray(spearman_weights(activation, weight) @ activation)


def spearman_weights(activation: npt.NDArray[np.float64], weight: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """PTQ4DiT's eta ``[timesteps]``: softmax over t of minus the Spearman correlation of the two saliences at t."""
    if np.ptp(weight) == 0:
        return np.full(len(activation), 1 / len(activation))  # All equal: no order to correlate.
    rho = np.array([0.0 if np.ptp(row) == 0 else spearmanr(row, weight).statistic for row in activation])
    return np.asarray(softmax(-rho))


def balance_factor(
    activation: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], exponent: float
) -> npt.NDArray[np.float64]:
    """B = sX ** exponent / sW ** (1 - exponent); 1 where either salience of a channel is 0."""
    alive = (activation > 0) & (weight > 0)
    x, w = np.where(alive, activation, 1.0), np.where(alive, weight, 1.0)
    return np.asarray(x**exponent / w ** (1 - exponent))


def of_salient_channels(
    factors: npt.NDArray[np.float64], alive: npt.NDArray[np.bool_], ratio: float
) -> npt.NDArray[np.float64]:
    """Factors divided by their median; 1 for quotients from ``1 / ratio`` to ``ratio`` and for channels not alive."""
    relative = np.ones_like(factors)
    if alive.any():
        relative[alive] = factors[alive] / np.median(factors[alive])
    return np.where(np.maximum(relative, 1 / relative) > ratio, relative, 1.0)


def _weight(reader: fx.Node, rewriter: Rewriter) -> Tensor:
    weight = rewriter.tensor(parameter_of(args(reader).node("weight")))
    require_finite(weight, f"the weight of layer {reader.meta[LAYER]}")
    return weight


def _weight_salience(weights: Sequence[Tensor]) -> npt.NDArray[np.float64]:
    """Maximum of |W_j| over outputs and over all weights that read the value, ``[channels]``."""
    # These two passes are five times faster on a CPU than torch.aminmax along an axis.
    tops = [torch.maximum(-weight.amin(0), weight.amax(0)) for weight in weights]
    return np.asarray(torch.stack(tops).amax(dim=0).double().cpu().numpy())


def _error(
    layers: list[list[str]], weights: Sequence[Sequence[Tensor]], factors: Tensor, context: PassContext
) -> float:
    """Relative error of the products of sampled rows and weights, rounded with these factors, summed over layers."""
    total, start = 0.0, 0
    for names, own in zip(layers, weights, strict=True):
        rows = torch.cat(layer_input(context, names[0]).rows)
        b = factors[start : start + rows.shape[1]].float()
        start += rows.shape[1]
        for name, weight in zip(names, own, strict=True):
            layer = context.plan.layer(name)
            assert layer.format_of_weight is not None
            x, w = rows.to(weight.device), weight.float()
            scaled = x / b.to(x.device)
            grid = layer.group_size, layer.group_rows
            rounded = encode_weight(
                w * b.to(w.device), format=layer.format_of_weight.name, group_size=grid[0], group_rows=grid[1]
            )
            coded = scaled
            if layer.format_of_input is not None:
                coded = round_in_range(scaled, layer.format_of_input, scaled.min(), scaled.max())
            actual = coded @ rounded.dequantize(torch.float32).T
            expected = x @ w.T
            total += float((actual - expected).square().sum() / expected.square().sum().clamp_min(1e-30))
    return total


def _balance(seed: Seed, b: Tensor, rewriter: Rewriter) -> None:
    with rewriter.before(min(seed.readers)):  # Nodes compare by their position in the graph.
        # Float64 for every model dtype: the absorbed factor must undo the factor of the weight to the last bit.
        scale = rewriter.constant(f"{seed.name}.balance", 1 / b, [seed.value])
        balanced = rewriter.call(
            torch.ops.fxquant.channel_affine.default,
            (seed.value, scale, None),
            sources=[*seed.readers],
            name=f"{seed.value.name}_balanced",
            layer=True,
        )
    for reader in seed.readers:
        rewriter.redirect(reader, seed.value, balanced)
        rewriter.fold(reader, "weight", lambda w: w * b.to(w.device), by=("columns", b))  # In float64, like b.
