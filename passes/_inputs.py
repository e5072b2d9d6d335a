"""Helpers of the quantizing passes: quantize the inputs of layers, and record their ranges in the plan."""

from __future__ import annotations

import copy
import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.ir.meta import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.time_tables import TimeTable, rows_at, timestep_input
from fxquant.numerics.activations import round_by_token, round_in_range
from fxquant.numerics.formats import Format, top_of
from fxquant.numerics.ranges import activation_range
from fxquant.numerics.sqnr import sqnr_db
from fxquant.passes._quantization import Coded, optional
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import ActivationRange
from fxquant.planning.layer_inputs import layer_input


class InputRange(enum.Enum):
    """The same for activations, which can also have a range per token, found at run time."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"
    DYNAMIC = "dynamic"


def quantized_input(node: fx.Node, x: fx.Node, context: PassContext, rewriter: Rewriter, method: InputRange) -> Coded:
    """Quantize the input of a layer; returns nodes of its codes and scales.

    Raises:
        CalibrationError: If the plan has no range for the input and calibration never reached the layer.
    """
    name = node.meta[LAYER]
    layer = context.plan.layer(name)
    format = layer.format_of_input
    assert format is not None
    decide_range(node, x, context, rewriter, method)
    assert layer.activation is not None
    if layer.activation.method == InputRange.DYNAMIC.value:
        return _codes_by_token(x, format, rewriter)
    low, high = (torch.tensor(bound, dtype=torch.float64) for bound in (layer.activation.low, layer.activation.high))
    kinds = layer.formats_of_input
    key = (x, tuple(kind.name for kind in kinds), layer.boundaries, str(low.tolist()), str(high.tolist()))
    if key not in rewriter.memo:
        rewriter.memo[key] = _codes_of_range(node, x, low, high, kinds, context, rewriter)
    coded = rewriter.memo[key]
    assert isinstance(coded, Coded)
    return coded


def _codes_of_range(
    node: fx.Node,
    x: fx.Node,
    low: Tensor,
    high: Tensor,
    kinds: Sequence[Format],
    context: PassContext,
    rewriter: Rewriter,
) -> Coded:
    """Codes of an input whose range is known, or one range per bin of timesteps, each in the format of its bin."""
    name = node.meta[LAYER]
    layer = context.plan.layer(name)
    format = max(kinds, key=lambda kind: kind.bits)

    def stored(part: str, value: Tensor | None) -> fx.Node | None:
        if value is None:
            return None
        value = value.to(x.meta["val"].device)
        if low.dim() == 0:
            return rewriter.constant(f"{name}.input_{part}", value, [x])
        timestep, rank = timestep_input(rewriter.graph, context.plan.timestep), x.meta["val"].dim()
        table = TimeTable(timestep, layer.boundaries, value[:, None])
        return rows_at(rewriter, table, rank, f"{name}.input_{part}", [x])

    if format.block:
        return _codes_of_blocks(x, stored("global_scale", format.global_scale(low, high)), format, rewriter)
    found = [kind.scales(low, high) for kind in kinds] if len({*kinds}) > 1 else [format.scales(low, high)]
    scale = stored("scale", _of_bins([one.scale for one in found]))
    zeros = [one.zero_point for one in found if one.zero_point is not None]
    zero_point = stored("zero_point", _of_bins(zeros) if zeros else None)
    tops = torch.tensor([top_of(kind.name) for kind in kinds], dtype=torch.uint8) if len(found) > 1 else None
    assert scale is not None
    return _quantize(x, Coded(x, scale, zero_point, format.name), rewriter, stored("top", tops))


def _of_bins(found: Sequence[Tensor]) -> Tensor:
    """Values of all bins: of bin i those that were found in its format, which is the i-th; of one format all."""
    return found[0] if len(found) == 1 else torch.stack([own[number] for number, own in enumerate(found)])


def _codes_of_blocks(x: fx.Node, scale: fx.Node | None, format: Format, rewriter: Rewriter) -> Coded:
    """Codes of floats. For formats with blocks the scales of blocks are found at run time, on the scale that is given.

    Args:
        x: The value.
        scale: Its scale, or for formats with blocks the scale of their scales, if they have one.
        format: The number format.
        rewriter: The rewriter of the graph.
    """
    if not format.block:
        assert scale is not None
        return _quantize(x, Coded(x, scale, None, format.name), rewriter)
    op, arguments = torch.ops.fxquant.block_scale.default, (x, format.name, *optional(scale))
    blocks = rewriter.call(op, arguments, sources=[x], name=f"{x.name}_block_scale", layer=True)
    return _quantize(x, Coded(x, blocks, None, format.name, scale), rewriter)


def _quantize(x: fx.Node, scales: Coded, rewriter: Rewriter, top: fx.Node | None = None) -> Coded:
    """The codes of a value on scales whose nodes are given, and the highest code if not that of the format."""
    rest = optional(scales.global_scale) if top is None else (scales.global_scale, top)
    given = (x, scales.scale, scales.zero_point, scales.format, *rest)
    op = torch.ops.fxquant.quantize.default
    return scales._replace(codes=rewriter.call(op, given, sources=[x], name=f"{x.name}_codes", layer=True))


def decide_range(node: fx.Node, x: fx.Node, context: PassContext, rewriter: Rewriter, method: InputRange) -> None:
    """Write the range of a layer's input into the plan, if it has none. Layers that read the same value share it."""
    name = node.meta[LAYER]
    layer = context.plan.layer(name)
    if layer.activation is not None:
        return
    decided = context.memo.setdefault(("range", x, *layer.formats_of_input, layer.observed), name)
    if decided == name:
        _decide_range(name, context, method)
    else:
        first = context.plan.layer(decided)
        layer.activation = copy.copy(first.activation)
        layer.spread, layer.activation_sqnr_db = copy.copy(first.spread), first.activation_sqnr_db


def _codes_by_token(x: fx.Node, format: Format, rewriter: Rewriter) -> Coded:
    """Codes of an input whose scales are found at run time."""
    key = (x, format.name, InputRange.DYNAMIC)
    if key not in rewriter.memo and not format.zero_points:
        needs_outer = not format.block or format.global_scales
        op, arguments = torch.ops.fxquant.token_scale.default, (x, format.name)
        found = rewriter.call(op, arguments, sources=[x], name=f"{x.name}_scale", layer=True) if needs_outer else None
        rewriter.memo[key] = _codes_of_blocks(x, found, format, rewriter)
    if key not in rewriter.memo:

        def call(op: Any, *arguments: Any, name: str) -> fx.Node:
            return rewriter.call(op, arguments, sources=[x], name=f"{x.name}_{name}", layer=True)

        grid = call(torch.ops.fxquant.token_grid.default, x, format.name, name="grid")
        scale, zero_point = (
            call(torch.ops.aten.select.int, grid, 0, number, name=name)
            for number, name in enumerate(("scale", "zero_point"))
        )
        rewriter.memo[key] = _quantize(x, Coded(x, scale, zero_point, format.name), rewriter)
    coded = rewriter.memo[key]
    assert isinstance(coded, Coded)
    return coded


def _decide_range(name: str, context: PassContext, method: InputRange) -> None:
    """Write the range of a layer's input, and its SQNR on the sampled rows, into the plan."""
    layer = context.plan.layer(name)
    format = layer.format_of_input
    assert format is not None
    if format.block:  # Blocks find their scales at run time. The scale of these scales covers the whole range.
        method = InputRange.MINMAX if format.global_scales and method is not InputRange.DYNAMIC else InputRange.DYNAMIC
    if method is InputRange.DYNAMIC:
        seen = layer_input(context, name)
        rows = torch.cat(seen.rows)
        layer.activation = ActivationRange(float(seen.minimum.min()), float(seen.maximum.max()), method.value)
        layer.activation_sqnr_db = sqnr_db(rows, round_by_token(rows, format))
        tops = seen.absmax.amax(dim=1)
        layer.spread = [float(tops.min()), float(tops.max())]
        return
    kinds = layer.formats_of_input
    count = len(kinds)
    ranges, exact, coded = [], [], []
    for number, format in enumerate(kinds):
        seen = layer_input(context, name, number if count > 1 else None)
        rows = torch.cat(seen.rows)
        ends = float(seen.minimum.min()), float(seen.maximum.max())
        ranges.append(ends if format.block else activation_range(rows, *ends, format, method.value))
        exact.append(rows)
        coded.append(round_in_range(rows, format, *ranges[-1]))
    lows, highs = ([end[side] for end in ranges] for side in (0, 1))
    if len(ranges) == 1:
        layer.activation = ActivationRange(lows[0], highs[0], method.value)
    else:
        layer.activation = ActivationRange(lows, highs, method.value)
    tops = layer_input(context, name).absmax.amax(dim=1)
    layer.spread = [float(tops.min()), float(tops.max())]
    layer.activation_sqnr_db = sqnr_db(torch.cat(exact), torch.cat(coded))
