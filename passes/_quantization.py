"""What the quantizing passes share: codes of a weight and of an input, decided from the plan and written into it."""

from __future__ import annotations

import copy
import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.capture import LAYER
from fxquant.errors import CalibrationError, NonFiniteError
from fxquant.ir.rewriter import Rewriter
from fxquant.plan import ActivationRange, Plan
from fxquant.quantizer import (
    QuantizedWeight,
    activation_range,
    affine_parameters,
    fake_quantize,
    quantize_weight,
    require_finite,
    sqnr_db,
)
from fxquant.rounding.gptq import ErrorFeedback, gptq


class RangeSearch(enum.Enum):
    """How the range of a grid is found; see :mod:`fxquant.quantizer`."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"


class Rounding(enum.Enum):
    """Which of its two neighbours a weight becomes."""

    NEAREST = "nearest"
    GPTQ = "gptq"


@dataclass(frozen=True)
class GPTQ:
    """Rounds weights by the second moments of their inputs; see :mod:`fxquant.rounding.gptq`."""

    damping: float
    activation_order: bool

    def quantize(
        self, name: str, values: Tensor, plan: Plan, rewriter: Rewriter, method: RangeSearch, symmetric: bool
    ) -> QuantizedWeight:
        """The weight of a layer, rounded; from the plan if another graph of the model had it rounded before.

        Raises:
            CalibrationError: There are no second moments of its input.
        """
        if name not in plan.codes:
            layer = plan.layer(name)
            assert layer.weight_bits is not None
            plan.codes[name] = gptq(
                values,
                self._feedback(name, plan, rewriter),
                bits=layer.weight_bits,
                group_size=layer.group_size,
                symmetric=symmetric,
                method=method.value,
            )
            self._drop_used(name, plan)
        return plan.codes[name]

    @staticmethod
    def _drop_used(name: str, plan: Plan) -> None:
        """Free second moments that no layer needs any more: those of a whole model are as large as its weights."""
        key = plan.layer(name).observed
        readers = (other for other, layer in plan.layers.items() if layer.observed == key)
        if key and plan.statistics is not None and plan.statistics.transient and plan.codes.keys() >= set(readers):
            plan.statistics[key].moments = None

    def _feedback(self, name: str, plan: Plan, rewriter: Rewriter) -> ErrorFeedback:
        """That of the layer's input; kept only for the layers that come next, for it is large."""
        key = plan.layer(name).observed or name
        seen = plan.evidence(key, f"layer {name!r} is rounded by GPTQ")
        if seen.moments is None:
            raise CalibrationError(
                f"layer {name!r} is rounded by GPTQ and there are no second moments of its input; let calibration "
                "record them, or choose rounding=nearest"
            )
        factor = plan.vectors.get(name)
        kept, feedback = rewriter.memo.get("feedback", (None, None))
        if kept != key:
            rewriter.memo.pop("feedback", None)
            try:
                feedback = ErrorFeedback.of(seen.moments.of(factor), self.damping, self.activation_order)
            except NonFiniteError as error:
                raise NonFiniteError(f"layer {name}: {error}") from None
            rewriter.memo["feedback"] = key, feedback
        assert isinstance(feedback, ErrorFeedback)
        return feedback


def quantized_weight(
    node: fx.Node,
    plan: Plan,
    rewriter: Rewriter,
    method: RangeSearch,
    symmetric: bool,
    rounder: GPTQ | None = None,
    position: int = 1,
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Quantize the weight of a layer; returns nodes of its packed codes, scales and zero points.

    The float weight is dropped at once, so that the two never add up over a whole model. Layers that share a weight
    share its codes.

    Raises:
        NonFiniteError: If the weight holds NaN or infinity.
        ConfigurationError: If the group size does not divide its columns.
    """
    name = node.meta[LAYER]
    layer = plan.layer(name)
    weight = node.args[position]
    assert isinstance(weight, fx.Node) and layer.weight_bits is not None
    key = (weight, layer.weight_bits, layer.group_size)
    if key in rewriter.memo:
        codes, layer.weight_sqnr_db = rewriter.memo[key]
        packed, scale, zero_point = codes
        return packed, scale, zero_point
    values = rewriter.tensor(weight).flatten(1)
    require_finite(values, f"the weight of layer {name}")
    # Without values there is nothing to search; the shapes are those of any method.
    search = RangeSearch.MINMAX if isinstance(values, FakeTensor) else method
    if rounder is not None and not isinstance(values, FakeTensor):
        quantized = rounder.quantize(name, values, plan, rewriter, method, symmetric)
    else:
        quantized = quantize_weight(
            values,
            bits=layer.weight_bits,
            group_size=layer.group_size,
            symmetric=symmetric,
            method=search.value,
            importance=None if search is RangeSearch.MINMAX else _importance(name, plan, values.device),
        )
    if layer.weight_sqnr_db is None:
        layer.weight_sqnr_db = quantized.sqnr_db(values)
    owner = str(weight.target)
    codes = (
        rewriter.constant(f"{owner}_packed", quantized.packed, [weight]),
        rewriter.constant(f"{owner}_scale", quantized.scale, [weight]),
        rewriter.constant(f"{owner}_zero_point", quantized.zero_point, [weight]),
    )
    rewriter.memo[key] = codes, layer.weight_sqnr_db
    if set(weight.users) == {node}:
        rewriter.forget(weight)
    return codes


def _importance(name: str, plan: Plan, device: torch.device) -> Tensor | None:
    """How much an error in each weight column matters to the layer's output: the mean square of that input channel.

    Kept in the plan, so that replaying it finds the same ranges. None for layers whose input was not observed.
    """
    layer, key = plan.layer(name), f"{name}.importance"
    if key not in plan.vectors and plan.statistics is not None and layer.kind == "linear" and layer.observed:
        squares = plan.evidence(layer.observed).rows().double().square().mean(dim=0)
        plan.vectors[key] = squares / plan.vectors[name].square() if name in plan.vectors else squares
    importance = plan.vectors.get(key)
    return None if importance is None else importance.to(device)


def is_quantized(weight: Any) -> bool:
    """Whether a weight is dequantized from codes in the graph, as those of layers with float activations are."""
    if weight.target is torch.ops.aten.view.default:
        weight = weight.args[0]
    return weight.target is torch.ops.fxquant.dequantize_weight.default


def quantized_input(
    node: fx.Node, x: Any, plan: Plan, rewriter: Rewriter, method: RangeSearch
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Quantize the input of a layer; returns nodes of its codes, its scale and its zero point.

    Raises:
        CalibrationError: If the plan has no range for it and calibration never reached the layer.
    """
    name = node.meta[LAYER]
    layer = plan.layer(name)
    bits = layer.activation_bits
    assert isinstance(x, fx.Node) and bits is not None
    if layer.activation is None:
        decided = rewriter.memo.setdefault(("range", x, bits), name)  # Layers that read one value share its range.
        if decided == name:
            _decide_range(name, plan, method)
        else:
            first = plan.layer(decided)
            layer.activation = copy.copy(first.activation)
            layer.spread, layer.activation_sqnr_db = copy.copy(first.spread), first.activation_sqnr_db
    assert layer.activation is not None
    key = (x, bits, layer.activation.low, layer.activation.high)
    if key not in rewriter.memo:
        scale, zero_point = affine_parameters(layer.activation.low, layer.activation.high, bits)
        device = x.meta["val"].device
        grid = (
            rewriter.constant(f"{name}.input_scale", scale.to(device), [x]),
            rewriter.constant(f"{name}.input_zero_point", zero_point.to(device), [x]),
        )
        codes = rewriter.call(
            torch.ops.fxquant.quantize.default,
            (x, *grid, 0, 2**bits - 1, torch.uint8),
            sources=[x],
            name=f"{x.name}_codes",
        )
        rewriter.memo[key] = (codes, *grid)
    codes, scale, zero_point = rewriter.memo[key]
    return codes, scale, zero_point


def _decide_range(name: str, plan: Plan, method: RangeSearch) -> None:
    """Write the range of a layer's input into the plan, and how well it does on the sampled rows."""
    layer = plan.layer(name)
    assert layer.activation_bits is not None
    seen = plan.evidence(layer.observed or name)
    factor = plan.vectors.get(name)
    divide = torch.ones(1) if factor is None else factor
    low, high = (bound.double() / divide for bound in (seen.minimum, seen.maximum))
    rows = (seen.rows().double() / divide).float()
    chosen = activation_range(rows, float(low.min()), float(high.max()), layer.activation_bits, method.value)
    layer.activation = ActivationRange(*chosen, method.value)
    tops = torch.maximum(low.abs(), high.abs()).amax(dim=1)
    layer.spread = [float(tops.min()), float(tops.max())]
    layer.activation_sqnr_db = _input_sqnr(rows, layer.activation, layer.activation_bits)


def _input_sqnr(rows: Tensor, chosen: ActivationRange, bits: int) -> float:
    return sqnr_db(rows, fake_quantize(rows, *affine_parameters(chosen.low, chosen.high, bits), bits))
