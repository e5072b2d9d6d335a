"""From a quantized graph to what torchao's fusions and kernels take, and from its tensors back to a checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.backends.torchao import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.torchao import weights
from fxquant.capture import drop_unread_tensors, read_tensors
from fxquant.ir.rewriter import Rewriter

aten, ours, pt2e = torch.ops.aten, torch.ops.fxquant_torchao, torch.ops.quantized_decomposed

_STORED = "fxquant_torchao_stored"
"""Key of ``node.meta`` for how the tensors of a checkpoint are found again that a node stands for."""

_INT8, _INT4 = "_int8", "_int4"
_SUMS, _EXCESS = "_sums", "_excess"
_ZEROS = "zero_points_of_"


class Lowering:
    """The rewriting of one graph.

    Attributes:
        slow: Layers whose weights are dequantized on each call, because no kernel takes them in their dtype.
    """

    def __init__(self, module: fx.GraphModule, held: Mapping[str, Tensor]) -> None:
        self.rewriter = Rewriter(module, "lower to torchao")
        self.graph = module.graph
        self.held = held
        self.slow: list[fx.Node] = []

    def run(self) -> None:
        """Rewrite the graph in place.

        Static grids on CPUs, before::

            codes = fxquant.quantize(x, s, z, 0, 255, uint8)
            y = fxquant.linear(codes, s, z, W_packed, W_scale, W_zero_point, bias, bits, 0, dtype)

        After, the graph of PT2E::

            codes = quantized_decomposed.quantize_per_tensor(x, s, z, 0, 255, uint8)
            y = linear(dequantize_per_tensor(codes, s, z, ...), dequantize_per_channel(W_int8, W_scale, ...), bias)

        where W_int8 is the part of the weight that is symmetric; what it has in excess is taken off y. Other grids,
        and other devices::

            y = fxquant_torchao.linear_rows(codes, s, z, W_int8, W_scale, W_sums, W_excess, bias, dtype)

        Float activations, ``linear(x, fxquant.dequantize_weight(...), bias)``, after::

            y = fxquant_torchao.linear_of_nibbles(x, W_int4, W_scale, W_zero_point, bits, group, bias)
            y = fxquant_torchao.linear_of_bytes(x, W_int8, W_scale, W_excess, bias)
        """
        steps: dict[Any, Callable[[fx.Node], None]] = {
            torch.ops.fxquant.quantize.default: self._quantize,
            torch.ops.fxquant.linear.default: self._linear,
            torch.ops.fxquant.conv2d.default: self._conv2d,
            torch.ops.fxquant.dequantize_weight.default: self._dequantize_weight,
        }
        for node in list(self.graph.nodes):
            if node.target in steps:
                steps[node.target](node)
        self.graph.eliminate_dead_code()
        drop_unread_tensors(self.rewriter.module)

    # --- inputs ---

    def _quantize(self, node: fx.Node) -> None:
        x, scale, zero_point, qmin, qmax, dtype = node.args
        assert isinstance(x, fx.Node) and isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node)
        assert (qmin, dtype) == (0, torch.uint8), f"{node} is not of codes from 0"
        with self.rewriter.before(node):
            if not self._is_static(scale, x.meta["val"].dtype):
                new = self._call(ours.quantize_rows.default, x, scale, zero_point, qmax, of=node, name=node.name)
            else:
                if x.meta["val"].dtype == torch.float64:
                    x = self._call(aten.to.dtype, x, torch.float32, of=node)
                grid = self._number(scale), int(self._number(zero_point))
                arguments = (x, *grid, 0, 255, torch.uint8)
                new = self._call(pt2e.quantize_per_tensor.default, *arguments, of=node, name=node.name)
                new.meta[_STORED] = {str(part.target): self.rewriter.tensor(part) for part in (scale, zero_point)}
                if qmax != 255:  # Fusions take the highest code of uint8 for that of the grid.
                    new = self._call(aten.clamp_max.default, new, qmax, of=node)
        self.rewriter.replace(node, new)

    def _is_static(self, scale: Any, dtype: Any) -> bool:
        """Whether a grid is one number that is known now, for fusions that know this device and dtype."""
        return scale.op == "get_attr" and scale.meta["val"].device.type == "cpu" and dtype != torch.float16

    def _number(self, node: fx.Node) -> float:
        tensor = self.rewriter.tensor(node)
        assert not isinstance(tensor, FakeTensor) and tensor.numel() == 1, f"{node.target} has no value"
        return tensor.item()

    # --- layers of quantized inputs ---

    def _linear(self, node: fx.Node) -> None:
        codes, x_scale, x_zero_point, packed, w_scale, w_zero_point, bias, bits, _, dtype = node.args
        assert isinstance(codes, fx.Node) and isinstance(x_scale, fx.Node) and isinstance(x_zero_point, fx.Node)
        weight = _Weight(packed, w_scale, w_zero_point, bits, int(codes.meta["val"].shape[-1]))
        with self.rewriter.before(node):
            if not self._is_static(x_scale, dtype):
                held = self._int8(weight), weight.scale, self._sums(weight), self._excess(weight)
                arguments = (codes, x_scale, x_zero_point, *held, bias, dtype)
                new = self._call(ours.linear_rows.default, *arguments, of=node)
            else:
                grid = self._number(x_scale), int(self._number(x_zero_point))

                def product(x: fx.Node, values: fx.Node, bias: fx.Node | None) -> fx.Node:
                    return self._call(aten.linear.default, x, values, bias, of=node)

                def sums() -> fx.Node:
                    return self._call(ours.input_sums.default, codes, *grid, of=codes)

                new = self._layer(node, codes, grid, weight, product, sums)
        self._replace(node, new, weight)

    def _conv2d(self, node: fx.Node) -> None:
        codes, x_scale, x_zero_point, packed, w_scale, w_zero_point, _, bits, kernel, *geometry, _ = node.args
        if not self._is_static(x_scale, node.args[-1]):
            return  # It stays the reference op.
        assert isinstance(codes, fx.Node) and isinstance(x_scale, fx.Node) and isinstance(x_zero_point, fx.Node)
        in_features = int(torch.Size(kernel).numel())  # type: ignore[arg-type]
        weight = _Weight(packed, w_scale, w_zero_point, bits, in_features, tuple(kernel))  # type: ignore[arg-type]
        grid = self._number(x_scale), int(self._number(x_zero_point))
        out_channels = w_scale.meta["val"].shape[0]  # type: ignore[union-attr]

        def product(x: fx.Node, values: fx.Node, bias: fx.Node | None) -> fx.Node:
            return self._call(aten.conv2d.default, x, values, bias, *geometry, of=node)

        def sums() -> fx.Node:
            return self._call(ours.window_sums.default, codes, *grid, kernel, *geometry, out_channels, of=node)

        with self.rewriter.before(node):
            new = self._layer(node, codes, grid, weight, product, sums)
        self._replace(node, new, weight)

    def _layer(
        self,
        node: fx.Node,
        codes: fx.Node,
        grid: tuple[float, int],
        weight: _Weight,
        product: Callable[[fx.Node, fx.Node, fx.Node | None], fx.Node],
        sums: Callable[[], fx.Node],
    ) -> fx.Node:
        """A product of dequantized factors, which the fusions know, less what the held weight has in excess."""
        bias, dtype = node.args[6], node.args[-1]
        excess = self._excess(weight)
        vector = bias if isinstance(bias, fx.Node) and bias.meta["val"].dim() == 1 else None
        # What something is added to or taken off stays in 32 bits until then.
        inner = dtype if dtype == torch.bfloat16 and excess is None and bias is vector else torch.float32
        x = self._call(pt2e.dequantize_per_tensor.default, codes, *grid, 0, 255, torch.uint8, of=node)
        values = self._dequantized(node, weight)
        factors = (self._cast(value, inner, node) for value in (x, values))
        y = product(*factors, None if vector is None else self._cast(vector, inner, node))
        if excess is not None:
            key = "sums", codes, grid, weight.kernel, node.args[9:-1]
            if key not in self.rewriter.memo:
                self.rewriter.memo[key] = sums()
            if weight.kernel:
                excess = self._call(aten.view.default, excess, [-1, 1, 1], of=node)
            surplus = self._call(aten.mul.Tensor, self.rewriter.memo[key], excess, of=node)
            # Not an addition of the negative, which the fusions would make a tensor of its own for the kernel to add.
            y = self._call(aten.sub.Tensor, y, surplus, of=node)
        if bias is not vector:
            y = self._call(aten.add.Tensor, y, bias, of=node)
        return self._cast(y, dtype, node)

    def _dequantized(self, node: fx.Node, weight: _Weight) -> fx.Node:
        """The held weight in float; the kernels want one scale and zero point an output, in one axis."""
        held, count = self._int8(weight), int(weight.scale.meta["val"].shape[0])
        uses = self.rewriter.memo["uses", held] = self.rewriter.memo.get(("uses", held), 0) + 1
        # A weight that is read twice is dequantized twice, from zero points of different names, for else the compiler
        # makes one of both, and fusions take none that two products read.
        name = f"{_ZEROS}{count}{'' if uses == 1 else f'_for_use_{uses}'}"
        if name not in self.rewriter.memo:
            zeros = self.held.get(name)
            if zeros is None:
                zeros = torch.zeros(count, dtype=torch.int32)
            self.rewriter.memo[name] = self.rewriter.constant(name, zeros, [])
        scale = self._call(aten.view.default, weight.scale, [-1], of=weight.scale)
        arguments = (held, scale, self.rewriter.memo[name], 0, -128, 127, torch.int8)
        return self._call(pt2e.dequantize_per_channel.default, *arguments, of=node)

    # --- layers of float inputs ---

    def _dequantize_weight(self, node: fx.Node) -> None:
        packed, scale, zero_point, bits, group_size, in_features, dtype = node.args
        if not isinstance(packed, fx.Node) or packed.op != "get_attr":
            return  # Rows of a table, which are dequantized as they are looked up.
        for reader in list(node.users):
            if reader.target is not aten.linear.default:
                continue
            x, _, bias = (*reader.args, None)[:3]
            weight = _Weight(packed, scale, zero_point, bits, in_features)
            size = weight.scale.meta["val"].shape[0], in_features
            device = packed.meta["val"].device.type
            group = weights.group_of_four_bits(*size, group_size, device) if bits <= 4 else None
            halves = {torch.bfloat16, torch.float16} if device == "cpu" else {torch.bfloat16}
            with self.rewriter.before(reader):
                if group is not None and dtype in halves:
                    held = self._int4(weight)
                    arguments = (x, held, scale, zero_point, bits, group, bias)
                    new = self._call(ours.linear_of_nibbles.default, *arguments, of=reader)
                elif not group_size:
                    held = self._int8(weight), scale, self._excess(weight)
                    new = self._call(ours.linear_of_bytes.default, x, *held, bias, of=reader)
                else:
                    self.slow.append(reader)
                    continue
            self._replace(reader, new, weight, [node])

    # --- tensors that follow from a weight ---

    def _int8(self, weight: _Weight) -> fx.Node:
        def make() -> Tensor:
            made = weights.signed(*self._codes(weight), weight.bits, weight.in_features)
            return made.unflatten(1, weight.kernel) if weight.kernel else made

        node = self._held(weight, _INT8, make)
        assert node is not None
        return node

    def _int4(self, weight: _Weight) -> fx.Node:
        packed, _ = self._codes(weight)
        node = self._held(weight, _INT4, lambda: weights.four_bits(packed, weight.bits, weight.in_features))
        assert node is not None
        return node

    def _sums(self, weight: _Weight) -> fx.Node:
        def make() -> Tensor:
            return weights.signed(*self._codes(weight), weight.bits, weight.in_features).sum(1, dtype=torch.int32)

        node = self._held(weight, _SUMS, make)
        assert node is not None
        return node

    def _excess(self, weight: _Weight) -> fx.Node | None:
        scale, zero_point = (self.rewriter.tensor(part) for part in (weight.scale, weight.zero_point))
        return self._held(weight, _EXCESS, lambda: weights.excess(scale, zero_point, weight.bits))

    def _codes(self, weight: _Weight) -> tuple[Tensor, Tensor]:
        return self.rewriter.tensor(weight.packed), self.rewriter.tensor(weight.zero_point)

    def _held(self, weight: _Weight, suffix: str, make: Callable[[], Tensor | None]) -> fx.Node | None:
        """The node of a tensor that follows from a weight: that of another graph, or made here; None for none."""
        name = f"{weight.packed.target}{suffix}"
        if name not in self.rewriter.memo:
            # Without values nothing can be made; then the other graphs tell whether there is such a tensor.
            without = isinstance(self.rewriter.tensor(weight.packed), FakeTensor)
            value = self.held.get(name) if without or name in self.held else make()
            node = None if value is None else self.rewriter.constant(name, value, [weight.packed])
            if node is not None and suffix in (_INT8, _INT4):
                node.meta[_STORED] = weight.recipe(self.rewriter)
            self.rewriter.memo[name] = node
        found: fx.Node | None = self.rewriter.memo[name]
        return found

    # --- nodes ---

    def _call(self, target: Any, *args: Any, of: fx.Node, name: str | None = None) -> fx.Node:
        return self.rewriter.call(target, args, [of], name=name)

    def _cast(self, node: fx.Node, dtype: Any, of: fx.Node) -> fx.Node:
        return node if node.meta["val"].dtype == dtype else self._call(aten.to.dtype, node, dtype, of=of)

    def _replace(self, node: fx.Node, new: fx.Node, weight: _Weight, unread: list[fx.Node] | None = None) -> None:
        self.rewriter.replace(node, new)
        for other in unread or []:
            if not other.users:
                self.rewriter.erase(other)
        if not weight.packed.users:
            self.rewriter.forget(weight.packed)  # So that both forms of the weights of a model never add up.


class _Weight:
    """The nodes of a weight's tensors, and what its codes are."""

    def __init__(
        self, packed: Any, scale: Any, zero_point: Any, bits: Any, in_features: int, kernel: tuple[int, ...] = ()
    ) -> None:
        self.packed: fx.Node = packed
        self.scale: fx.Node = scale
        self.zero_point: fx.Node = zero_point
        self.bits: int = bits
        self.in_features = in_features
        self.kernel = kernel

    def recipe(self, rewriter: Rewriter) -> dict[str, Any]:
        """What :func:`stored` needs to find the packed codes again."""
        return {
            "packed": str(self.packed.target),
            "bits": self.bits,
            "shape": (int(self.scale.meta["val"].shape[0]), self.in_features),
            "zero_point": (str(self.zero_point.target), rewriter.tensor(self.zero_point)),
        }


def stored(module: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors of a lowered graph, with packed codes in place of weights and without what follows from others."""
    found = read_tensors(module)
    for node in module.graph.nodes:
        kept = node.meta.get(_STORED)
        if kept is None:
            continue
        if node.op != "get_attr":
            found |= kept
            continue
        held = found.pop(str(node.target))
        name, zero_point = kept["zero_point"]
        found[name] = zero_point
        if str(node.target).endswith(_INT4):
            found[kept["packed"]] = weights.from_four_bits(held, *kept["shape"], kept["bits"])
        else:
            found[kept["packed"]] = weights.unsigned(held, zero_point, kept["bits"])
        for suffix in (_SUMS, _EXCESS):
            found.pop(f"{kept['packed']}{suffix}", None)
    return {name: tensor for name, tensor in found.items() if not name.startswith(_ZEROS)}
