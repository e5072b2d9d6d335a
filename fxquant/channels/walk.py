"""The walk from the inputs of linears back to the ops that can be rewritten offline.

Every channel of every balanced value is a variable. The walk goes through the graph once, from its end to its start. It
merges the requests of all readers of a value and gives the result to the rule of the op that makes the value. If two
requests meet, their variables are tied. If a request cannot be met, its variables are tied to the identity. At the end,
one computation of connected components finds the variables that are equal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
import torch
from scipy.sparse import coo_matrix, csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx

from fxquant.channels.in_place import not_in_place
from fxquant.channels.layouts import common_shape, repeated, settle_unread, spread_over_unread
from fxquant.channels.readers import MANY, batch_hint, direct_user, identity_share, readers_of, size_hint, with_tokens
from fxquant.channels.rules import outcome, shape_of
from fxquant.channels.rules.rotations import block_codes
from fxquant.channels.sample_order import SampleOrder
from fxquant.channels.solution import Edit, Grant, Request, Seed, Solution
from fxquant.channels.wants import (
    IDENTITY,
    UNREAD,
    Barrier,
    Choose,
    Cost,
    End,
    Indices,
    Push,
    Tie,
    Want,
)
from fxquant.ir.arguments import args
from fxquant.ir.borders import is_marked
from fxquant.ir.names import op_name
from fxquant.ir.places import place_of

AFFINE = torch.ops.fxquant.channel_affine.default
_MIXED = {
    torch.ops.aten.scaled_dot_product_attention.default: "value",
    torch.ops.aten.matmul.default: "other",
    torch.ops.aten.bmm.default: "mat2",
}
"""Ops that mix the tokens of a value, and the name of that value among their arguments."""


def solve(
    graph: fx.Graph,
    seeds: Sequence[Seed],
    dearest: Cost = Cost.VECTOR,
    request: Request = Request.FACTOR,
    timestep: fx.Node | None = None,
) -> Solution:
    """Find out which channels of the seeds can be scaled or shifted, at what cost, and by which edits.

    The graph is not changed and no tensor value is read.

    Args:
        graph: A captured graph with shapes in ``meta["val"]``.
        seeds: The values to scale.
        dearest: Cost of the most expensive edit allowed. Channels that need more are left unchanged, with the reason.
        request: What is requested of the seeds.
        timestep: The input that holds the timestep; for shifts that depend on it.
    """
    return _Walk(graph, seeds, dearest, request, timestep).run()


class _Walk:
    def __init__(
        self, graph: fx.Graph, seeds: Sequence[Seed], dearest: Cost, request: Request, timestep: fx.Node | None
    ) -> None:
        self.graph = graph
        self.request = request
        self.rules = request.rules
        self.sample_order = SampleOrder(timestep if request is Request.SHIFT else None, self.rules)
        self.seeds = seeds
        self.dearest = dearest
        self.batch = batch_hint(graph)
        self.tokens = with_tokens(graph)
        self.wants: dict[fx.Node, dict[fx.Node, list[Want]]] = defaultdict(lambda: defaultdict(list))
        self.ties: list[tuple[Indices, Indices]] = []
        self.blocked: list[tuple[Indices, str]] = []
        self.edits: list[Edit] = []
        self.mixed: dict[fx.Node, Want] = {}
        self.marked: dict[fx.Node, Want] = {}
        self.base: dict[str, int] = {}
        self.undone = {reader for seed in seeds for reader in seed.readers if reader.target is AFFINE}
        same: dict[Hashable, int] = {}
        total = IDENTITY + 1
        for seed in seeds:
            first = same.setdefault((seed.name, None) if seed.alike is None else (None, seed.alike), total)
            self.base[seed.name] = first
            shape = [1] * len(shape_of(seed.value))
            shape[seed.axis] = seed.channels
            ids = np.arange(first, first + seed.channels, dtype=np.int64).reshape(shape)
            self.sample_order.start(seed.value)
            codes = block_codes(seed.channels, seed.block).reshape(shape) if seed.block else 0.0
            for reader in seed.readers:
                self.wants[seed.value][reader].append(Want.of(ids, codes))
            if seed.blocked is not None:
                self._block(ids.ravel(), seed.blocked)
            total = max(total, first + seed.channels)
        self.total = self.seeded = total  # Variables below ``seeded`` are those of seeds.

    def run(self) -> Solution:
        for node in reversed(self.graph.nodes):
            asked = self.wants.pop(node, None)
            if asked:
                self._visit(node, asked)
        return self._resolve()

    def _visit(self, node: fx.Node, asked: Mapping[fx.Node, list[Want]]) -> None:
        if node in self.undone:  # Two factors on one path would be treated as one.
            for want in (want for wants in asked.values() for want in wants):
                self._block(want.variables, f"{node.name} has a factor of its own")
            return
        by_user: dict[fx.Node, list[Want]] = defaultdict(list)
        for reader, wants in asked.items():
            by_user[direct_user(node, reader)] += wants
        shares: list[Want] = []
        others: list[fx.Node] = []
        for reader in readers_of(node):
            share = None if reader in asked else identity_share(reader, node, self.rules)
            if share is not None:
                by_user.get(direct_user(node, reader), shares).append(share)
            elif reader not in asked:
                others.append(reader)
        groups = self._agreeing({user: self._merge(wants) for user, wants in by_user.items()})
        clash = len(groups) > 1 or not all(_agree(groups[0][0], share) for share in shares)
        if others or (clash and self._may_part(node, groups)):
            names = ", ".join(f"{reader.name} ({place_of(reader)})" for reader in others[:3])
            where = f"{node.name} ({place_of(node)})"
            reason = f"{where} is also read by {names}" if others else f"readers of {where} want other factors"
            for want, users in groups:
                settled = settle_unread(want)
                if settled.trivial:
                    continue
                if node.op == "get_attr" and self.dearest > Cost.IN_PLACE:  # A private copy for these readers.
                    self._meet(node, settled, users)
                else:
                    self._stop(node, settled, users, reason)
            return
        merged = self._free_unread(self._merge([*(want for want, _ in groups), *shares]))
        if not merged.trivial:
            self._meet(node, merged, tuple(by_user))

    def _free_unread(self, want: Want) -> Want:
        """Give unread positions new variables: other readers may read them at the source, with their own requests."""
        want = spread_over_unread(want)
        unread = want.scale == UNREAD
        count = int(unread.sum())
        if not count or count > MANY or not (want.scale > IDENTITY).any():
            return settle_unread(want)
        scale = want.scale.copy()
        scale[unread] = np.arange(self.total, self.total + count)
        self.total += count
        return Want(scale, want.offset)

    def _meet(self, node: fx.Node, want: Want, users: tuple[fx.Node, ...]) -> None:
        """Apply the rule of the node's op to the request of all of these users: meet it here, push it on or stop it."""
        found = outcome(node, want, self.rules)
        while isinstance(found, Tie):
            if self._run_time_cost(node, want) <= self.dearest and any(_loses(*tie) for tie in found.ties):
                found = Barrier(found.reason)  # One small multiplication is better than unchanged channels.
                break
            for left, right in found.ties:
                self._tie(left, right, found.reason)
            want = found.want
            found = outcome(node, want, self.rules)
        if isinstance(found, End) and (reason := self.sample_order.unfit(node)) is not None:
            found = Barrier(reason)
        if isinstance(found, End) and (reason := self._not_here(node, found, want, users)) is not None:
            found = Barrier(reason)
        if isinstance(found, Choose):
            found = min(found.ways, key=lambda way: self._price(node, way))
        if isinstance(found, (Push, End)) and is_marked(node):
            self.marked[node] = settle_unread(want)
        if isinstance(found, Push):
            for left, right in found.ties:
                self._tie(left, right, f"{op_name(node.target)} leaves part of it as it is")
            self.sample_order.follow(node, [source for source, _ in found.inputs])
            for source, pushed in found.inputs:
                self.wants[source][node].append(pushed)
                if node.target in _MIXED and source is args(node).node(_MIXED[node.target]):
                    self.mixed[node] = settle_unread(pushed)
        elif isinstance(found, End):
            self.edits.append(Edit(node, want, Cost.FREE, found, users))
        else:
            self._stop(node, want, users, found.reason)

    def _not_here(self, node: fx.Node, end: End, want: Want, users: Sequence[fx.Node] | None = None) -> str | None:
        """Why an end is not allowed because it does more than change parameters that the model has; None if it is."""
        return not_in_place(node, end.gives, users, want) if self.dearest <= Cost.IN_PLACE else None

    def _agreeing(self, wanted: Mapping[fx.Node, Want]) -> list[tuple[Want, tuple[fx.Node, ...]]]:
        """Users of a value, grouped by the factors that they request."""
        groups: list[tuple[Want, tuple[fx.Node, ...]]] = []
        for user, want in wanted.items():
            for number, (other, users) in enumerate(groups):
                if _agree(other, want):
                    groups[number] = self._merge([other, want]), (*users, user)
                    break
            else:
                groups.append((want, (user,)))
        return groups

    def _may_part(self, node: fx.Node, groups: Sequence[tuple[Want, tuple[fx.Node, ...]]]) -> bool:
        """Whether users can get different factors: by copies of a parameter, or by multiplications of a vector."""
        if node.op == "get_attr" and self.dearest > Cost.IN_PLACE:
            return True
        return all(self._run_time_cost(node, settle_unread(want)) <= self.dearest for want, _ in groups)

    def _stop(self, node: fx.Node, want: Want, users: tuple[fx.Node, ...], reason: str) -> None:
        """Multiply or add here at run time if that is cheap enough, otherwise leave these channels unchanged."""
        cost = self._run_time_cost(node, want)
        if cost <= self.dearest:
            op = "multiplication" if self.request is Request.FACTOR else "addition"
            self.edits.append(Edit(node, want, cost, None, users, op))
        else:
            self._block(want.variables, reason)

    def _block(self, variables: Indices, reason: str) -> None:
        self.ties.append((variables, np.full_like(variables, IDENTITY)))
        self.blocked.append((variables, reason))

    def _tie(self, left: Indices, right: Indices, reason: str) -> None:
        """Make variables equal; the reason is recorded for those that therefore have to stay unchanged."""
        differ = left != right
        left, right = left[differ], right[differ]
        self.ties.append((left, right))
        identity = (left == IDENTITY) | (right == IDENTITY)
        if identity.any():
            self.blocked.append((np.unique(np.maximum(left, right)[identity]), reason))

    def _merge(self, wants: Sequence[Want]) -> Want:
        """One want that satisfies all. If two ask for different variables, these are tied. Unread stays unread."""
        shape = common_shape(*(want.scale.shape for want in wants))
        scale = np.full(shape, UNREAD, dtype=np.int64)
        offset = np.zeros(shape)
        # Wants that read the whole value come first, so that one variable represents a channel wherever they are tied.
        for want in sorted(wants, key=lambda want: bool((want.scale == UNREAD).any())):
            other, shift = repeated(want.scale, shape), repeated(want.offset, shape)
            both = (scale != UNREAD) & (other != UNREAD)
            self._tie(scale[both], other[both], "part of it is read unscaled")
            apart = both & (offset != shift) & (scale > IDENTITY)
            if apart.any():
                self._block(np.unique(scale[apart]), "its readers ask for different constant shifts")
            new = scale == UNREAD
            scale = np.where(new, other, scale)
            offset = np.where(new, shift, offset)
        return Want(scale, offset)

    def _run_time_cost(self, node: fx.Node, want: Want) -> Cost:
        """VECTOR if the value holds one element per sample and channel, TOKENS if more, NOT if it cannot be scaled.

        Channels may have two axes, as in ``[batch, 6, channels]``, if the value depends on no input with tokens.
        """
        if not isinstance(value := node.meta["val"], Tensor) or not value.is_floating_point():
            return Cost.NOT
        if self.request is Request.ROTATION:  # Rotated at run time, the input of the layer is the place for it.
            return Cost.NOT
        elements, axes = 1, 0
        for axis, size in enumerate(shape_of(node)):
            if want.varies(axis):
                if not isinstance(size, int):  # No tensor of fixed size fits every batch.
                    return Cost.NOT
                axes += 1
            else:
                elements *= size_hint(size)
        if self.request is not Request.FACTOR and (
            node.op == "get_attr" or not value.dim() or want.varies(0) or self.sample_order.unfit(node) is not None
        ):
            return Cost.NOT
        vector = elements <= self.batch and (axes <= 1 or node not in self.tokens)
        return Cost.VECTOR if vector else Cost.TOKENS

    def _price(self, node: fx.Node, way: Push) -> tuple[int, int, int]:
        """Price of a way: requests blocked or met on tokens, multiplied vectors, and new operands. Less is better."""
        return _add([self._price_of(source, want, node) for source, want in way.inputs])

    def _price_of(self, node: fx.Node, want: Want, reader: fx.Node) -> tuple[int, int, int]:
        want = settle_unread(want)
        if want.trivial:
            return (0, 0, 0)
        others = (other for other in readers_of(node) if other is not reader)
        if node.op != "get_attr" and any(identity_share(other, node, self.rules) is None for other in others):
            # In place, factors that other readers request too can be tied, which is better than no factors.
            return (0, 1, 0) if self.dearest <= Cost.IN_PLACE else self._price_here(node, want)
        found = outcome(node, want, self.rules)
        while isinstance(found, Tie):
            want = found.want
            found = outcome(node, want, self.rules)
        if isinstance(found, End):
            return (0, 0, found.operands) if self._not_here(node, found, want) is None else (1, 0, 0)
        if isinstance(found, Choose):
            return min(self._price(node, way) for way in found.ways)
        return self._price(node, found) if isinstance(found, Push) else self._price_here(node, want)

    def _price_here(self, node: fx.Node, want: Want) -> tuple[int, int, int]:
        cost = self._run_time_cost(node, want)
        return (0, 1, 0) if cost is Cost.VECTOR and self.dearest >= Cost.VECTOR else (1, 0, 0)

    def _resolve(self) -> Solution:
        left = np.concatenate([np.empty(0, np.int64), *(tie[0].ravel() for tie in self.ties)])
        right = np.concatenate([np.empty(0, np.int64), *(tie[1].ravel() for tie in self.ties)])
        real = (left != UNREAD) & (right != UNREAD)
        class_of = _components(self.total, left[real], right[real])
        between = real & (left != IDENTITY) & (right != IDENTITY)
        apart = _components(self.total, left[between], right[between])
        reason_of = np.full(self.total, -1)  # For each component, the position of its first reason.
        for position, (variables, _) in reversed(list(enumerate(self.blocked))):
            reason_of[apart[variables]] = position
        chosen = np.zeros(self.total, dtype=bool)
        chosen[class_of[: self.seeded]] = True
        chosen[IDENTITY] = False
        edits = [edit for edit in self.edits if chosen[class_of[edit.want.scale]].any()]
        touched = [np.unique(class_of[edit.want.scale]) for edit in edits]
        which = np.repeat(np.arange(len(edits)), [len(numbers) for numbers in touched])
        numbers = np.concatenate([np.empty(0, np.int64), *touched])
        touching = csr_array((np.ones(len(which), np.int8), (numbers, which)), shape=(self.total, len(edits) or 1))
        grants = {}
        for seed in self.seeds:
            own = slice(self.base[seed.name], self.base[seed.name] + seed.channels)
            classes = class_of[own]
            indices = touching[np.unique(classes[classes != IDENTITY])].indices
            mine = [edits[index] for index in dict.fromkeys(indices.tolist())]
            found = reason_of[np.unique(apart[own][classes == IDENTITY])]
            reason = next((self.blocked[position][1] for position in found[found >= 0].tolist()), None)
            cost = max((edit.cost for edit in mine), default=Cost.NOT)
            into = tuple(dict.fromkeys(edit.into for edit in mine))
            grants[seed.name] = Grant(seed, classes, cost, into, reason)
        return Solution(grants, edits, self.mixed, class_of, self.base, self.marked)


def _loses(left: Indices, right: Indices) -> bool:
    """Whether a tie makes channels stay unchanged."""
    return bool(((left == IDENTITY) ^ (right == IDENTITY)).any())


def _agree(left: Want, right: Want) -> bool:
    """Whether two wants on one value ask for the same at all positions that both read."""
    shape = common_shape(left.scale.shape, right.scale.shape)
    left, right = (want.map(lambda array: repeated(array, shape)) for want in (left, right))
    both = (left.scale != UNREAD) & (right.scale != UNREAD)
    return bool((~both | ((left.scale == right.scale) & (left.offset == right.offset))).all())


def _components(total: int, left: Indices, right: Indices) -> Indices:
    """Component number of each variable; the component of :data:`IDENTITY` has number 0."""
    links = coo_matrix((np.ones(len(left), np.int8), (left, right)), shape=(total, total))
    _, labels = connected_components(links, directed=False)
    zero = labels[IDENTITY]
    swapped = np.where(labels == zero, IDENTITY, np.where(labels == IDENTITY, zero, labels))
    return np.asarray(swapped, dtype=np.int64)


def _add(prices: Iterable[tuple[int, int, int]]) -> tuple[int, int, int]:
    total = np.sum(list(prices), axis=0)
    return int(total[0]), int(total[1]), int(total[2])
