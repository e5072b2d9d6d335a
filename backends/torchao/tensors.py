"""The tensors that a lowered graph holds in place of those of a checkpoint, and the conversion back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.derived_tensors import derived
from fxquant.backends.torchao import weights
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.tensors import read_tensors

_STORED = "fxquant_torchao_stored"
"""Key of ``node.meta`` for the checkpoint tensors that a node replaces.

It holds the tensors by name, or how to recover them, or the name of the tensor that has the same bytes.
"""

_INT8, _INT4, _FP8 = "_int8", "_int4", "_fp8"
_SUMS, _EXCESS = "_sums", "_excess"
_ZEROS = "zero_points_of_"


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight as the quantized graph reads it.

    Attributes:
        packed: Node of its packed codes.
        scale: Node of its scales, `[out, groups]`.
        zero_point: Node of its zero points, of the same shape.
        bits: Bits per code.
        in_features: Codes per row.
        kernel: For a convolution, the sizes of the axes of a row.
    """

    packed: fx.Node
    scale: fx.Node
    zero_point: fx.Node
    bits: int
    in_features: int
    kernel: tuple[int, ...] = ()

    @property
    def out_features(self) -> int:
        """Number of rows."""
        return int(self.scale.meta["val"].shape[0])


@dataclass(frozen=True)
class _Recipe:
    """How to recover the packed codes of a weight from the tensor of the kernel."""

    packed: str
    zero_point: str
    zero_points: Tensor
    bits: int
    out_features: int
    in_features: int


class DerivedTensors:
    """Makes the tensors that kernels read for a weight, once for all graphs of a model.

    Args:
        rewriter: The rewriter of the graph.
        others: The tensors that the model's other graphs hold, by name.
    """

    def __init__(self, rewriter: Rewriter, others: Mapping[str, Tensor]) -> None:
        self._rewriter = rewriter
        self._others = others
        self._uses: dict[fx.Node, int] = {}

    def int8(self, weight: Weight) -> fx.Node:
        """The symmetric weight, int8 `[out, in]`, or with the axes of a convolution."""

        def make() -> Tensor:
            made = self._signed(weight)
            return made.unflatten(1, weight.kernel) if weight.kernel else made

        return self._always(weight, _INT8, make)

    def int4(self, weight: Weight) -> fx.Node:
        """Codes of up to 4 bits in the layout of the kernel."""
        packed = self._rewriter.tensor(weight.packed)
        return self._always(weight, _INT4, lambda: weights.four_bits(packed, weight.bits, weight.in_features))

    def floats(self, packed: fx.Node) -> fx.Node:
        """A weight of the format ``fp8``, float8_e4m3fn `[out, in]`; its bytes are the packed codes."""
        node = derived(
            packed, _FP8, self._rewriter, self._others, lambda: self._rewriter.tensor(packed).view(torch.float8_e4m3fn)
        )
        assert node is not None
        node.meta[_STORED] = str(packed.target)
        return node

    def sums(self, weight: Weight) -> fx.Node:
        """Sums of the rows of the symmetric weight, int32 `[out]`."""
        return self._always(weight, _SUMS, lambda: self._signed(weight).sum(1, dtype=torch.int32))

    def excess(self, weight: Weight) -> fx.Node | None:
        """The symmetric weight minus the weight, float32 `[out]`; None if they are equal."""
        scale, zero_point = (self._rewriter.tensor(part) for part in (weight.scale, weight.zero_point))
        return self._node(weight, _EXCESS, lambda: weights.excess(scale, zero_point, weight.bits))

    def zeros(self, weight: Weight) -> fx.Node:
        """Zero points of the symmetric weight for one reader of it, int32 `[out]`.

        Each reader has its own name for them. Otherwise the compiler merges the dequantized weights of two readers into
        one value, and no fusion takes a value that two products read.
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
        """Record on a node the checkpoint tensors whose values the node holds as numbers."""
        node.meta[_STORED] = {str(part.target): self._rewriter.tensor(part) for part in parts}

    def _signed(self, weight: Weight) -> Tensor:
        packed, zero_point = (self._rewriter.tensor(part) for part in (weight.packed, weight.zero_point))
        return weights.signed(packed, zero_point, weight.bits, weight.in_features)

    def _always(self, weight: Weight, suffix: str, make: Callable[[], Tensor]) -> fx.Node:
        node = self._node(weight, suffix, make)
        assert node is not None
        return node

    def _node(self, weight: Weight, suffix: str, make: Callable[[], Tensor | None]) -> fx.Node | None:
        """The node of a tensor derived from a weight, of another graph or made here; None if there is none."""
        node = derived(weight.packed, suffix, self._rewriter, self._others, make)
        if node is not None and suffix in (_INT8, _INT4) and _STORED not in node.meta:
            node.meta[_STORED] = _Recipe(
                str(weight.packed.target),
                str(weight.zero_point.target),
                self._rewriter.tensor(weight.zero_point),
                weight.bits,
                weight.out_features,
                weight.in_features,
            )
        return node


def stored(module: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors of a lowered graph, with packed codes in place of weights and without derived tensors."""
    found = read_tensors(module)
    for node in module.graph.nodes:
        kept: Any = node.meta.get(_STORED)
        if isinstance(kept, dict):
            found |= kept
        elif isinstance(kept, str):
            found[kept] = found.pop(str(node.target)).view(torch.uint8)
        elif isinstance(kept, _Recipe):
            tensor = found.pop(str(node.target))
            found[kept.zero_point] = kept.zero_points
            if str(node.target).endswith(_INT4):
                found[kept.packed] = weights.from_four_bits(tensor, kept.out_features, kept.in_features, kept.bits)
            else:
                found[kept.packed] = weights.unsigned(tensor, kept.zero_points, kept.bits)
            for suffix in (_SUMS, _EXCESS):
                found.pop(f"{kept.packed}{suffix}", None)
    return {name: tensor for name, tensor in found.items() if not name.startswith(_ZEROS)}
