"""The tensors that a lowered graph holds in place of a checkpoint's, and the way back to those."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.backends.torchao import weights
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.tensors import read_tensors

_STORED = "fxquant_torchao_stored"
"""Key of ``node.meta`` for the tensors of a checkpoint that a node stands for: by name, or how they are found again."""

_INT8, _INT4 = "_int8", "_int4"
_SUMS, _EXCESS = "_sums", "_excess"
_ZEROS = "zero_points_of_"


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight as the quantized graph reads it.

    Attributes:
        packed: Node of its packed codes.
        scale: Node of its scales, `[out, groups]`.
        zero_point: Node of its zero points, of the same shape.
        bits: Bits a code.
        in_features: Codes a row.
        kernel: For a convolution, the axes that a row has.
    """

    packed: fx.Node
    scale: fx.Node
    zero_point: fx.Node
    bits: int
    in_features: int
    kernel: tuple[int, ...] = ()

    @property
    def out_features(self) -> int:
        """Rows."""
        return int(self.scale.meta["val"].shape[0])


@dataclass(frozen=True)
class _Recipe:
    """How the packed codes of a weight are found again from the tensor that is held."""

    packed: str
    zero_point: str
    zero_points: Tensor
    bits: int
    out_features: int
    in_features: int


class Held:
    """Makes what kernels read of weights, once for all graphs of a model.

    Args:
        rewriter: Of the graph.
        others: The tensors that the model's other graphs hold, by name.
    """

    def __init__(self, rewriter: Rewriter, others: Mapping[str, Tensor]) -> None:
        self._rewriter = rewriter
        self._others = others
        self._uses: dict[fx.Node, int] = {}

    def int8(self, weight: Weight) -> fx.Node:
        """The symmetric weight, int8 `[out, in]` or with the axes of a convolution."""

        def make() -> Tensor:
            made = self._signed(weight)
            return made.unflatten(1, weight.kernel) if weight.kernel else made

        return self._always(weight, _INT8, make)

    def int4(self, weight: Weight) -> fx.Node:
        """Codes of up to 4 bits in the layout of the kernel."""
        packed = self._rewriter.tensor(weight.packed)
        return self._always(weight, _INT4, lambda: weights.four_bits(packed, weight.bits, weight.in_features))

    def sums(self, weight: Weight) -> fx.Node:
        """Sums of the rows of the symmetric weight, int32 `[out]`."""
        return self._always(weight, _SUMS, lambda: self._signed(weight).sum(1, dtype=torch.int32))

    def excess(self, weight: Weight) -> fx.Node | None:
        """What the symmetric weight is more than the weight, float32 `[out]`; None for nothing."""
        scale, zero_point = (self._rewriter.tensor(part) for part in (weight.scale, weight.zero_point))
        return self._node(weight, _EXCESS, lambda: weights.excess(scale, zero_point, weight.bits))

    def zeros(self, weight: Weight) -> fx.Node:
        """Zero points of the symmetric weight for one reader of it, int32 `[out]`.

        They have another name for each, for else the compiler makes one value of a weight that two readers dequantize,
        and no fusion takes a value that two products read.
        """
        uses = self._uses[weight.packed] = self._uses.get(weight.packed, 0) + 1
        name = f"{_ZEROS}{weight.out_features}{'' if uses == 1 else f'_for_reader_{uses}'}"
        if name not in self._rewriter.memo:
            zeros = self._others.get(name)
            if zeros is None:
                zeros = torch.zeros(weight.out_features, dtype=torch.int32)
            self._rewriter.memo[name] = self._rewriter.constant(name, zeros, [])
        node: fx.Node = self._rewriter.memo[name]
        return node

    def keep(self, node: fx.Node, parts: list[fx.Node]) -> None:
        """Note on a node the tensors of a checkpoint that it has in it as numbers."""
        node.meta[_STORED] = {str(part.target): self._rewriter.tensor(part) for part in parts}

    def _signed(self, weight: Weight) -> Tensor:
        packed, zero_point = (self._rewriter.tensor(part) for part in (weight.packed, weight.zero_point))
        return weights.signed(packed, zero_point, weight.bits, weight.in_features)

    def _always(self, weight: Weight, suffix: str, make: Callable[[], Tensor]) -> fx.Node:
        node = self._node(weight, suffix, make)
        assert node is not None
        return node

    def _node(self, weight: Weight, suffix: str, make: Callable[[], Tensor | None]) -> fx.Node | None:
        """The node of a tensor that follows from a weight: that of another graph, or made here; None for none."""
        rewriter, name = self._rewriter, f"{weight.packed.target}{suffix}"
        if name not in rewriter.memo:
            # Without values nothing can be made; then the other graphs tell whether there is such a tensor.
            without = isinstance(rewriter.tensor(weight.packed), FakeTensor)
            value = self._others.get(name) if without or name in self._others else make()
            node = None if value is None else rewriter.constant(name, value, [weight.packed])
            if node is not None and suffix in (_INT8, _INT4):
                node.meta[_STORED] = _Recipe(
                    str(weight.packed.target),
                    str(weight.zero_point.target),
                    rewriter.tensor(weight.zero_point),
                    weight.bits,
                    weight.out_features,
                    weight.in_features,
                )
            rewriter.memo[name] = node
        found: fx.Node | None = rewriter.memo[name]
        return found


def stored(module: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors of a lowered graph, with packed codes in place of weights and without what follows from others."""
    found = read_tensors(module)
    for node in module.graph.nodes:
        kept: Any = node.meta.get(_STORED)
        if isinstance(kept, dict):
            found |= kept
        elif isinstance(kept, _Recipe):
            held = found.pop(str(node.target))
            found[kept.zero_point] = kept.zero_points
            if str(node.target).endswith(_INT4):
                found[kept.packed] = weights.from_four_bits(held, kept.out_features, kept.in_features, kept.bits)
            else:
                found[kept.packed] = weights.unsigned(held, kept.zero_points, kept.bits)
            for suffix in (_SUMS, _EXCESS):
                found.pop(f"{kept.packed}{suffix}", None)
    return {name: tensor for name, tensor in found.items() if not name.startswith(_ZEROS)}
