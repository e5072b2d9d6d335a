"""Helpers of the quantizing passes: quantize weights and inputs as the plan says, and record decisions in the plan."""

from __future__ import annotations

import copy
import enum
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.errors import CalibrationError, NonFiniteError
from fxquant.ir.arguments import args
from fxquant.ir.histories import made_from
from fxquant.ir.layers import layer_name, stored_weight
from fxquant.ir.meta import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.time_tables import TimeTable, rows_at, timestep_input
from fxquant.numerics.finite import require_finite
from fxquant.numerics.grids import affine_parameters, fake_quantize
from fxquant.numerics.ranges import activation_range
from fxquant.numerics.rounding.adaround import adaround
from fxquant.numerics.rounding.gptq import ErrorFeedback, gptq
from fxquant.numerics.sqnr import sqnr_db
from fxquant.numerics.weights import QuantizedWeight, quantize_weight
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import ActivationRange, LayerPlan
from fxquant.planning.layer_inputs import layer_input, moments
from fxquant.planning.plan import Plan
from fxquant.planning.uses import unnumbered


class RangeSearch(enum.Enum):
    """How the range of a grid is found; see :mod:`fxquant.numerics.ranges`."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"


class InputRange(enum.Enum):
    """The same for activations, which can also have a range per token, found at run time."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"
    DYNAMIC = "dynamic"


class Rounding(enum.Enum):
    """How a weight is rounded to one of its two neighbouring codes."""

    NEAREST = "nearest"
    GPTQ = "gptq"
    ADAROUND = "adaround"


class Rounder(Protocol):
    """A rounding method that uses more than the values of the weight itself."""

    def quantize(
        self, name: str, values: Tensor, context: PassContext, rewriter: Rewriter, method: RangeSearch, symmetric: bool
    ) -> QuantizedWeight:
        """Round the weight of a layer.

        Raises:
            CalibrationError: If there are no second moments of the layer's input.
        """


@dataclass(frozen=True)
class GPTQ:
    """Rounds weights by the second moments of their inputs; see :mod:`fxquant.numerics.rounding.gptq`."""

    damping: float
    activation_order: bool

    def quantize(
        self, name: str, values: Tensor, context: PassContext, rewriter: Rewriter, method: RangeSearch, symmetric: bool
    ) -> QuantizedWeight:
        """See :class:`Rounder`."""
        layer = context.plan.layer(name)
        assert layer.weight_bits is not None
        return gptq(
            values,
            self._feedback(name, context, rewriter),
            bits=layer.weight_bits,
            group_size=layer.group_size,
            symmetric=symmetric,
            method=method.value,
        )

    def _feedback(self, name: str, context: PassContext, rewriter: Rewriter) -> ErrorFeedback:
        """Error feedback of the layer's input. It is large, so only that of the latest input is kept."""
        key = context.plan.layer(name).observed or name
        kept, feedback = context.memo.get("feedback", (None, None))
        if kept != key:
            context.memo.pop("feedback", None)
            try:
                feedback = ErrorFeedback.of(_moments(name, context, "GPTQ"), self.damping, self.activation_order)
            except NonFiniteError as error:
                raise NonFiniteError(f"layer {name}: {error}") from None
            context.memo["feedback"] = key, feedback
        assert isinstance(feedback, ErrorFeedback)
        return feedback


@dataclass(frozen=True)
class AdaRound:
    """Learns how to round weights from second moments of inputs; see :mod:`fxquant.numerics.rounding.adaround`."""

    def quantize(
        self, name: str, values: Tensor, context: PassContext, rewriter: Rewriter, method: RangeSearch, symmetric: bool
    ) -> QuantizedWeight:
        """See :class:`Rounder`."""
        layer = context.plan.layer(name)
        assert layer.weight_bits is not None
        try:
            return adaround(
                values,
                _moments(name, context, "AdaRound"),
                bits=layer.weight_bits,
                group_size=layer.group_size,
                symmetric=symmetric,
                method=method.value,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"layer {name}: {error}") from None


def _moments(name: str, context: PassContext, method: str) -> Tensor:
    context.observed(context.plan.layer(name).observed or name, f"layer {name!r} is rounded by {method}")
    together = moments(context, name)
    if together is None:
        raise CalibrationError(
            f"layer {name!r} is rounded by {method} and there are no second moments of its input; let calibration "
            "record them, or choose rounding=nearest"
        )
    return together


def _drop_used_moments(name: str, context: PassContext) -> None:
    """Free second moments that no layer needs any more. Those of a whole model are as large as its weights."""
    if len(context.plan.calls) > 1:  # A further graph may fold other factors into the weight and round it again.
        return
    key = context.plan.layer(name).observed
    readers = (other for other, layer in context.plan.layers.items() if layer.observed == key)
    if key and context.statistics is not None and context.statistics.transient and context.codes.keys() >= set(readers):
        context.statistics[key].moments = None


def quantized_weight(
    node: fx.Node,
    context: PassContext,
    rewriter: Rewriter,
    method: RangeSearch,
    symmetric: bool,
    rounder: Rounder | None = None,
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Quantize the weight of a layer; returns nodes of its packed codes, scales and zero points.

    The float weight is dropped at once, so that float weights and codes of a whole model are never in memory together.
    Layers that share a weight share its codes.

    Raises:
        NonFiniteError: If the weight holds NaN or infinity.
        ConfigurationError: If the group size does not divide the number of weight columns.
    """
    name = node.meta[LAYER]
    layer = context.plan.layer(name)
    weight = stored_weight(node)
    assert weight is not None and layer.weight_bits is not None
    key = (weight, layer.weight_bits, layer.group_size)
    if key in rewriter.memo:
        codes, layer.weight_sqnr_db = rewriter.memo[key]
        packed, scale, zero_point = codes
        return packed, scale, zero_point
    values = rewriter.tensor(weight).flatten(1)
    require_finite(values, f"the weight of layer {name}")
    # A fake tensor has no values to search. The shapes are the same for every method.
    search = RangeSearch.MINMAX if isinstance(values, FakeTensor) else method
    history = rewriter.history(weight)
    # False if the codes in the plan were made for another fold of the weight, in a graph that does not share it.
    own = context.shared.is_rounded_here(name, history)
    if isinstance(values, FakeTensor) or (rounder is None and not (own and name in context.codes)):
        quantized = quantize_weight(
            values,
            bits=layer.weight_bits,
            group_size=layer.group_size,
            symmetric=symmetric,
            method=search.value,
            importance=None if search is RangeSearch.MINMAX else importance_of(name, context, values.device),
        )
    elif not own:
        assert rounder is not None
        quantized = rounder.quantize(name, values, context, rewriter, method, symmetric)
    else:
        if name not in context.codes:  # Neither learned before nor rounded for another graph of the model.
            assert rounder is not None
            context.codes[name] = rounder.quantize(name, values, context, rewriter, method, symmetric)
            _drop_used_moments(name, context)
        quantized = context.codes[name]
    if layer.weight_sqnr_db is None:
        layer.weight_sqnr_db = quantized.sqnr_db(values)
    owner = _owner_of_codes(name, str(weight.target), context.plan)
    made = made_from("codes", history, str(layer.weight_bits), str(layer.group_size))
    codes = (
        rewriter.constant(f"{owner}_packed", quantized.packed, [weight], made),
        rewriter.constant(f"{owner}_scale", quantized.scale, [weight], made),
        rewriter.constant(f"{owner}_zero_point", quantized.zero_point, [weight], made),
    )
    rewriter.memo[key] = codes, layer.weight_sqnr_db
    if _reads_alone(node, weight):
        rewriter.forget(weight)
    return codes


def _owner_of_codes(name: str, target: str, plan: Plan) -> str:
    """Prefix for the names of a weight's codes. Graphs that use the same name hold the same codes under it.

    The prefix is the name of the weight for the layer that owns it, and for layers with the same bits and group size.
    Layers that share the weight with other bits or groups have codes of their own.
    """
    layer, named = plan.layer(name), plan.layers.get(layer_name(target))
    if named is not None and (named.weight_bits, named.group_size) == (layer.weight_bits, layer.group_size):
        return target
    if named is None and unnumbered(name) == layer_name(target):
        return target
    return f"{target}_w{layer.weight_bits}" + (f"_g{layer.group_size}" if layer.group_size else "")


def _reads_alone(layer: fx.Node, weight: fx.Node) -> bool:
    """Whether a layer is the only reader of its weight. The layer may read the weight through casts."""
    while set(weight.users) != {layer}:
        if len(weight.users) != 1:
            return False
        weight = next(iter(weight.users))
    return True


def importance_of(name: str, context: PassContext, device: torch.device) -> Tensor | None:
    """How much an error in each weight column matters to the layer's output: the mean square of that input channel.

    It is kept in the plan, so that a replay of the plan finds the same ranges. None if the input was not observed.
    """
    layer, key = context.plan.layer(name), f"{name}.importance"
    if key not in context.plan.vectors and context.statistics is not None and layer.kind == "linear" and layer.observed:
        context.plan.vectors[key] = torch.cat(layer_input(context, name).rows).double().square().mean(dim=0)
    importance = context.plan.vectors.get(key)
    return None if importance is None else importance.to(device)


def is_quantized(weight: fx.Node) -> bool:
    """Whether a weight is dequantized from codes in the graph, as weights of layers with float activations are."""
    if weight.target is torch.ops.aten.view.default:
        weight = args(weight).node("self")
    return weight.target is torch.ops.fxquant.dequantize_weight.default


def quantized_input(
    node: fx.Node, x: fx.Node, context: PassContext, rewriter: Rewriter, method: InputRange
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Quantize the input of a layer; returns nodes of its codes, its scale and its zero point.

    Raises:
        CalibrationError: If the plan has no range for the input and calibration never reached the layer.
    """
    name = node.meta[LAYER]
    layer = context.plan.layer(name)
    bits = layer.activation_bits
    assert bits is not None
    decide_range(node, x, context, rewriter, method)
    assert layer.activation is not None
    if layer.activation.method == InputRange.DYNAMIC.value:
        return _codes_by_token(x, bits, rewriter)
    low, high = (torch.tensor(bound, dtype=torch.float64) for bound in (layer.activation.low, layer.activation.high))
    key = (x, bits, layer.boundaries, str(low.tolist()), str(high.tolist()))
    if key not in rewriter.memo:
        scale, zero_point = (part.to(x.meta["val"].device) for part in affine_parameters(low, high, bits))
        names = (f"{name}.input_scale", f"{name}.input_zero_point")
        if low.dim() == 0:
            grid = tuple(
                rewriter.constant(target, part, [x]) for target, part in zip(names, (scale, zero_point), strict=True)
            )
        else:
            timestep, rank = timestep_input(rewriter.graph, context.plan.timestep), x.meta["val"].dim()
            tables = [TimeTable(timestep, layer.boundaries, part[:, None]) for part in (scale, zero_point)]
            grid = tuple(
                rows_at(rewriter, table, rank, target, [x]) for target, table in zip(names, tables, strict=True)
            )
        codes = rewriter.call(
            torch.ops.fxquant.quantize.default,
            (x, *grid, 0, 2**bits - 1, torch.uint8),
            sources=[x],
            name=f"{x.name}_codes",
            layer=True,
        )
        rewriter.memo[key] = (codes, *grid)
    codes, scale, zero_point = rewriter.memo[key]
    return codes, scale, zero_point


def decide_range(node: fx.Node, x: fx.Node, context: PassContext, rewriter: Rewriter, method: InputRange) -> None:
    """Write the range of a layer's input into the plan, if it has none. Layers that read the same value share it."""
    name = node.meta[LAYER]
    layer = context.plan.layer(name)
    if layer.activation is not None:
        return
    decided = context.memo.setdefault(("range", x, layer.activation_bits, layer.observed), name)
    if decided == name:
        _decide_range(name, context, method)
    else:
        first = context.plan.layer(decided)
        layer.activation = copy.copy(first.activation)
        layer.spread, layer.activation_sqnr_db = copy.copy(first.spread), first.activation_sqnr_db


def is_rounded(layer: LayerPlan) -> bool:
    """Whether a weight is quantized for more than 8-bit storage: it has fewer bits, or its input is quantized."""
    return layer.weight_bits is not None and (layer.activation_bits is not None or layer.weight_bits < 8)


def _codes_by_token(x: fx.Node, bits: int, rewriter: Rewriter) -> tuple[fx.Node, fx.Node, fx.Node]:
    key = (x, bits, InputRange.DYNAMIC)
    if key not in rewriter.memo:

        def call(op: Any, *arguments: Any, name: str) -> fx.Node:
            return rewriter.call(op, arguments, sources=[x], name=f"{x.name}_{name}", layer=True)

        grid = call(torch.ops.fxquant.token_grid.default, x, bits, name="grid")
        scale, zero_point = (
            call(torch.ops.aten.select.int, grid, 0, number, name=name)
            for number, name in enumerate(("scale", "zero_point"))
        )
        arguments = (x, scale, zero_point, 0, 2**bits - 1, torch.uint8)
        codes = call(torch.ops.fxquant.quantize.default, *arguments, name="codes")
        rewriter.memo[key] = (codes, scale, zero_point)
    codes, scale, zero_point = rewriter.memo[key]
    return codes, scale, zero_point


def _decide_range(name: str, context: PassContext, method: InputRange) -> None:
    """Write the range of a layer's input, and its SQNR on the sampled rows, into the plan."""
    layer = context.plan.layer(name)
    assert layer.activation_bits is not None
    if method is InputRange.DYNAMIC:
        seen = layer_input(context, name)
        rows = torch.cat(seen.rows)
        layer.activation = ActivationRange(float(seen.minimum.min()), float(seen.maximum.max()), method.value)
        grid = affine_parameters(*torch.aminmax(rows, dim=-1, keepdim=True), layer.activation_bits)
        layer.activation_sqnr_db = sqnr_db(rows, fake_quantize(rows, *grid, layer.activation_bits))
        tops = seen.absmax.amax(dim=1)
        layer.spread = [float(tops.min()), float(tops.max())]
        return
    bits, count = layer.activation_bits, len(layer.boundaries) + 1
    ranges, exact, coded = [], [], []
    for number in range(count):
        seen = layer_input(context, name, number if count > 1 else None)
        rows = torch.cat(seen.rows)
        ranges.append(activation_range(rows, float(seen.minimum.min()), float(seen.maximum.max()), bits, method.value))
        exact.append(rows)
        coded.append(fake_quantize(rows, *affine_parameters(*ranges[-1], bits), bits))
    lows, highs = ([end[side] for end in ranges] for side in (0, 1))
    if len(ranges) == 1:
        layer.activation = ActivationRange(lows[0], highs[0], method.value)
    else:
        layer.activation = ActivationRange(lows, highs, method.value)
    tops = layer_input(context, name).absmax.amax(dim=1)
    layer.spread = [float(tops.min()), float(tops.max())]
    layer.activation_sqnr_db = sqnr_db(torch.cat(exact), torch.cat(coded))
