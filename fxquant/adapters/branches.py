"""Inserts side branches of low rank into quantized graphs, before a backend lowers them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxquant.errors import AdapterError
from fxquant.ir.arguments import args
from fxquant.ir.histories import digest
from fxquant.ir.layer_changes import LayerChange
from fxquant.ir.layers import LAYER_OPS
from fxquant.ir.meta import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.time_tables import TimeTable, reads_rows, rows_at, timestep_input
from fxquant.planning.plan import Plan
from fxquant.planning.uses import unnumbered

STRENGTH = "lora_strength"
"""Name of the number that multiplies all branches; a call sets it by ``attention_kwargs={"scale": ...}``."""

_FLOAT, _QUANTIZED = torch.ops.aten.linear.default, torch.ops.fxquant.linear.default
_LINEARS = (_FLOAT, _QUANTIZED)


@dataclass(frozen=True)
class Site:
    """A branch beside one layer, with the names of its tensors in the graphs.

    Attributes:
        layer: The path of the module; a module that runs twice has two sites if passes changed its uses differently.
        change: What passes did to the layer.
        a: Name of ``[rank, in]``.
        b: Name of ``[out, rank]``.
        offset: Name of what is added to the inner value: ``[1, ..., rank]``, or ``[bins, rank]``; or None.
    """

    layer: str
    change: LayerChange
    a: str
    b: str
    offset: str | None


@dataclass
class Branching:
    """Inserts a branch beside each layer of a set, in all graphs of a model, and remembers where.

    Attributes:
        ranks: The rank of the branch beside each layer, by the path of its module.
        sites: The branches by the name of their tensor A.
        tensors: The tensors of the branches by name, zeros until they are filled.
        found: The layers that some graph has.
    """

    ranks: dict[str, int]
    sites: dict[str, Site] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    found: set[str] = field(default_factory=set)

    def insert(
        self, module: fx.GraphModule, changes: Mapping[str, LayerChange], moved: Collection[str], plan: Plan
    ) -> None:
        """Insert the branches into one quantized graph.

        Args:
            module: The graph, before a backend lowers it.
            changes: What passes did to its layers.
            moved: Layers whose input a pass changed by a function of its own.
            plan: The plan of the model.

        Raises:
            AdapterError: If a layer cannot have a branch: it is not a linear, or a pass changed it in another way than
                by factors and shifts of channels. The message names the layer.
        """
        rewriter = Rewriter(module, "insert-branches")
        strength: fx.Node | None = None
        for node in list(module.graph.nodes):
            if node.target not in _LINEARS and node.target not in LAYER_OPS:
                continue
            use = str(node.meta.get(LAYER, ""))
            layer = unnumbered(use) if unnumbered(use) in self.ranks else use
            if layer not in self.ranks:
                continue
            change = changes.get(use, LayerChange.none())
            self._check(node, layer, change, use in moved)
            if strength is None:
                one = torch.ones((), device=node.meta["val"].device)
                strength = self._read(rewriter, STRENGTH, one, node)
            self._branch(node, layer, change, strength, rewriter, plan)
            self.found.add(layer)
        self._refuse_replaced(module, plan)

    def _check(self, node: fx.Node, layer: str, change: LayerChange, moved: bool) -> None:
        if node.target not in _LINEARS:
            raise AdapterError(
                f"layer {layer!r} is a {str(node.target).split('.')[1]}, and an adapter can only be loaded beside a "
                "linear of a quantized model. Fuse this LoRA into the float model (pipe.fuse_lora(), then "
                "pipe.unload_lora_weights()) and compile the result"
            )
        if (moved and change.turned is None) or change.unknown is not None:
            raise AdapterError(
                f"layer {layer!r} was changed by {change.unknown or 'a pass that transforms its input'}, and not by "
                "factors and shifts of channels, so a LoRA of the original model does not fit it. Leave the layer out "
                "of that pass, or fuse the LoRA into the float model and compile the result"
            )

    def _branch(
        self,
        node: fx.Node,
        layer: str,
        change: LayerChange,
        strength: fx.Node,
        rewriter: Rewriter,
        plan: Plan,
    ) -> None:
        x, value = _float_input(node, layer), node.meta["val"]
        rank, dtype, device = self.ranks[layer], value.dtype, value.device
        site = self._site(layer, change, node)
        readers = list(node.users)
        with rewriter.after(node):
            a = self._read(
                rewriter, site.a, torch.zeros(rank, x.meta["val"].shape[-1], dtype=dtype, device=device), node
            )
            b = self._read(rewriter, site.b, torch.zeros(value.shape[-1], rank, dtype=dtype, device=device), node)
            offset = None
            if change.shift is not None:
                assert site.offset is not None
                bins = torch.zeros(len(change.shift.rows), rank, dtype=dtype, device=device)
                timestep = timestep_input(rewriter.graph, plan.timestep)
                table = TimeTable(timestep, change.shift.boundaries, bins)
                offset = rewriter.memo.get(site.offset)
                if offset is None:
                    offset = rewriter.memo[site.offset] = rows_at(rewriter, table, value.dim(), site.offset, [node])
                    self._hold(_held_by(offset), site.offset, rewriter)
            branch = rewriter.call(
                torch.ops.fxquant.low_rank.default, (node, x, a, b, offset, strength), [node], name=f"{node.name}_lora"
            )
        for reader in readers:
            rewriter.redirect(reader, node, branch)

    def _site(self, layer: str, change: LayerChange, node: fx.Node) -> Site:
        """The site of a use of a layer; all uses, in all graphs, to which passes did the same share its tensors."""
        parts = [change.rows, change.columns]
        if change.shift is not None:
            parts.append(change.shift.rows)
        if change.turned is not None:
            parts += [change.turned.signs, torch.tensor(change.turned.block)]
        if change.rows_turned is not None:
            parts += [change.rows_turned.places, change.rows_turned.signs]
        value = node.meta["val"]
        mark = digest(layer, *parts, str((value.dtype, value.dim(), change.shift and change.shift.boundaries)))
        name = f"{layer}.lora_{mark}"
        offset = None if change.shift is None else f"{name}_offset"
        return self.sites.setdefault(f"{name}_a", Site(layer, change, f"{name}_a", f"{name}_b", offset))

    def _read(self, rewriter: Rewriter, name: str, value: Tensor, node: fx.Node) -> fx.Node:
        """A node that reads a tensor of a branch; all uses in one graph read it by one node."""
        if name not in rewriter.memo:
            rewriter.memo[name] = rewriter.constant(name, self.tensors.get(name, value), [node])
            self._hold(rewriter.memo[name], name, rewriter)
        made: fx.Node = rewriter.memo[name]
        return made

    def _hold(self, made: fx.Node, name: str, rewriter: Rewriter) -> None:
        self.tensors.setdefault(name, rewriter.tensor(made))

    def _refuse_replaced(self, module: fx.GraphModule, plan: Plan) -> None:
        """Refuse layers that a pass replaced by an op of its own: something works for them, and nothing is a linear."""
        named = {unnumbered(str(node.meta[LAYER])) for node in module.graph.nodes if LAYER in node.meta}
        gone = next((name for name in self.ranks if name in named and name not in self.found), None)
        if gone is not None:
            raise AdapterError(
                f"layer {gone!r} is no linear of the quantized graph any more: a pass replaced it. Leave the layer out "
                "of that pass, or fuse the LoRA into the float model and compile the result"
            )


def _float_input(node: fx.Node, layer: str) -> fx.Node:
    """The value that a linear reads, before it is quantized."""
    if node.target is _FLOAT:
        return args(node).node("input")
    codes = args(node).node("xq")
    if codes.target is not torch.ops.fxquant.quantize.default:
        raise AdapterError(
            f"layer {layer!r} reads codes that another op than fxquant::quantize made, so a branch has no float value "
            "to read. Fuse the LoRA into the float model and compile the result"
        )
    return args(codes).node("x")


def _held_by(offset: fx.Node) -> fx.Node:
    """The tensor behind the rows that :func:`rows_at` selects."""
    if not reads_rows(offset):
        return offset
    return args(args(offset).node("self")).node("self")
