"""Decide the bit widths of every layer."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import ClassVar

from torch import fx

from fxquant.errors import ConfigurationError, shortened
from fxquant.ir.arguments import args
from fxquant.ir.attention import Attention, find_attentions, not_by_sample
from fxquant.ir.layers import layer_name, stored_weight
from fxquant.ir.meta import LAYER, NAMES
from fxquant.ir.products import find_products
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.numerics.formats import FORMATS
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import AttentionPlan, LayerPlan
from fxquant.planning.plan import Plan
from fxquant.planning.precision import FLOAT, Precision, entries_of, overridden, precision_of, roles
from fxquant.planning.uses import unnumbered
from fxquant.text import pattern_of


class Products(enum.Enum):
    """Arithmetic of the two matrix products of attention."""

    FLOAT = "float"
    QUANTIZED = "quantized"
    """At the bits of the activations; see :class:`~fxquant.passes.quantize_attention.QuantizeAttention`."""


@register_pass
@dataclass(frozen=True)
class AssignPrecision(Pass):
    """Write the role and bit widths of every linear, convolution and table, and the bits of attentions, into the plan.

    The graph does not change. Layers and attentions that are already in the plan keep their entries.

    An override that fits no layer and no attention is an error. The error is raised at the first calibration call, or
    at the end of calibration if the model has modules of that name that no call ran.

    Attributes:
        precision: Bits of the layers that are quantized, such as ``w4a8`` or ``w4a16-g64``.
        layers: Which layers are quantized: ``default``, ``blocks`` or ``all``; see
            :func:`fxquant.planning.precision.precision_of`.
        overrides: Exceptions by name pattern, ``transformer_blocks.0.*=w8a8;proj_out=float``.
        attention: Whether the matrix products of attention are quantized too, at the bits of the activations. An
            override that fits the attention's own name, the path of its module, applies to this attention only.
    """

    name: ClassVar[str] = "assign-precision"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.OBSERVED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    keeps_inputs: ClassVar[bool] = True

    precision: str = "w8a8"
    layers: str = "default"
    overrides: str = ""
    attention: Products = Products.FLOAT

    def __post_init__(self) -> None:
        precision_of("", "block", Precision.parse(self.precision), self.layers, self.overrides)

    def decides(self, name: str, layer: LayerPlan) -> bool:
        """Whether the pass decides the precision of a layer: it decides that of all layers."""
        return True

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        plan = context.plan
        default = Precision.parse(self.precision)
        role_of = roles(graph)
        for product in find_products(graph):
            plan.products.setdefault(product.name, product.reason)
        for node in graph.nodes:
            if LAYER not in node.meta or node.meta[LAYER] in plan.layers:
                continue
            name = node.meta[LAYER]
            kind = _kind(node)
            weight = stored_weight(node)
            assert weight is not None
            chosen = precision_of(name, role_of[name], default, self.layers, self.overrides)
            if kind == "embedding":  # The papers keep tables in float; 8-bit rows only save memory.
                one_row_a_sample = args(node).node("indices").meta["val"].dim() == 1
                asked = overridden(name, self.overrides) or (Precision(8, None) if self.layers == "default" else FLOAT)
                chosen = _of_table(asked) if one_row_a_sample else FLOAT
            shape = weight.meta["val"].shape
            rows, columns = int(shape[0]), math.prod(int(size) for size in shape[1:])
            empty = rows * columns == 0
            chosen = FLOAT if empty else chosen
            has_blocks = chosen.weight_format is not None and FORMATS[chosen.weight_format].block > 0
            plan.layers[name] = LayerPlan(
                kind=kind,
                role=role_of[name],
                shape=[rows, columns],
                weight_bits=chosen.weight_bits,
                activation_bits=chosen.activation_bits,
                # Groups are along a linear's input channels.
                group_size=chosen.group_size if kind == "linear" or has_blocks else 0,
                group_rows=chosen.group_rows if kind == "linear" else 1,
                weight_format=chosen.weight_format,
                activation_format=chosen.activation_format,
                reason="its weight has no elements" if empty else self._why_float(name, kind, role_of[name], chosen),
            )
        timestep = next((n for n in graph.nodes if n.op == "placeholder" and n.target == plan.timestep), None)
        for found in find_attentions(graph):
            if found.name not in plan.attentions:
                plan.attentions[found.name] = self._attention(found, default, timestep)

    def check_graph(self, graph: fx.Graph, plan: Plan) -> None:
        module = graph.owning_module
        self._check_overrides(plan, {} if module is None else module.meta.get(NAMES, {}))

    def check_plan(self, plan: Plan) -> None:
        self._check_overrides(plan, {})

    def _check_overrides(self, plan: Plan, names: Mapping[str, bool]) -> None:
        """Refuse overrides that decide nothing.

        Args:
            plan: The plan, with the layers of all graphs so far.
            names: Names of the model's tensors (true) and modules (false), which may run in a further graph.
        """
        for pattern, precision in entries_of(self.overrides):
            attentions = [name for name in plan.attentions if fnmatchcase(name, pattern)]
            products = [name for name in plan.products if fnmatchcase(name, pattern)]
            if any(fnmatchcase(name, pattern) for name in plan.layers):
                continue
            if attentions and (self.attention is Products.QUANTIZED or precision == FLOAT):
                continue
            if attentions:
                raise ConfigurationError(
                    f"override {shortened(pattern)!r} fits the attention {attentions[0]!r} and no layer, and the "
                    f"recipe keeps attention in float; write {attentions[0]}.* for its layers, or quantize attention "
                    "(assign-precision{attention=quantized})"
                )
            if products and precision != FLOAT:
                raise ConfigurationError(
                    f"override {shortened(pattern)!r} fits {products[0]!r}, and that cannot be quantized: "
                    f"{plan.products[products[0]]}"
                )
            if not products and not any(_runs_elsewhere(name, pattern, names, plan) for name in names):
                raise ConfigurationError(
                    f"override {shortened(pattern)!r} fits no layer and no attention of the model; "
                    f"{nearest(pattern, plan)}"
                )

    def _why_float(self, name: str, kind: str, role: str, chosen: Precision) -> str | None:
        """Why a layer, or its activations, are kept in float; None if nothing is."""
        if chosen.weight_bits is None:
            return self._why_float_weight(name, kind, role)
        if chosen.activation_bits is not None:
            return None
        if kind == "embedding":
            return "a table has no activations to quantize; its rows are stored in few bits"
        if overridden(name, self.overrides) is not None:
            return f"an override, {chosen}, keeps its activations in float"
        if self.layers == "default" and role == "embedder":
            return "layers=default stores the weights of embedders in 8 bits and keeps their activations in float"
        return f"the recipe's precision, {chosen}, keeps activations in float"

    def _why_float_weight(self, name: str, kind: str, role: str) -> str:
        if overridden(name, self.overrides) == FLOAT:
            return "an override keeps it in float"
        if kind == "embedding":
            if self.layers == "default" or overridden(name, self.overrides) is not None:
                return "a table in few bits needs one row a sample, and each sample looks up several"
            return f"layers={self.layers} keeps tables in float"
        if self.layers == "all" or role in ("block", "adaln"):
            return "the recipe keeps layers in float"
        return f"layers={self.layers} keeps layers of role {role} in float; layers=all quantizes them"

    def _attention(self, found: Attention, default: Precision, timestep: fx.Node | None) -> AttentionPlan:
        if self.attention is Products.FLOAT:
            return AttentionPlan(None, reason="the recipe keeps attention in float")
        chosen = overridden(found.name, self.overrides) or default
        if chosen.activation_bits is None:
            return AttentionPlan(None, reason="its activations are to stay float")
        format = chosen.activation_format
        reason = found.reason or not_by_sample(found, timestep)
        if reason is None and format is not None and not FORMATS[format].plain_scales:
            why = "no blocks of channels" if FORMATS[format].block else "no scales of 8 bits"
            reason = f"the products of attention have {why} for {format}; fp8 and integers fit"
        bits = None if reason else chosen.activation_bits
        return AttentionPlan(bits, reason=reason, format=None if reason else format)


def _of_table(asked: Precision) -> Precision:
    """The precision of a table whose rows are looked up: its weight's, with float activations and a scale per row."""
    if asked.weight_bits is None:
        return FLOAT
    block = 0 if asked.weight_format is None else FORMATS[asked.weight_format].block
    return Precision(asked.weight_bits, None, block, asked.weight_format)


def _runs_elsewhere(name: str, pattern: str, names: Mapping[str, bool], plan: Plan) -> bool:
    """Whether a pattern may be meant for a part of the model that the graphs so far did not run."""
    place = layer_name(name) if names[name] else name
    if not fnmatchcase(place, unnumbered(pattern)):
        return False
    owner = place.rpartition(".")[0] if names[name] else place  # A tensor may be another parameter, such as a bias.
    return not any(layer in (place, owner) or layer.startswith(f"{place}.") for layer in plan.layers)


def nearest(pattern: str, plan: Plan) -> str:
    """Names of layers and attentions that are closest to a pattern that fits none of them."""
    names = [*plan.layers, *plan.attentions]
    forms = dict.fromkeys(names)
    if "*" in pattern or "?" in pattern:
        for name in names:
            parts = name.split(".")
            forms.update(dict.fromkeys([pattern_of(name), *(".".join(parts[:n]) + ".*" for n in range(1, len(parts)))]))
    close = get_close_matches(pattern, forms, n=3)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    known = [*dict.fromkeys(map(pattern_of, names))]
    return f"its layers are {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"


def _kind(node: fx.Node) -> str:
    name = str(node.target)
    return "embedding" if "embedding" in name else "conv" if "conv" in name else "linear"
