"""Rotate the inputs of linears by Hadamard matrices."""

from __future__ import annotations

import enum
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.channels.apply import fold_into_parameters
from fxquant.channels.solution import Seed
from fxquant.channels.turning import Classes, Rotations, largest_rotations
from fxquant.errors import ConfigurationError, QualityWarning
from fxquant.ir.borders import note_rotation
from fxquant.ir.histories import digest
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage, is_replayed
from fxquant.numerics.hadamard import check_block, largest_block, rotate
from fxquant.passes._seeds import parse_roles
from fxquant.passes._targets import check_patterns, is_targeted, targets, warn_of_none
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.linears import FloatLinear
from fxquant.planning.plan import Plan
from fxquant.planning.rotations import Rotation


class Online(enum.Enum):
    """What happens to inputs whose rotation no producer absorbs."""

    ON = "on"
    """They are rotated at run time."""
    OFF = "off"
    """They are not rotated."""


@register_pass
@dataclass(frozen=True)
class RotateChannels(Pass):
    """Rotate the input of linears and the columns of their weights, so that no channel stands out.

    Before::

        y = linear(x, W, bias)

    After, with signs D and equal Hadamard matrices H along the channels, both orthogonal and H symmetric, so that
    ``(x D H) (W D H)^T = x W^T``::

        y = linear(hadamard(x, D), W D H, bias)

    Each channel of ``x D H`` is a mean over a block of channels with random signs, so a few salient channels are spread
    over their block, and one range fits all channels better (QuaRot, arXiv 2404.00456). The signs are drawn once, and
    kept in the plan. The size of the blocks is a power of two that divides the number of channels: 128 for 1152.

    Where the channel walk finds that the producers of x can be rotated offline, nothing is computed at run time: the
    projection to v takes the rotation of an output projection through attention, in blocks within a head, and a linear
    that of the next linear. The rules are in :mod:`fxquant.channels.rules.rotations`. Elsewhere the input is rotated by
    ``fxquant::hadamard``, once for all linears that read it. Equal in real arithmetic. It runs after calibration, and
    after the passes that balance and shift channels; statistics follow the rotation. A layer whose rotation is in the
    plan keeps it if the plan is edited so that its input stays float.

    Attributes:
        block: Channels per Hadamard matrix; 0 for the largest power of two that divides the number of channels, and
            offline for the largest for which producers can be rotated.
        least: The smallest block that is worth it. Inputs that allow only smaller ones are not rotated.
        online: Whether inputs are rotated at run time where no producer can be: ``on`` or ``off``.
        offline: Whether producers are rotated where they can be.
        seed: Seed of the signs.
        roles: Roles of the layers, joined by ``+``; see :mod:`fxquant.planning.precision`.
        layers: Patterns of the names of the layers, joined by ``;``, such as ``*.ff.net.2;*.to_out.0``.
    """

    name: ClassVar[str] = "rotate-channels"
    tier: ClassVar[Tier] = Tier.ALGEBRAIC
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.TRANSFORMED

    block: int = 0
    least: int = 16
    online: Online = Online.ON
    offline: bool = True
    seed: int = 0
    roles: str = "block"
    layers: str = "*"

    def __post_init__(self) -> None:
        parse_roles(self.name, self.roles)
        if self.block < 0 or self.block & (self.block - 1):
            raise ConfigurationError(
                f"{self.name}: blocks of {self.block} channels are not possible; choose a power of two, or 0 for the "
                "largest one that divides the number of channels"
            )
        if self.least < 2:
            raise ConfigurationError(f"{self.name}: least={self.least} is not possible; choose 2 or more channels")

    def check_plan(self, plan: Plan) -> None:
        check_patterns(self.name, self.layers, plan)

    def decides(self, name: str, layer: LayerPlan) -> bool:
        """Whether the pass decides the rotation of a layer's input."""
        return (
            layer.kind == "linear"
            and layer.weight_bits is not None
            and layer.activation_bits is not None
            and is_targeted(name, layer, self.roles, self.layers)
        )

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        rotations = context.plan.decisions_of(Rotation)
        values = self._values(graph, context, rewriter)
        if not values and not rotations and not is_replayed(rewriter.module):
            what = "inputs that stay float are not rotated; leave the pass out, or quantize inputs (w4a8)"
            warn_of_none(self.name, context.plan, self.roles, self.layers, what)
        alone = self._absorb(self._offline(graph, values, context), values, context, rewriter)
        for value in alone:
            if value.undecided:
                self._decide_online(value, rotations)
            for layer in value.layers:
                rotation = rotations[layer.name]
                if rotation.block > 1:
                    _rotate_online(layer, rotation, rewriter)
        if any(value.undecided for value in values):
            self._warn_of_narrow(rotations)
        for value in values:
            for layer in value.layers:
                rotation = rotations[layer.name]
                if rotation.block > 1:
                    _declare(layer, rotation, context)

    def _warn_of_narrow(self, rotations: Mapping[str, Rotation]) -> None:
        """Warn that no input of the model is rotated because of the numbers of channels."""
        if self.online is Online.ON and all(rotation.block == 1 for rotation in rotations.values()):
            name, first = next(iter(rotations.items()))
            warnings.warn(
                f"{self.name} rotates no layer, such as {name}: {first.reason}, and least={self.least}. Leave the pass "
                "out, or choose a smaller least",
                QualityWarning,
                stacklevel=3,
            )

    def _values(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> list[_Value]:
        """The values that layers to rotate read and that are not rotated yet, each with these layers."""
        rotations = context.plan.decisions_of(Rotation)
        found: dict[tuple[fx.Node, tuple[int, bytes] | None], _Value] = {}
        for layer in targets(graph, context.plan, self.roles, self.layers, rotations, kept=_kept(context.plan)):
            decided = rotations.get(layer.name)
            if decided is not None and _is_done(layer, decided, rewriter):
                continue
            if decided is not None:
                _check(layer, decided)
            key = None if decided is None else (decided.block, decided.signs.numpy().tobytes())
            found.setdefault((layer.input, key), _Value(layer.input)).layers.append(layer)
        for (source, key), value in list(found.items()):
            if key is not None:
                continue
            # Layers that no earlier graph had follow those that read the same value.
            other = next((each for each in found.values() if each.source is source and each is not value), None)
            if other is None:
                value.undecided = True
            else:
                value.decide(rotations[other.name], rotations)
                other.layers += value.layers
                del found[source, None]
        return list(found.values())

    def _offline(self, graph: fx.Graph, values: Sequence[_Value], context: PassContext) -> Rotations | None:
        """The values that producers can take the rotation of, with the largest blocks that allow it."""
        rotations = context.plan.decisions_of(Rotation)
        quantized = any(attention.bits is not None for attention in context.plan.attentions.values())
        sizes: dict[Seed, Sequence[int]] = {}
        for value in values:
            decided = rotations.get(value.name)
            if decided is not None and decided.cost == "free":
                sizes[value.seed()] = [decided.block]
            elif value.undecided and self.offline and not quantized and (own := self._sizes(value)):
                sizes[value.seed()] = own
        if not sizes:
            return None
        fixed = {seed.name: rotations[seed.name].signs for seed in sizes if seed.name in rotations}
        found = largest_rotations(graph, sizes, fixed)
        for value in values:
            value.reason = found.refused.get(value.name)
        return found

    def _absorb(
        self, found: Rotations | None, values: Sequence[_Value], context: PassContext, rewriter: Rewriter
    ) -> list[_Value]:
        """Rotate producers and weights offline; returns the values whose rotation nothing absorbs."""
        if found is None:
            return list(values)
        rotations = context.plan.decisions_of(Rotation)
        signs: dict[Classes, Tensor] = {}
        taken = [value for value in values if value.name in found.solution.grants]
        for value in sorted(taken, key=lambda value: value.undecided):
            keys, block = found.keys(value.name), found.solution.grants[value.name].seed.block
            own = rotations.get(value.name)
            drawn = draw_signs(self.seed, value.name, value.channels) if own is None else own.signs
            for key, row in zip(keys, drawn.reshape(-1, block), strict=True):
                signs.setdefault(key, row)
            if value.undecided:
                decided = Rotation(block, "free", torch.cat([signs[key] for key in keys]), found.into(value.name))
                value.decide(decided, rotations)
        for node, turn in found.marked(signs):
            note_rotation(node, turn)
        for edit, turn in found.turns(signs):
            assert edit.end is not None
            fold_into_parameters(edit, edit.end, rewriter, turn)
        for value in taken:
            for layer in value.layers:
                _fold(layer, rotations[layer.name], rewriter)
        return [value for value in values if value not in taken]

    def _sizes(self, value: _Value) -> list[int]:
        """Possible sizes of blocks, the largest first; empty if the input is not to be rotated.

        Raises:
            ConfigurationError: If the size that was asked for does not divide the number of channels.
        """
        channels = value.channels
        if self.block:
            try:
                check_block(self.block, channels)
            except ConfigurationError as error:
                raise ConfigurationError(
                    f"{self.name}: layer {value.name!r}: {error} Or leave block out, or the layer (layers=...)"
                ) from None
            return [self.block]
        largest = largest_block(channels)
        return [size for size in _halves(largest) if size >= self.least]

    def _decide_online(self, value: _Value, rotations: dict[str, Rotation]) -> None:
        sizes = self._sizes(value)
        if not sizes:
            reason = f"its {value.channels} channels allow only blocks of {largest_block(value.channels)}"
            decided = Rotation(1, "not", reason=reason)
        elif self.online is Online.OFF:
            decided = Rotation(1, "not", reason=value.reason or "only producers were to be rotated")
        else:
            signs = draw_signs(self.seed, value.name, value.channels)
            decided = Rotation(sizes[0], "tokens", signs, reason=value.reason)
        value.decide(decided, rotations)


@dataclass(eq=False)
class _Value:
    """A value that layers read, which are rotated alike."""

    source: fx.Node
    layers: list[FloatLinear] = field(default_factory=list)
    undecided: bool = False
    reason: str | None = None

    @property
    def name(self) -> str:
        return self.layers[0].name

    @property
    def channels(self) -> int:
        return self.layers[0].plan.shape[1]

    def decide(self, decided: Rotation, rotations: dict[str, Rotation]) -> None:
        """Write a decision into the plan for each layer, which can be edited by itself."""
        for layer in self.layers:
            rotations[layer.name] = replace(decided, signs=decided.signs.clone(), into=list(decided.into))

    def seed(self) -> Seed:
        return Seed(self.name, self.source, tuple(layer.node for layer in self.layers))


def _kept(plan: Plan) -> set[str]:
    """Layers whose rotation was decided for another precision and that still have a quantized weight.

    A search compares precisions of a layer by what it reads in one float run, so all of them read the same value.
    """
    return {name for name in plan.decisions_of(Rotation) if name in plan.layers and plan.layer(name).weight_bits}


def draw_signs(seed: int, name: str, channels: int) -> Tensor:
    """Random signs for the input of a layer, int8 ``[channels]``."""
    generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
    return (torch.randint(0, 2, (channels,), generator=generator) * 2 - 1).to(torch.int8)


def _halves(size: int) -> Iterable[int]:
    while size > 1:
        yield size
        size //= 2


def _by(rotation: Rotation) -> tuple[Tensor | str, ...]:
    return ("rotated", rotation.signs, str(rotation.block))


def _is_done(layer: FloatLinear, rotation: Rotation, rewriter: Rewriter) -> bool:
    return rotation.block == 1 or digest(*_by(rotation)) in rewriter.history(layer.weight).steps


def _check(layer: FloatLinear, rotation: Rotation) -> None:
    """Refuse what was edited in a plan and cannot be carried out.

    Raises:
        ConfigurationError: Names the layer.
    """
    try:
        check_block(rotation.block, layer.plan.shape[1])
    except ConfigurationError as error:
        raise ConfigurationError(f"layer {layer.name!r}: {error} Edit the block in the plan.") from None
    fits = tuple(rotation.signs.shape) == (layer.plan.shape[1],) and rotation.signs.dtype == torch.int8
    if not fits or not bool((rotation.signs.abs() == 1).all()):
        raise ConfigurationError(
            f"layer {layer.name!r}: its rotation needs one sign of 1 or -1 per channel, int8 [{layer.plan.shape[1]}]"
        )


def _rotate_online(layer: FloatLinear, rotation: Rotation, rewriter: Rewriter) -> None:
    x, key = layer.input, (layer.input, *map(str, (rotation.block, rotation.signs.tolist())))
    if key not in rewriter.memo:
        with rewriter.before(layer.node):
            signs = rewriter.constant(f"{layer.name}.rotation_signs", rotation.signs, [x])
            arguments = (x, signs, rotation.block)
            op = torch.ops.fxquant.hadamard.default
            rewriter.memo[key] = rewriter.call(op, arguments, [x, layer.node], name=f"{x.name}_rotated", layer=True)
    rewriter.redirect(layer.node, x, rewriter.memo[key])
    _fold(layer, rotation, rewriter)


def _fold(layer: FloatLinear, rotation: Rotation, rewriter: Rewriter) -> None:
    rewriter.fold(layer.node, "weight", lambda w: rotate(w.double(), rotation.signs, rotation.block), by=_by(rotation))


def _declare(layer: FloatLinear, rotation: Rotation, context: PassContext) -> None:
    context.transform_input(layer.name, lambda rows: rotate(rows.double(), rotation.signs, rotation.block))
