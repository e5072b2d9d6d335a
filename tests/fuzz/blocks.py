"""Steps that add layers: linears, norms, convolutions, attention, modulation, gated units."""

from __future__ import annotations

import operator
from random import Random

import torch
from torch import fx

from fxquant.ir.meta import LAYER
from tests.fuzz.builder import Builder, shape

aten = torch.ops.aten
CAST = {"dtype": torch.float64}


def like(b: Builder, r: Random, x: fx.Node) -> fx.Node:
    """Another value or parameter that broadcasts against x without changing its shape."""
    kind = r.randint(0, 9)
    if kind == 0:
        return b.parameter(shape(x)[-1])
    if kind == 1:
        return b.parameter(1)
    if kind == 2 and (held := [p for p in b.parameters if _fits(shape(p), shape(x))]):
        return r.choice(held)
    return r.choice([y for y in b.values if _fits(shape(y), shape(x))])


def _fits(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    padded = (1,) * (len(large) - len(small)) + small
    return len(small) <= len(large) and all(s in (1, n) for s, n in zip(padded, large, strict=True))


def linear(b: Builder, r: Random, x: fx.Node) -> None:
    """Add a linear, mostly with its own parameters; sometimes shared, computed or cast ones, or a layer again."""
    size, kind = shape(x)[-1], r.randint(0, 9)
    again = [node for node in b.layers if shape(node.args[1])[-1] == size]
    held = [p for p in b.parameters if len(shape(p)) == 2 and shape(p)[-1] == size]
    if kind == 0 and again:
        layer = r.choice(again)
        name = f"{layer.meta[LAYER]}@{len(b.layers)}"  # Capture names further calls of a module like this.
        b.apply(x, layer.args[1], layer.args[2] if len(layer.args) > 2 else None, name)
    elif kind == 1 and held:
        weight = r.choice(held)
        biases = [p for p in b.parameters if shape(p) == shape(weight)[:1]]
        b.apply(x, weight, r.choice([None, *biases]))
    elif kind == 2:
        weight, bias = b.parameter(4, size), b.parameter(4)
        cast = r.randint(0, 2)
        if cast != 1:
            weight = b.call(aten.to.dtype, weight, torch.float64)
        if cast != 2:
            bias = b.call(aten._to_copy.default, bias, **CAST)
        b.apply(x, weight, bias)
    elif kind == 3:
        weight = b.call(aten.mul.Tensor, b.parameter(4, size), 0.5)
        b.apply(x, weight, b.call(aten.neg.default, b.parameter(4)) if r.random() < 1 / 2 else None)
    else:
        b.linear(x, r.choice([4, 6, 8]), r.random() < 1 / 2)


def norm(b: Builder, r: Random, x: fx.Node) -> None:
    """Add a norm over one or two axes, with or without weights; weights may be shared or computed."""
    axes = r.choice([1, 1, 1, 2]) if len(shape(x)) > 2 else 1
    sizes = list(shape(x)[-axes:])
    weight = b.parameter(*sizes, low=0.5, high=1.5) if r.random() < 1 / 2 else None
    if weight is not None and r.random() < 1 / 4:
        weight = b.call(aten.add.Scalar, weight, 1.0)
    held = [p for p in b.parameters if list(shape(p)) == sizes]
    if held and r.random() < 1 / 6:
        weight = r.choice(held)
    if r.random() < 1 / 2:
        bias = b.parameter(*sizes) if r.random() < 1 / 2 else None
        b.call(aten.layer_norm.default, x, sizes, weight, bias, 0.1)
    else:
        b.call(aten.rms_norm.default, x, sizes, weight, 0.1)


def _split(b: Builder, r: Random, x: fx.Node, parts: int) -> list[fx.Node]:
    """Split the last axis into parts with a random op."""
    size, kind = shape(x)[-1] // parts, r.randint(0, 4)
    if kind == 0:
        whole = b.call(aten.chunk.default, x, parts, -1)
    elif kind == 1:
        whole = b.call(aten.split.Tensor, x, size, r.choice([-1, len(shape(x)) - 1]))
    elif kind == 2:
        whole = b.call(aten.split_with_sizes.default, x, [size] * parts, -1)
    elif kind == 3:
        whole = b.call(aten.unbind.int, b.call(aten.unflatten.int, x, -1, [parts, size]), -2)
    else:
        return [b.call(aten.slice.Tensor, x, -1, i * size, (i + 1) * size) for i in range(parts)]
    return [b.call(operator.getitem, whole, i) for i in range(parts)]


def modulate(b: Builder, r: Random, x: fx.Node) -> None:
    """Add adaLN from parts of a vector per sample, or of vectors per token; several blocks may share one vector."""
    vectors = [y for y in b.values if len(shape(y)) == 2 and shape(y)[0] in (1, shape(x)[0])]
    size = shape(x)[-1]
    if not vectors or len(shape(x)) != 3:
        return
    vector = r.choice(vectors)
    if r.random() < 1 / 4:
        vector = r.choice([y for y in b.values if len(shape(y)) == 3 and shape(y)[:2] == shape(x)[:2]])
    if shape(vector)[-1] != 2 * size or r.random() < 1 / 2:
        vector = b.linear(b.call(aten.silu.default, vector), 2 * size, r.random() < 1 / 2)
    if r.random() < 1 / 4:  # As in PixArt: the vector is shared, and each block adds its own parameter.
        vector = b.call(aten.add.Tensor, vector, b.parameter(2 * size))
    if len(shape(vector)) == 2:
        vector = b.call(aten.unsqueeze.default, vector, 1)
    scale, shift = _split(b, r, vector, 2)
    y = b.call(aten.layer_norm.default, x, [size], None, None, 0.1)
    one = b.call(aten.add.Tensor, scale, 1) if r.random() < 1 / 2 else b.call(aten.add.Scalar, scale, 1.0)
    y = b.call(aten.add.Tensor, b.call(aten.mul.Tensor, y, one), shift)
    for _ in range(r.randint(0, 2)):
        b.linear(y, 4)


def gated(b: Builder, r: Random, x: fx.Node) -> None:
    """Add a gated unit, ``act(gate) * up`` and a linear after it, from two linears or from the parts of one."""
    act = r.choice([aten.silu, aten.gelu, aten.relu, aten.sigmoid, aten.tanh]).default
    if r.random() < 1 / 2:
        gate, up = b.linear(x, 8, r.random() < 1 / 2), b.linear(x, 8, r.choice([False, True]))
    else:
        gate, up = _split(b, r, b.linear(x, 16, r.random() < 1 / 2), 2)
    b.linear(b.call(aten.mul.Tensor, b.call(act, gate), up), 4)


def attention(b: Builder, r: Random, x: fx.Node) -> None:
    """Add attention: self, cross, grouped-query or joint, with variants of projections, masks, dropout and layouts."""
    if len(shape(x)) != 3:
        return
    others = [y for y in b.values if len(shape(y)) == 3 and shape(y)[0] == shape(x)[0]]
    source = r.choice(others) if r.random() < 1 / 2 else x
    heads, kv_heads = r.choice([(1, 1), (2, 2), (2, 1), (4, 2), (2, 2)])
    size, bias = r.choice([2, 4]), r.random() < 1 / 2
    q = b.linear(x, heads * size, bias)
    if r.random() < 1 / 2:
        k, v = (b.linear(source, kv_heads * size, bias) for _ in range(2))
    else:
        k, v = _split(b, r, b.linear(source, 2 * kv_heads * size, bias), 2)
    if r.random() < 1 / 3:  # Joint attention: add the tokens of another stream.
        other = r.choice(others)
        k, v = (b.call(aten.cat.default, [y, b.linear(other, kv_heads * size, bias)], 1) for y in (k, v))
    q = _heads(b, r, q, heads)
    k, v = (_heads(b, r, y, kv_heads) for y in (k, v))
    kind = r.randint(0, 5)
    if kind in (0, 1, 5) and kv_heads != heads:
        k, v = (b.call(aten.repeat_interleave.self_int, y, heads // kv_heads, 1) for y in (k, v))
    if kind == 5:
        y = _in_the_batch(b, r, q, k, v)
    elif kind <= 1:
        y = _by_hand(b, r, q, k, v)
    else:
        mask = _mask(b, r, shape(q)[0], shape(k)[-2])
        dropout = 0.3 if r.random() < 1 / 8 else 0.0
        grouped = {"enable_gqa": True} if heads != kv_heads else {}
        causal = {"is_causal": True} if mask is None and r.random() < 1 / 6 else {}
        y = b.call(aten.scaled_dot_product_attention.default, q, k, v, mask, dropout, **causal, **grouped)
    y = b.call(aten.flatten.using_ints, b.call(aten.transpose.int, y, 1, 2), 2)
    if shape(y)[1] > 1 and r.random() < 1 / 3:  # Each stream has an output projection.
        for part in (b.call(aten.slice.Tensor, y, 1, 0, 1), b.call(aten.slice.Tensor, y, 1, 1, 2**63 - 1)):
            b.linear(part, 4)
    elif r.random() < 1 / 2:
        b.linear(y, 8)


def _heads(b: Builder, r: Random, y: fx.Node, heads: int) -> fx.Node:
    if r.random() < 1 / 2:
        y = b.call(aten.unflatten.int, y, -1, [heads, -1])
    else:
        y = b.call(aten.view.default, y, [*shape(y)[:2], heads, shape(y)[2] // heads])
    return b.call(aten.transpose.int, y, 1, 2) if r.random() < 1 / 2 else b.call(aten.permute.default, y, [0, 2, 1, 3])


def _mask(b: Builder, r: Random, samples: int, keys: int) -> fx.Node | None:
    """None, a parameter, or one of the forms in which models use the mask input, for this number of samples."""
    kind = r.randint(0, 9)
    if kind == 0:
        return b.parameter(1, keys)
    if b.mask is None or kind > 6 or samples > shape(b.mask)[0] or keys > shape(b.mask)[1]:
        return None
    given = b.mask
    if samples < shape(given)[0]:  # Values that all samples share have a batch of 1.
        given = b.call(aten.slice.Tensor, given, 0, 0, samples)
    seen = b.call(aten.slice.Tensor, given, 1, 0, keys)
    if kind == 1:
        every = b.call(aten.ones.default, [shape(seen)[0], 1], dtype=torch.bool, device=torch.device("cpu"))
        seen = b.call(aten.cat.default, [b.call(aten.slice.Tensor, given, 1, 1, keys), every], 1)
    seen = b.call(aten.unsqueeze.default, b.call(aten.unsqueeze.default, seen, 1), 2)
    if kind <= 3:
        return seen
    if kind == 4:
        hidden = b.call(aten.rsub.Scalar, b.call(aten.to.dtype, seen, torch.float64), 1.0)
        return b.call(aten.mul.Tensor, hidden, -10000.0)
    zeros = b.call(aten.zeros.default, list(shape(seen)), dtype=torch.float64, device=torch.device("cpu"))
    lowest = r.choice([float("-inf"), float("-inf"), -1e9, torch.finfo(torch.float64).min])
    return b.call(aten.masked_fill.Scalar, zeros, b.call(aten.logical_not.default, seen), lowest)


def _in_the_batch(b: Builder, r: Random, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """Attention with heads folded into the batch, as in older code."""
    batch, heads = shape(q)[:2]
    q, k, v = (b.call(aten.reshape.default, y, [batch * heads, *shape(y)[2:]]) for y in (q, k, v))
    if r.random() < 1 / 2:
        scores = b.call(aten.einsum.default, "b i d, b j d -> b i j", [q, k])
        y = b.call(aten.einsum.default, "b i j, b j d -> b i d", [b.call(aten.softmax.int, scores, -1), v])
    else:
        y = _by_hand(b, r, q, k, v)
    return b.call(aten.unflatten.int, y, 0, [batch, heads])


def _by_hand(b: Builder, r: Random, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    scores = b.call(aten.matmul.default, q, b.call(aten.mT.default, k))
    axis = r.choice([-1, -1, len(shape(scores)) - 1, -2])  # -2 makes columns sum to 1 instead of rows.
    weights = b.call(aten.softmax.int, scores, axis) if r.random() < 1 / 2 else b.call(
        aten._softmax.default, scores, axis, False
    )  # fmt: skip
    if r.random() < 1 / 3:
        weights = b.call(aten.dropout.default, weights, 0.1, r.random() < 1 / 3)
    return b.call(aten.matmul.default, weights, v)


def product(b: Builder, r: Random, x: fx.Node) -> None:
    """Add matrix products of any two values that fit, including linear attention and einsums."""
    if r.random() < 1 / 4 and len(shape(x)) == 3:
        k, v = b.call(aten.relu.default, b.linear(x, 4)), b.linear(x, 4)
        inner = b.call(aten.matmul.default, b.call(aten.transpose.int, k, 1, 2), v)
        b.linear(b.call(aten.matmul.default, b.linear(x, 4), inner), 4)
        return
    if r.random() < 1 / 4 and len(shape(x)) == 3:
        b.call(
            aten.bmm.default, b.call(aten.softmax.int, b.call(aten.bmm.default, x, b.call(aten.mT.default, x)), -1), x
        )
        return
    fitting = [y for y in b.values if len(shape(y)) == len(shape(x)) == 3]
    fitting = [y for y in fitting if shape(y)[:2] == (shape(x)[0], shape(x)[2])]
    if fitting:
        b.call(r.choice([aten.matmul.default, aten.bmm.default]), x, r.choice(fitting))
        b.call(aten.einsum.default, r.choice(["bij,bjk->bik", "bij,bjk->bki", "bij,bjk->bk"]), [x, r.choice(fitting)])
    alike = [y for y in b.values if shape(y) == shape(x)]
    if len(shape(x)) == 3 and r.random() < 1 / 2:
        letters = r.choice(["bij,bik->bjk", "bij,bij->bij", "bij,bij->bj", "bij,bik->bijk"])
        b.call(aten.einsum.default, letters, [x, r.choice(alike)])
    vectors = [p for p in b.parameters if len(shape(p)) == 2 and shape(p)[0] == shape(x)[-1]]
    if vectors and r.random() < 1 / 2:
        b.call(aten.matmul.default, x, r.choice(vectors))


def convolution(b: Builder, r: Random, x: fx.Node) -> None:
    """Add a convolution over 1 to 3 axes: groups, unbatched inputs, padding by numbers or mode names, strides."""
    axes, unbatched = r.randint(1, 3), r.random() < 1 / 4
    while len(shape(x)) < axes + 2 - unbatched:
        x = b.call(aten.unsqueeze.default, x, -1)
    axes = len(shape(x)) - 1 if unbatched and len(shape(x)) <= 4 else min(len(shape(x)) - 2, 3)
    channels, sizes = shape(x)[-axes - 1], shape(x)[-axes:]
    groups = 2 if channels % 2 == 0 and r.random() < 1 / 4 else 1
    op = [aten.conv1d, aten.conv2d, aten.conv3d][axes - 1]
    word = r.choice(["same", "valid", None, None])
    padding = [r.randint(0, 1) if word is None else 0 for _ in sizes]
    dilation = [r.randint(1, 3) for _ in sizes]
    stride = [1 if word == "same" else r.randint(1, 3) for _ in sizes]
    most = [3 if word == "same" else 1 + (size + 2 * own - 1) // step
            for size, own, step in zip(sizes, padding, dilation, strict=True)]  # fmt: skip
    weight = b.parameter(4, channels // groups, *(r.randint(1, min(3, largest)) for largest in most))
    bias = b.parameter(4) if r.random() < 1 / 2 else None
    if word is None:
        y = b.call(op.default, x, weight, bias, stride, padding, dilation, groups)
    else:
        y = b.call(op.padding, x, weight, bias, stride, word, dilation, groups)
    if len(shape(x)) == axes + 2 and r.random() < 1 / 2:  # Convert back to tokens.
        b.linear(b.call(aten.transpose.int, b.call(aten.flatten.using_ints, y, 2, -1), 1, 2), 4)


def lookup(b: Builder, r: Random, x: fx.Node) -> None:
    """Add an embedding, with one row per sample or one per token."""
    labels = [[3, 1], [[3, 1, 0], [2, 2, 1]]][r.randint(0, 1)]
    held = [p for p in b.parameters if shape(p) == (5, shape(x)[-1])]
    table = r.choice(held) if held and r.random() < 1 / 2 else b.parameter(5, shape(x)[-1])
    b.call(aten.embedding.default, table, b.tensor(torch.tensor(labels)))


STEPS = [
    *[linear] * 4, *[norm] * 2, *[modulate] * 3, *[gated] * 2, *[attention] * 3, *[product] * 2, convolution, lookup,
]  # fmt: skip
