"""Random valid graphs of the ops that have channel rules, for the proof by fuzzing.

Graphs are built op by op on fake tensors, in the form in which capturing leaves them. Values have between two and four
axes, the first of which is the batch. Nothing is tried to make a graph sensible: values are read by any number of
others, layouts are odd, parts are dropped, and many a request dies in a dead end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.capture import LAYER, set_tensor

aten = torch.ops.aten
BATCH, TOKENS, CHANNELS = 2, 3, 8


class Builder:
    """A graph that grows.

    Attributes:
        module: The graph module so far; call :meth:`finish` at the end.
        values: Floating-point values that ops may read.
    """

    def __init__(self, seed: int) -> None:
        self.module = fx.GraphModule(nn.Module(), fx.Graph())
        self.graph = self.module.graph
        self.generator = torch.Generator().manual_seed(seed)
        self.values: list[fx.Node] = []
        self.linears = 0
        self._mode = FakeTensorMode()
        self._sizes: list[tuple[str, tuple[int, ...]]] = []

    def random(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        """Uniform float64."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low

    def input(self, name: str, *shape: int) -> fx.Node:
        """A floating-point input."""
        node = self.graph.placeholder(name)
        with self._mode:
            node.meta["val"] = torch.empty(shape, dtype=torch.float64)
        self._sizes.append((name, shape))
        return node

    def parameter(self, *shape: int, low: float = -1.0, high: float = 1.0) -> fx.Node:
        """A parameter."""
        return self.tensor(self.random(*shape, low=low, high=high))

    def tensor(self, value: Tensor) -> fx.Node:
        """A tensor that the module holds."""
        target = f"p{sum(node.op == 'get_attr' for node in self.graph.nodes)}"
        set_tensor(self.module, target, value)
        node = self.graph.get_attr(target)
        with self._mode:
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """One op; a result that is one tensor becomes a value."""
        fakes = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
        with self._mode, torch.no_grad():
            value = target(*fakes[0], **fakes[1])
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        if isinstance(value, Tensor) and value.is_floating_point():
            self.values.append(node)
        return node

    def linear(self, x: fx.Node, out: int, bias: bool = True) -> fx.Node:
        """A linear layer of a block."""
        weight = self.parameter(out, shape(x)[-1])
        node = self.call(aten.linear.default, x, weight, self.parameter(out) if bias else None)
        node.meta[LAYER] = f"blocks.0.l{self.linears}"
        self.linears += 1
        return node

    def finish(self) -> fx.GraphModule:
        """Return what nobody reads."""
        loose = [node for node in self.values if not node.users]
        output = self.graph.output(tuple(loose))
        output.meta["val"] = tuple(node.meta["val"] for node in loose)
        self.graph.eliminate_dead_code()
        self.module.recompile()
        return self.module

    def inputs(self, timestep: float) -> list[Tensor]:
        """Random inputs, and a timestep."""
        return [
            torch.full(size, timestep, dtype=torch.float64)
            if name == "timestep"
            else self.random(*size, low=-2, high=3)
            for name, size in self._sizes
        ]


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a value."""
    return tuple(node.meta["val"].shape)


Step = Callable[[Builder, Callable[..., Any], fx.Node], object]
"""Adds one op: gets the builder, a function that draws from a strategy, and a value."""


def _like(b: Builder, draw: Any, x: fx.Node) -> fx.Node:
    """Another value that broadcasts against x without changing its shape."""
    fitting = [y for y in b.values if _fits(shape(y), shape(x))]
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return b.parameter(shape(x)[-1])
    if kind == 1:
        return b.parameter(1)
    return draw(st.sampled_from(fitting))


def _fits(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    padded = (1,) * (len(large) - len(small)) + small
    return len(small) <= len(large) and all(s in (1, n) for s, n in zip(padded, large, strict=True))


def _axis(draw: Any, x: fx.Node, first: int = 1) -> int:
    return draw(st.integers(first, len(shape(x)) - 1))


def _linear(b: Builder, draw: Any, x: fx.Node) -> None:
    b.linear(x, draw(st.sampled_from([4, 6, 8])), draw(st.booleans()))


def _norm(b: Builder, draw: Any, x: fx.Node) -> None:
    size = shape(x)[-1]
    weight = b.parameter(size, low=0.5, high=1.5) if draw(st.booleans()) else None
    if weight is not None and draw(st.integers(0, 3)) == 0:
        weight = b.call(aten.add.Scalar, weight, 1.0)
    if draw(st.booleans()):
        bias = b.parameter(size) if weight is not None and draw(st.booleans()) else None
        b.call(aten.layer_norm.default, x, [size], weight, bias, 0.1)
    else:
        b.call(aten.rms_norm.default, x, [size], weight, 0.1)


def _arithmetic(b: Builder, draw: Any, x: fx.Node) -> None:
    kind = draw(st.integers(0, 8))
    if kind == 0:
        b.call(aten.add.Scalar, x, draw(st.sampled_from([1.0, -0.5])))
    elif kind == 1:
        b.call(aten.mul.Scalar, x, 0.7)
    elif kind == 2:
        b.call(aten.addcmul.default, x, _like(b, draw, x), _like(b, draw, x), value=0.5)
    elif kind == 3:
        y = _like(b, draw, x)
        b.call(aten.div.Tensor, x, b.call(aten.add.Scalar, b.call(aten.mul.Tensor, y, y), 1.0))
    elif kind == 4:
        condition = b.call(aten.gt.Scalar, _like(b, draw, x), 0.1)
        b.call(aten.where.self, condition, x, _like(b, draw, x))
    elif kind == 5:
        b.call(
            aten.masked_fill.Scalar, x, b.call(aten.gt.Scalar, _like(b, draw, x), 0.1), draw(st.sampled_from([0, 1]))
        )
    else:
        op = draw(st.sampled_from([aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.add.Tensor]))
        y = _like(b, draw, x)
        pair = (x, y) if draw(st.booleans()) else (y, x)
        alpha = {"alpha": 2} if op is not aten.mul.Tensor and draw(st.integers(0, 5)) == 0 else {}
        b.call(op, *pair, **alpha)


def _pointwise(b: Builder, draw: Any, x: fx.Node) -> None:
    op = draw(
        st.sampled_from([aten.relu, aten.neg, aten.silu, aten.gelu, aten.tanh, aten.clone, aten.leaky_relu, aten.alias])
    )
    b.call(op.default, x)


def _modulate(b: Builder, draw: Any, x: fx.Node) -> None:
    """AdaLN: parts of a vector that depends on the time."""
    vectors = [y for y in b.values if len(shape(y)) == 2]
    size = shape(x)[-1]
    if not vectors or len(shape(x)) != 3:
        return
    vector = b.linear(b.call(aten.silu.default, draw(st.sampled_from(vectors))), 2 * size)
    parts = b.call(aten.chunk.default, b.call(aten.unsqueeze.default, vector, 1), 2, -1)
    scale, shift = (_part(b, parts, number) for number in range(2))
    y = b.call(aten.layer_norm.default, x, [size], None, None, 0.1)
    b.call(aten.add.Tensor, b.call(aten.mul.Tensor, y, b.call(aten.add.Scalar, scale, 1.0)), shift)


def _part(b: Builder, parts: fx.Node, number: int) -> fx.Node:
    import operator

    return b.call(operator.getitem, parts, number)


def _apart(b: Builder, draw: Any, x: fx.Node) -> None:
    axis = _axis(draw, x)
    size = shape(x)[axis]
    kind = draw(st.integers(0, 5))
    if kind == 0 and size % 2 == 0:
        parts = b.call(aten.chunk.default, x, 2, axis - len(shape(x)) if draw(st.booleans()) else axis)
    elif kind == 1 and size > 1:
        parts = b.call(aten.split_with_sizes.default, x, [1, size - 1], axis)
    elif kind == 2 and len(shape(x)) > 2 and size <= 4:
        parts = b.call(aten.unbind.int, x, axis)
    elif kind == 3 and size > 2:
        b.call(aten.slice.Tensor, x, axis, draw(st.sampled_from([0, 1, -2])), draw(st.sampled_from([size, -1 + size])))
        return
    elif kind == 4 and len(shape(x)) > 2:
        b.call(aten.select.int, x, axis, draw(st.integers(-1, size - 1)))
        return
    else:
        b.call(aten.slice.Tensor, x, axis, 0, size, 2)
        return
    for number in range(len(parts.meta["val"])):
        if draw(st.integers(0, 3)):
            _part(b, parts, number)


def _together(b: Builder, draw: Any, x: fx.Node) -> None:
    axis = _axis(draw, x)
    if draw(st.booleans()):
        alike = [y for y in b.values if shape(y) == shape(x)]
        if len(shape(x)) < 4:
            b.call(aten.stack.default, [x, draw(st.sampled_from(alike))], draw(st.sampled_from([axis, -1])))
    else:
        same_rank = [y for y in b.values if len(shape(y)) == len(shape(x))]
        fitting = [y for y in same_rank if all(i == axis or shape(y)[i] == size for i, size in enumerate(shape(x)))]
        b.call(aten.cat.default, [x, draw(st.sampled_from(fitting))], axis)


def _layout(b: Builder, draw: Any, x: fx.Node) -> None:
    rank = len(shape(x))
    kind = draw(st.integers(0, 7))
    if kind == 0 and rank > 2:
        order = draw(st.permutations(range(1, rank)))
        b.call(aten.permute.default, x, [0, *order])
    elif kind == 1 and rank > 2:
        b.call(aten.transpose.int, x, draw(st.integers(1, rank - 1)), -1)
    elif kind == 2 and rank < 4:
        b.call(aten.unsqueeze.default, x, draw(st.integers(1, rank)))
    elif kind == 3 and rank > 2:
        b.call(aten.flatten.using_ints, x, rank - 2, rank - 1)
    elif kind == 4 and rank < 4 and shape(x)[-1] % 2 == 0:
        pair = draw(st.sampled_from([[2, -1], [-1, 2]]))
        b.call(aten.unflatten.int, x, -1, pair)
    elif kind == 5:
        total = math.prod(shape(x)[1:])
        sizes = draw(st.sampled_from([[n, total // n] for n in range(1, total + 1) if total % n == 0]))
        b.call(aten.reshape.default, x, [BATCH, *sizes])
    elif kind == 6 and 1 in shape(x)[1:]:
        axis = shape(x).index(1, 1)
        b.call(aten.squeeze.dim, x, axis) if rank > 2 and draw(st.booleans()) else b.call(
            aten.expand.default, x, [n if i != axis else TOKENS for i, n in enumerate(shape(x))]
        )
    else:
        b.call(aten.mT.default, x) if rank > 2 else b.call(aten.unsqueeze.default, x, 1)


def _moved(b: Builder, draw: Any, x: fx.Node) -> None:
    axis = _axis(draw, x)
    kind = draw(st.integers(0, 6))
    size = shape(x)[axis]
    if math.prod(shape(x)) > 300:
        return
    if kind == 0:
        b.call(aten.roll.default, x, [1], [axis])
    elif kind == 1:
        b.call(aten.flip.default, x, [axis])
    elif kind == 2:
        b.call(aten.repeat.default, x, [2 if i == axis else 1 for i in range(len(shape(x)))])
    elif kind == 3:
        b.call(aten.repeat_interleave.self_int, x, 2, axis)
    elif kind == 4:
        b.call(aten.constant_pad_nd.default, x, [1, 2], draw(st.sampled_from([0.0, 0.0, 1.0])))
    elif kind == 5:
        b.call(aten.index_select.default, x, axis, b.tensor(torch.tensor([size - 1, 0])))
    else:
        b.call(aten.index.Tensor, x, [None, b.tensor(torch.tensor([shape(x)[1] - 1, 0, 0]))])


def _attention(b: Builder, draw: Any, x: fx.Node) -> None:
    if len(shape(x)) != 3:
        return
    width = draw(st.sampled_from([4, 8]))
    q, k, v = (b.linear(x, width, draw(st.booleans())) for _ in range(3))
    heads = draw(st.sampled_from([1, 2]))
    q, k, v = (b.call(aten.unflatten.int, y, -1, [heads, -1]) for y in (q, k, v))
    q, k, v = (b.call(aten.transpose.int, y, 1, 2) for y in (q, k, v))
    if draw(st.booleans()):
        y = b.call(aten.scaled_dot_product_attention.default, q, k, v)
    else:
        scores = b.call(aten.softmax.int, b.call(aten.matmul.default, q, b.call(aten.mT.default, k)), -1)
        y = b.call(aten.matmul.default, scores, v)
    b.call(aten.flatten.using_ints, b.call(aten.transpose.int, y, 1, 2), 2)


def _product(b: Builder, draw: Any, x: fx.Node) -> None:
    fitting = [y for y in b.values if len(shape(y)) == len(shape(x)) == 3 and shape(y)[1] == shape(x)[2]]
    if fitting:
        b.call(draw(st.sampled_from([aten.matmul.default, aten.bmm.default])), x, draw(st.sampled_from(fitting)))


def _convolution(b: Builder, draw: Any, x: fx.Node) -> None:
    if len(shape(x)) == 3 and shape(x)[2] >= 2:
        b.call(aten.conv1d.default, x, b.parameter(4, shape(x)[1], 2), b.parameter(4) if draw(st.booleans()) else None)


def _lookup(b: Builder, draw: Any, x: fx.Node) -> None:
    labels = b.tensor(torch.tensor([3, 1]))
    b.call(aten.embedding.default, b.parameter(5, shape(x)[-1]), labels)


STEPS: list[Step] = [
    *[_linear] * 3, *[_arithmetic] * 4, *[_norm] * 2, *[_modulate] * 2, *[_attention] * 2, *[_apart] * 2,
    *[_layout] * 3, _pointwise, _together, _moved, _product, _convolution, _lookup,
]  # fmt: skip


@st.composite
def graphs(draw: Any) -> Builder:
    """A finished graph with its builder: inputs ``sample`` [2, 3, 8] and ``timestep`` [2], at least one linear."""
    b = Builder(draw(st.integers(0, 2**16)))
    sample = b.input("sample", BATCH, TOKENS, CHANNELS)
    time = b.input("timestep", BATCH)
    b.values.append(sample)
    column = b.call(aten.unsqueeze.default, b.call(aten.mul.Scalar, time, 0.01), 1)
    b.linear(b.linear(sample, CHANNELS), CHANNELS)
    b.linear(column, 4)
    for _ in range(draw(st.integers(1, 14))):
        x = draw(st.sampled_from(b.values))
        if len(shape(x)) >= 2 and math.prod(shape(x)) <= 600:
            draw(st.sampled_from(STEPS))(b, draw, x)
    for _ in range(draw(st.integers(1, 4))):
        b.linear(draw(st.sampled_from([x for x in b.values if len(shape(x)) >= 2])), 4)
    b.finish()
    return b
