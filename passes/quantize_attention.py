"""Replace the two matrix products of attention by quantized ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.ir.arguments import args
from fxquant.ir.attention import ATTENTION, SIDES, Attention, changes_of, factors_of, find_attentions
from fxquant.ir.histories import digest
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.shared import SharedTensors
from fxquant.ir.stages import Stage
from fxquant.ir.time_tables import bin_of
from fxquant.numerics.activations import round_in_range
from fxquant.numerics.formats import FORMATS, Format, Scales, format_of
from fxquant.numerics.ranges import activation_range
from fxquant.numerics.sqnr import sqnr_db
from fxquant.passes._inputs import InputRange
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import ActivationRange, AttentionPlan

aten = torch.ops.aten
_MATMUL = torch.ops.fxquant.matmul.default
_QUANTIZE = torch.ops.fxquant.quantize.default
_Codes = tuple[fx.Node, fx.Node, fx.Node | None]
"""Codes, scale and zero point."""


@register_pass
@dataclass(frozen=True)
class QuantizeAttention(Pass):
    """Quantize q, k and v per tensor and the softmax output uniformly, and multiply integers.

    Before::

        y = scaled_dot_product_attention(q, k, v, mask)

    After, with ranges of q / sqrt(d), k and v found in calibration::

        a, b = fxquant.quantize(q / sqrt(d), sq, zq), transpose(fxquant.quantize(k, sk, zk), -2, -1)
        p = fxquant.quantize(softmax(fxquant.matmul(a, sq, zq, b, sk, zk) + mask, -1), 1 / 255, 0)
        y = fxquant.matmul(p, 1 / 255, 0, fxquant.quantize(v, sv, zv), sv, zv)

    A softmax between two matrix products is rewritten in the same way; the ops between the products do not change.
    Masks, causality, grouped-query heads and the scale have the same meaning as in ``scaled_dot_product_attention``,
    which computes scores and softmax of half-precision values in float32. Side conditions: the softmax is over the
    keys, nothing else reads the scores, and there is no dropout. Attention that does not match stays float, and the
    plan says why. Attentions are quantized if ``assign-precision{attention=quantized}`` gave them bits. From PTQ4DiT
    (arXiv 2405.16005). Rounding moves q, k and v by at most half a step of their grids, and each probability by at most
    half of ``1 / (2**softmax_bits - 1)``.

    Attributes:
        activation_range: How the ranges of q, k and v are found: ``minmax``, ``percentile`` or ``mse``.
        softmax_bits: Bits of the softmax output, whose grid covers 0 to 1.
    """

    name: ClassVar[str] = "quantize-attention"
    tier: ClassVar[Tier] = Tier.LOSSY
    requires: ClassVar[Stage] = Stage.QUANTIZED
    establishes: ClassVar[Stage] = Stage.QUANTIZED
    keeps_inputs: ClassVar[bool] = True

    activation_range: InputRange = InputRange.MINMAX
    softmax_bits: int = 8

    def __post_init__(self) -> None:
        if self.activation_range is InputRange.DYNAMIC:
            raise ConfigurationError(
                "quantize-attention: the product with v sums over the tokens of v, so v cannot have a range for each "
                "token; choose minmax, percentile or mse"
            )
        if not 2 <= self.softmax_bits <= 8:
            raise ConfigurationError(
                f"quantize-attention: {self.softmax_bits} bits for the softmax; 2 to 8 are possible"
            )

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        for found in find_attentions(graph):
            entry = context.plan.attentions.get(found.name)
            if entry is None or entry.bits is None:
                continue
            if found.reason is not None:
                raise ConfigurationError(
                    f"attention {found.name!r} is to be quantized, but this call of the model does not allow it: "
                    f"{found.reason}. Set this attention to float in the overrides of assign-precision"
                )
            for side in SIDES:
                if side not in entry.ranges and entry.bits is not None:
                    self._decide(found, side, entry, context)
            if entry.bits is not None:
                _refuse_other_values(found, context.shared)
                entry.softmax_bits = entry.softmax_bits or self.softmax_bits
                _quantize(found, entry, rewriter)

    def _decide(self, found: Attention, side: str, entry: AttentionPlan, context: PassContext) -> None:
        """Write the range of q, k or v, and its SQNR on the sampled rows, into the plan."""
        assert entry.bits is not None
        key = entry.observed.get(side, f"{found.name}:{side}")
        seen = context.observed(key, f"attention {found.name!r} needs ranges of q, k and v")
        low, high, rows = seen.minimum.double(), seen.maximum.double(), [row.double() for row in seen.rows_by_timestep]
        if side == "q":
            low, high, rows = low * found.scale, high * found.scale, [row * found.scale for row in rows]
            low, high = torch.minimum(low, high), torch.maximum(low, high)
        elif side == "v":
            shape = tuple(found.operands[side].value.meta["val"].shape)
            for change in changes_of(found.operands[side].reader):
                factor = _by_channel(change.factor, shape, seen.channels)
                shift = [_by_channel(row, shape, seen.channels) for row in change.shift]
                if factor is None or any(row is None for row in shift):
                    entry.bits, entry.reason = (
                        None,
                        "balancing treats parts of its v differently that it shares a range of",
                    )
                    return
                moved = torch.stack([row for row in shift if row is not None])[
                    bin_of(change.boundaries, seen.timesteps)
                ]
                low, high = low * factor + moved, high * factor + moved
                rows = [row * factor + own for row, own in zip(rows, moved, strict=True)]
        samples = torch.cat(rows).float()
        assert self.activation_range is not InputRange.DYNAMIC
        format = _format(entry)
        ends = activation_range(samples, float(low.min()), float(high.max()), format, self.activation_range.value)
        entry.ranges[side] = ActivationRange(*ends, self.activation_range.value)
        entry.sqnr_db[side] = sqnr_db(samples, round_in_range(samples, format, *ends))


def _format(entry: AttentionPlan) -> Format:
    format = format_of(entry.bits, entry.format)
    assert format is not None
    return format


def _scales(format: Format, low: float, high: float) -> Scales:
    return format.scales(torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64))


def _refuse_other_values(found: Attention, shared: SharedTensors) -> None:
    """Refuse a graph whose v is balanced or shifted differently than in the graph for which its range was found.

    Raises:
        CalibrationError: If so; the message names the attention.
    """
    changes = changes_of(found.operands["v"].reader)
    parts = [part for each in changes for part in (each.factor, each.shift, str(each.boundaries))]
    now = digest(*parts)
    if shared.values.setdefault(found.name, now) != now:
        raise CalibrationError(
            f"the v of attention {found.name!r} takes other factors in this kind of call than in the one for which "
            "its range was found, because other parts of the model read v here; set this attention to float in the "
            "overrides of assign-precision"
        )


def _by_channel(value: Tensor, shape: tuple[Any, ...], channels: int) -> Tensor | None:
    """A tensor that broadcasts against v, as one number per observed channel; None if it differs within a channel."""
    value = value.cpu().reshape([1] * (len(shape) - value.dim()) + list(value.shape))
    if len(shape) == 4 and channels != shape[-1]:  # The channels of all heads.
        value = value.transpose(1, 2)
        if value.shape[:2].numel() != 1:
            return None
        return value.expand(1, 1, shape[1], shape[3]).reshape(channels)
    return None if value.shape[:-1].numel() != 1 else value.reshape(-1).expand(channels)


def _quantize(found: Attention, entry: AttentionPlan, rewriter: Rewriter) -> None:
    """Rewrite one attention whose ranges are decided."""
    assert entry.bits is not None and entry.softmax_bits is not None
    lowering = _Lowering(found, entry, rewriter)
    lowering.fused() if found.output.target is aten.scaled_dot_product_attention.default else lowering.explicit()


def _memory_order(value: Tensor) -> list[int]:
    """The axes of a value, the largest stride first."""
    strides = [stride if isinstance(stride, int) else stride.node.hint for stride in value.stride()]
    if None in strides:
        return list(range(value.dim()))
    return sorted(range(value.dim()), key=lambda axis: -strides[axis])


@dataclass(frozen=True, eq=False)
class _Lowering:
    """Makes the nodes of one attention."""

    found: Attention
    entry: AttentionPlan
    rewriter: Rewriter

    def call(self, op: Any, *arguments: Any) -> fx.Node:
        return self.rewriter.call(op, arguments, sources=[self.found.output], layer=True)

    @property
    def format(self) -> str:
        """The format of q, k and v."""
        return _format(self.entry).name

    @property
    def softmax_format(self) -> str:
        """The format of the softmax output."""
        return self.format if self.entry.format is not None else f"int{self.entry.softmax_bits}"

    def codes(self, x: fx.Node, low: float, high: float, format: str, name: str) -> _Codes:
        found, device = _scales(FORMATS[format], low, high), x.meta["val"].device
        scale, zero_point = (
            None if value is None else self.rewriter.constant(f"{self.found.name}.{name}_{part}", value.to(device), [x])
            for part, value in (("scale", found.scale), ("zero_point", found.zero_point))
        )
        assert scale is not None
        return self.call(_QUANTIZE, x, scale, zero_point, format), scale, zero_point

    def product(self, a: _Codes, b: _Codes, a_format: str, dtype: torch.dtype) -> fx.Node:
        return self.call(_MATMUL, *a, *b, a_format, self.format, dtype)

    def operand(self, side: str, x: fx.Node | None = None) -> _Codes:
        """Codes of q, k or v."""
        found = self.entry.ranges[side]
        assert not isinstance(found.low, list) and not isinstance(found.high, list)
        return self.codes(x or self.found.operands[side].value, found.low, found.high, self.format, side)

    def probabilities(self, x: fx.Node) -> _Codes:
        return self.codes(x, 0.0, 1.0, self.softmax_format, "softmax")

    def explicit(self) -> None:
        """Replace the two products, but no op between them."""
        product, output = self.found.operands["q"].reader, self.found.output
        with self.rewriter.before(product):
            dtype = product.meta["val"].dtype
            scores = self.product(self.operand("q"), self.operand("k"), self.format, dtype)
            if product.target is aten.baddbmm.default:
                scores = self._added(product, scores)
        self.rewriter.replace(product, scores)
        probabilities = factors_of(output)[0]
        with self.rewriter.before(output):
            coded = self.probabilities(probabilities)
            result = self.product(coded, self.operand("v"), self.softmax_format, output.meta["val"].dtype)
            if output.target is aten.baddbmm.default:
                result = self._added(output, result)
        self.finish(result)

    def finish(self, result: fx.Node) -> None:
        """Make all readers of the attention read the result, in the memory layout that views after it rely on."""
        order = _memory_order(self.found.output.meta["val"])
        if order != sorted(order):
            with self.rewriter.before(self.found.output):
                by_memory = self.call(aten.contiguous.default, self.call(aten.permute.default, result, order))
                result = self.call(aten.permute.default, by_memory, [order.index(axis) for axis in range(len(order))])
        result.meta[ATTENTION] = self.found.name
        self.rewriter.replace(self.found.output, result)

    def _added(self, product: fx.Node, result: fx.Node) -> fx.Node:
        """The result of ``baddbmm`` from its product: ``beta * input + alpha * product``."""
        alpha, beta = args(product).alpha, args(product).beta
        if alpha != 1:
            result = self.call(aten.mul.Tensor, result, alpha)
        if beta == 0:
            return result
        added = args(product).node("self")
        if beta != 1:
            added = self.call(aten.mul.Tensor, added, beta)
        return self.call(aten.add.Tensor, result, added)

    def fused(self) -> None:
        """Write out the definition of ``scaled_dot_product_attention``."""
        node, given = self.found.output, args(self.found.output)
        dtype = node.meta["val"].dtype
        inner = torch.float64 if dtype == torch.float64 else torch.float32
        with self.rewriter.before(node):
            q = given.node("query")
            if self.found.scale != 1:
                q = self.call(aten.mul.Tensor, q, self.found.scale)
            left, right, mixed = self.operand("q", q), self.operand("k"), self.operand("v")
            keys, values = right[0], mixed[0]
            if given.enable_gqa:
                keys, values = (self._for_all_heads(part, given.node("query")) for part in (keys, values))
            keys = self.call(aten.transpose.int, keys, -2, -1)
            scores = self.product(left, (keys, *right[1:]), self.format, inner)
            masked = self._masked(scores, given.attn_mask, bool(given.is_causal))
            # A row without any key is 0, not NaN, as in the op itself.
            softmax = aten.softmax.int if masked is scores else aten._safe_softmax.default
            coded = self.probabilities(self.call(softmax, masked, -1))
            result = self.product(coded, (values, *mixed[1:]), self.softmax_format, dtype)
        self.finish(result)

    def _for_all_heads(self, codes: fx.Node, query: fx.Node) -> fx.Node:
        heads, own = query.meta["val"].shape[-3], codes.meta["val"].shape[-3]
        if heads == own:
            return codes
        return self.call(aten.repeat_interleave.self_int, codes, heads // own, -3)

    def _masked(self, scores: fx.Node, mask: Any, causal: bool) -> fx.Node:
        if causal:
            rows, columns = scores.meta["val"].shape[-2:]
            seen = self.call(aten.tril.default, self.call(aten.new_ones.default, scores, [rows, columns]))
            return self.call(aten.masked_fill.Scalar, scores, self.call(aten.eq.Scalar, seen, 0), -math.inf)
        if mask is None:
            return scores
        if mask.meta["val"].dtype == torch.bool:
            return self.call(aten.masked_fill.Scalar, scores, self.call(aten.logical_not.default, mask), -math.inf)
        return self.call(aten.add.Tensor, scores, mask)
