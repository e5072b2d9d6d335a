"""Helpers of the quantizing passes: quantize weights as the plan says, and record decisions in the plan."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.disk.finished_work import Part, digest_of_tensor
from fxquant.ir.arguments import args
from fxquant.ir.histories import made_from
from fxquant.ir.layers import layer_name, stored_weight
from fxquant.ir.meta import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.memory.bound import kept as in_file
from fxquant.numerics.finite import require_finite
from fxquant.numerics.weights import QuantizedWeight, encode_weight
from fxquant.passes._rounders import RangeSearch, Rounder, moments_key
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.kept_weights import check_weight, kept, part_of_weights, weights_of_part
from fxquant.planning.layer_inputs import layer_input
from fxquant.planning.plan import Plan
from fxquant.planning.roundings import digest_of_values, with_precision
from fxquant.planning.uses import unnumbered


class Coded(NamedTuple):
    """Nodes of codes and of their scales.

    Attributes:
        codes: The codes; of a weight packed.
        scale: The scales.
        zero_point: The zero points; None for formats without them.
        format: Name of the number format.
        global_scale: The scale of the scales; None for formats without one.
    """

    codes: fx.Node
    scale: fx.Node
    zero_point: fx.Node | None
    format: str
    global_scale: fx.Node | None = None


def drop_used_moments(name: str, context: PassContext) -> None:
    """Free second moments that no layer needs any more. Those of a whole model are as large as its weights."""
    if len(context.plan.calls) > 1:  # A further graph may fold other factors into the weight and round it again.
        return
    key = context.plan.layer(name).observed
    readers = (other for other, layer in context.plan.layers.items() if layer.observed == key)
    if key and context.statistics is not None and context.statistics.transient and context.codes.keys() >= set(readers):
        context.statistics.drop_moments(key)


def quantized_weight(
    node: fx.Node,
    context: PassContext,
    rewriter: Rewriter,
    method: RangeSearch,
    symmetric: bool,
    rounder: Rounder | None = None,
) -> Coded:
    """Quantize the weight of a layer; returns nodes of its packed codes and scales.

    The float weight is dropped at once, so that float weights and codes of a whole model are never in memory together.
    Layers that share a weight share its codes.

    Raises:
        NonFiniteError: If the weight holds NaN or infinity.
        ConfigurationError: If the group size does not divide the number of weight columns.
    """
    name = node.meta[LAYER]
    layer = context.plan.layer(name)
    weight = stored_weight(node)
    assert weight is not None and layer.format_of_weight is not None
    format = layer.format_of_weight.name
    key = (weight, format, layer.group_size, layer.group_rows)
    if key in rewriter.memo:
        coded, layer.weight_sqnr_db = rewriter.memo[key]
        assert isinstance(coded, Coded)
        return coded
    values = rewriter.tensor(weight).flatten(1)
    require_finite(values, f"the weight of layer {name}")
    # A fake tensor has no values to search. The shapes are the same for every method.
    search = RangeSearch.MINMAX if isinstance(values, FakeTensor) else method
    history = rewriter.history(weight)
    # False if the codes in the plan were made for another fold of the weight, in a graph that does not share it.
    own = context.shared.is_rounded_here(name, history)
    if isinstance(values, FakeTensor) or (rounder is None and not (own and name in context.codes)):
        quantized = encode_weight(
            values,
            format=format,
            group_size=layer.group_size,
            group_rows=layer.group_rows,
            symmetric=symmetric,
            method=search.value,
            importance=None if search is RangeSearch.MINMAX else importance_of(name, context, values.device),
        )
    elif not own:
        assert rounder is not None
        quantized = _rounded(name, values, rounder, context, method, symmetric)
    else:
        if name not in context.codes:  # Neither learned before nor rounded for another graph of the model.
            assert rounder is not None
            rounded = _rounded(name, values, rounder, context, method, symmetric)
            context.codes[name] = replace(rounded, packed=in_file(rounded.packed))
            drop_used_moments(name, context)
        quantized = context.codes[name]
    if layer.weight_sqnr_db is None:
        layer.weight_sqnr_db = quantized.sqnr_db(values)
    owner = _owner_of_codes(name, str(weight.target), context.plan)
    made = made_from("codes", history, *_grid_of(layer))

    def stored(part: str, value: Tensor | None) -> fx.Node | None:
        return None if value is None else rewriter.constant(f"{owner}_{part}", value, [weight], made)

    codes, scale = stored("packed", quantized.packed), stored("scale", quantized.scale)
    assert codes is not None and scale is not None
    coded = Coded(
        codes,
        scale,
        stored("zero_point", quantized.zero_point),
        format,
        stored("global_scale", quantized.global_scale),
    )
    rewriter.memo[key] = coded, layer.weight_sqnr_db
    if _reads_alone(node, weight):
        rewriter.forget(weight)
    return coded


def rounded_weight(
    node: fx.Node, rounder: Rounder, context: PassContext, rewriter: Rewriter, method: RangeSearch, symmetric: bool
) -> QuantizedWeight:
    """The weight of a layer rounded by a method that uses more than its values; the graph stays as it is.

    Raises:
        NonFiniteError: If the weight holds NaN or infinity.
        CalibrationError: If there are no second moments of the layer's input.
    """
    name, weight = node.meta[LAYER], stored_weight(node)
    assert weight is not None
    values = rewriter.tensor(weight).flatten(1)
    require_finite(values, f"the weight of layer {name}")
    return _rounded(name, values, rounder, context, method, symmetric)


def _rounded(
    name: str, values: Tensor, rounder: Rounder, context: PassContext, method: RangeSearch, symmetric: bool
) -> QuantizedWeight:
    """A weight rounded by the statistics of its input; conversions that share roundings find it there."""
    layer = context.plan.layer(name)
    shared = None if context.statistics is None else context.statistics.roundings

    def rounded(of: LayerPlan) -> QuantizedWeight:
        return _kept_rounding(name, of, values, rounder, context, method, symmetric)

    if shared is None:
        return rounded(layer)
    values_digest = digest_of_values(values)

    def key(of: LayerPlan) -> Hashable:
        return name, values_digest, _grid_of(of), str(rounder), method, symmetric

    wanted = [layer, *(with_precision(layer, precision) for precision in shared.wanted(context.plan, name))]
    if key(layer) not in shared.found:
        for other in wanted:
            shared.found[key(other)] = rounded(other)
    return shared.found[key(layer)]


def _kept_rounding(
    name: str,
    layer: LayerPlan,
    values: Tensor,
    rounder: Rounder,
    context: PassContext,
    method: RangeSearch,
    symmetric: bool,
) -> QuantizedWeight:
    """A rounded weight; one that an interrupted run has kept, if it was made from the same."""

    def made_from() -> dict[str, str]:
        memo, key = context.memo.get("digest of moments"), moments_key(name, context)
        if memo is None or memo[0] != key:
            memo = context.memo["digest of moments"] = key, digest_of_tensor(rounder.inputs(name, context))
        options = f"{rounder} {method.value} symmetric={symmetric} {'/'.join(_grid_of(layer))}"
        return {"inputs of layers": memo[1], "options of rounding": options}

    def compute() -> Part:
        return part_of_weights({name: rounder.quantize(name, layer, values, context, method, symmetric)})

    file = "-".join((name, *(option for option in _grid_of(layer) if option)))

    def check(part: Part) -> None:
        check_weight(part, name, values.shape)

    return weights_of_part(kept(context, "rounding", file, values, made_from, compute, check), values.device)[name]


def _grid_of(layer: LayerPlan) -> tuple[str, ...]:
    """How a weight is coded. For integers with a scale per output channel or group, bits and group size."""
    grid = str(layer.weight_bits), str(layer.group_size)
    more = (layer.weight_format or "", str(layer.group_rows))
    return grid if more == ("", "1") else (*grid, *more)


def _owner_of_codes(name: str, target: str, plan: Plan) -> str:
    """Prefix for the names of a weight's codes. Graphs that use the same name hold the same codes under it.

    The prefix is the name of the weight for the layer that owns it, and for layers with the same bits and group size.
    Layers that share the weight with other bits or groups have codes of their own.
    """
    layer, named = plan.layer(name), plan.layers.get(layer_name(target))
    if named is not None and _grid_of(named) == _grid_of(layer):
        return target
    if named is None and unnumbered(name) == layer_name(target):
        return target
    group = (layer.group_size and f"_g{layer.group_size}") or ""
    rows = "" if layer.group_rows == 1 else f"_r{layer.group_rows}"
    return f"{target}_w{layer.weight_format or layer.weight_bits}{group}{rows}"


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


def optional(*trailing: fx.Node | None) -> tuple[fx.Node | None, ...]:
    """Trailing arguments of an op; none at all if all of them are None, which is their default."""
    return () if all(argument is None for argument in trailing) else trailing
