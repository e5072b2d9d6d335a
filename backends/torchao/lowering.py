"""Lowers a quantized graph to the ops that torchao's fusions and kernels take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.backends.derived_tensors import has_own_scales
from fxquant.backends.torchao import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.torchao import weights
from fxquant.backends.torchao.tensors import DerivedTensors, Weight
from fxquant.ir.arguments import args
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.tensors import drop_unread_tensors
from fxquant.ir.tops import separate_tops
from fxquant.numerics.formats import bits_of, is_integer, top_of

aten, ours, pt2e = torch.ops.aten, torch.ops.fxquant_torchao, torch.ops.quantized_decomposed

Grid = tuple[float, int]
_FP8 = "fp8"


class Lowering:
    """Rewrites one graph.

    Attributes:
        slow: Layers whose weights are dequantized on each call, because no kernel takes the weights in their dtype.
    """

    def __init__(self, module: fx.GraphModule, others: Mapping[str, Tensor]) -> None:
        self.rewriter = Rewriter(module, "lower to torchao")
        self.derived = DerivedTensors(self.rewriter, others)
        self.slow: list[fx.Node] = []

    def run(self) -> None:
        """Rewrite the graph in place.

        Static grids on CPUs, before::

            codes = fxquant.quantize(x, s, z, 0, 255, uint8)
            y = fxquant.linear(codes, s, z, W_packed, W_scale, W_zero_point, bias, "int8", "int4", 0, dtype)

        After, the graph of PT2E::

            codes = quantized_decomposed.quantize_per_tensor(x, s, z, 0, 255, uint8)
            y = linear(dequantize_per_tensor(codes, s, z, ...), dequantize_per_channel(W_int8, W_scale, ...), bias)

        where W_int8 is the weight made symmetric; its excess over the weight is subtracted from y. Other grids, and
        other devices::

            y = fxquant_torchao.linear_rows(codes, s, z, W_int8, W_scale, W_sums, W_excess, bias, dtype)

        The format ``fp8``, whatever the grids::

            codes = fxquant_torchao.quantize_floats(x, s)
            y = fxquant_torchao.linear_of_floats(codes, s, W_fp8, W_scale, bias, dtype)

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
        separate_tops(self.rewriter.graph, self.rewriter)
        for node in list(self.rewriter.graph.nodes):
            if node.target in steps:
                steps[node.target](node)
        self.rewriter.graph.eliminate_dead_code()
        drop_unread_tensors(self.rewriter.module)

    # --- inputs ---

    def _quantize(self, node: fx.Node) -> None:
        given = args(node)
        if given.format == _FP8:
            with self.rewriter.before(node):
                new = self._call(ours.quantize_floats.default, given.x, given.scale, of=node, name=node.name)
            self.rewriter.replace(node, new)
            return
        x, scale, zero_point, qmax = (
            given.node("x"),
            given.node("scale"),
            given.node("zero_point"),
            top_of(given.format),
        )
        x_dtype = x.meta["val"].dtype
        with self.rewriter.before(node):
            if not _is_static(scale, x_dtype):
                new = self._call(ours.quantize_rows.default, x, scale, zero_point, qmax, of=node, name=node.name)
            else:
                if x_dtype == torch.float64:
                    x = self._cast(x, torch.float32, node)
                arguments = (x, *self._grid(scale, zero_point), 0, 255, torch.uint8)
                new = self._call(pt2e.quantize_per_tensor.default, *arguments, of=node, name=node.name)
                self.derived.keep(new, [scale, zero_point])
                if qmax != 255:  # The fusions assume that the highest code is 255.
                    new = self._call(aten.clamp_max.default, new, qmax, of=node)
        self.rewriter.replace(node, new)

    def _grid(self, scale: fx.Node, zero_point: fx.Node) -> Grid:
        tensors = [self.rewriter.tensor(part) for part in (scale, zero_point)]
        assert not any(isinstance(tensor, FakeTensor) for tensor in tensors), f"{scale.target} has no value"
        return float(tensors[0].item()), int(tensors[1].item())

    # --- layers of quantized inputs ---

    def _linear(self, node: fx.Node) -> None:
        given, codes = args(node), args(node).node("xq")
        if given.w_format == _FP8:
            self._linear_of_floats(node)
            return
        x_scale, x_zero_point = given.node("x_scale"), given.node("x_zero_point")
        weight = _weight(node, int(codes.meta["val"].shape[-1]))
        with self.rewriter.before(node):
            if not _is_static(x_scale, given.out_dtype):
                parts = self.derived.int8(weight), weight.scale, self.derived.sums(weight), self.derived.excess(weight)
                arguments = (codes, x_scale, x_zero_point, *parts, given.bias, given.out_dtype)
                new = self._call(ours.linear_rows.default, *arguments, of=node)
            else:
                grid = self._grid(x_scale, x_zero_point)
                new = self._layer(node, aten.linear.default, (), grid, weight, (ours.input_sums.default, ()))
        self.rewriter.replace(node, new)
        self._forget(weight)

    def _linear_of_floats(self, node: fx.Node) -> None:
        given, packed = args(node), args(node).node("wq")
        with self.rewriter.before(node):
            sides = (given.xq, given.x_scale, self.derived.floats(packed), given.w_scale)
            new = self._call(ours.linear_of_floats.default, *sides, given.bias, given.out_dtype, of=node)
        self.rewriter.replace(node, new)
        if not packed.users:
            self.rewriter.forget(packed)

    def _conv2d(self, node: fx.Node) -> None:
        given = args(node)
        x_scale, x_zero_point, kernel = given.node("x_scale"), given.node("x_zero_point"), given.kernel
        if not _is_static(x_scale, given.out_dtype):
            return  # It stays the reference op.
        weight = _weight(node, math.prod(kernel), tuple(kernel))
        grid = self._grid(x_scale, x_zero_point)
        geometry = given.stride, given.padding, given.dilation, given.groups
        sums = ours.window_sums.default, (kernel, *geometry, weight.out_features)
        with self.rewriter.before(node):
            new = self._layer(node, aten.conv2d.default, geometry, grid, weight, sums)
        self.rewriter.replace(node, new)
        self._forget(weight)

    def _layer(
        self,
        node: fx.Node,
        product: Any,
        geometry: tuple[Any, ...],
        grid: Grid,
        weight: Weight,
        sums: tuple[Any, tuple[Any, ...]],
    ) -> fx.Node:
        """A product of dequantized factors, which the fusions know, minus the symmetric weight's excess."""
        codes, bias, dtype = args(node).node("xq"), args(node).bias, args(node).out_dtype
        excess = self.derived.excess(weight)
        vector = bias if isinstance(bias, fx.Node) and bias.meta["val"].dim() == 1 else None
        # A value that is added to or subtracted from stays in 32 bits until then.
        inner = dtype if dtype == torch.bfloat16 and excess is None and bias is vector else torch.float32
        x = self._call(pt2e.dequantize_per_tensor.default, codes, *grid, 0, 255, torch.uint8, of=node)
        steps = self._call(aten.view.default, weight.scale, [-1], of=weight.scale)
        arguments = (self.derived.int8(weight), steps, self.derived.zeros(weight), 0, -128, 127, torch.int8)
        values = self._call(pt2e.dequantize_per_channel.default, *arguments, of=node)
        factors = [self._cast(value, inner, node) for value in (x, values)]
        vector = None if vector is None else self._cast(vector, inner, node)
        y = self._call(product, *factors, vector, *geometry, of=node)
        if excess is not None:
            if weight.kernel:
                excess = self._call(aten.view.default, excess, [-1, 1, 1], of=node)
            surplus = self._call(aten.mul.Tensor, self._sums(codes, grid, *sums), excess, of=node)
            # Do not add the negative: the fusions would make it a separate tensor for the kernel to add.
            y = self._call(aten.sub.Tensor, y, surplus, of=node)
        if isinstance(bias, fx.Node) and vector is None:
            y = self._call(aten.add.Tensor, y, bias, of=node)
        return self._cast(y, dtype, node)

    def _sums(self, codes: Any, grid: Grid, op: Any, options: tuple[Any, ...]) -> fx.Node:
        """Sums of the inputs; layers that read the same value share them."""
        key = "sums", codes, grid, op, str(options)
        if key not in self.rewriter.memo:
            self.rewriter.memo[key] = self._call(op, codes, *grid, *options, of=codes)
        node: fx.Node = self.rewriter.memo[key]
        return node

    # --- layers of float inputs ---

    def _dequantize_weight(self, node: fx.Node) -> None:
        given, packed, in_features = args(node), args(node).node("wq"), args(node).in_features
        if packed.op != "get_attr" or not is_integer(given.format) or not has_own_scales(packed, given.scale):
            return  # Rows of a table are dequantized when they are looked up; other formats have no kernel.
        scale, zero_point, bits = given.node("scale"), given.node("zero_point"), bits_of(given.format)
        weight = Weight(packed, scale, zero_point, bits, in_features)
        device = packed.meta["val"].device.type
        halves = {torch.bfloat16, torch.float16} if device == "cpu" else {torch.bfloat16}
        group = None
        if bits <= 4 and given.dtype in halves:
            group = weights.group_of_four_bits(weight.out_features, in_features, given.group_size, device)
        for reader in list(node.users):
            if reader.target is not aten.linear.default:
                continue
            x, bias = args(reader).input, args(reader).bias
            with self.rewriter.before(reader):
                if group is not None:
                    grid = scale, zero_point, bits, group
                    new = self._call(
                        ours.linear_of_nibbles.default, x, self.derived.int4(weight), *grid, bias, of=reader
                    )
                elif not given.group_size:
                    parts = self.derived.int8(weight), scale, self.derived.excess(weight)
                    new = self._call(ours.linear_of_bytes.default, x, *parts, bias, of=reader)
                else:
                    self.slow.append(reader)
                    continue
            self.rewriter.replace(reader, new)
        if not node.users:
            self.rewriter.erase(node)
            self._forget(weight)

    # --- nodes ---

    def _call(self, target: Any, *arguments: Any, of: Any, name: str | None = None) -> fx.Node:
        return self.rewriter.call(target, arguments, [of], name=name, layer=True)

    def _cast(self, node: fx.Node, dtype: Any, of: fx.Node) -> fx.Node:
        return node if node.meta["val"].dtype == dtype else self._call(aten.to.dtype, node, dtype, of=of)

    def _forget(self, weight: Weight) -> None:
        """Drop packed codes that nothing reads any more, so that a model never holds both forms of all weights."""
        if not weight.packed.users:
            self.rewriter.forget(weight.packed)


def _weight(node: fx.Node, in_features: int, kernel: tuple[int, ...] = ()) -> Weight:
    """The weight of a quantized linear or convolution."""
    given = args(node)
    return Weight(
        given.node("wq"),
        given.node("w_scale"),
        given.node("w_zero_point"),
        bits_of(given.w_format),
        in_features,
        kernel,
    )


def _is_static(scale: fx.Node, dtype: torch.dtype) -> bool:
    """Whether a grid is one number that is known now, with a device and dtype that the fusions support."""
    return scale.op == "get_attr" and scale.meta["val"].device.type == "cpu" and dtype != torch.float16
