"""Attention and matrix products, which mix tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from fxquant.channels.layouts import static
from fxquant.channels.rules.row_sums import attention_drops, product_drops
from fxquant.channels.rules.table import cannot_broadcast, elementwise, rule, shape_of, tied
from fxquant.channels.wants import Barrier, Choose, Outcome, Push, Want
from fxquant.ir import ops as _ops  # noqa: F401  (registers the ops that rules are for)
from fxquant.ir.arguments import args
from fxquant.ir.attention import factors_of

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default)
def attention(node: fx.Node, want: Want) -> Outcome:
    """To v, per head channel; c passes where rows of the softmax sum to 1. Grouped-query heads share theirs."""
    if want.offset.any() and (reason := attention_drops(node)) is not None:
        return Barrier(reason)
    found = tied(want, [want.scale.ndim - 2], "attention mixes tokens, which have to share their factors")
    if found is not None:
        return found
    value = args(node).node("value")
    heads, kv_heads = (shape_of(n)[-3] if len(shape_of(n)) >= 3 else 1 for n in (node, value))
    if str(heads) == str(kv_heads) or want.scale.ndim < 3 or not want.varies(want.scale.ndim - 3):
        pushed = elementwise(node, value, want)  # The batch may be broadcast.
        return Push(pushed) if pushed else cannot_broadcast(node)
    heads, kv_heads = static(heads), static(kv_heads)
    if not heads or not kv_heads or heads % kv_heads or len(shape_of(value)) != want.scale.ndim:
        return Barrier("the heads of query and value do not match")
    axis = want.scale.ndim - 3
    grouped = [*want.scale.shape[:axis], kv_heads, heads // kv_heads, *want.scale.shape[axis + 1 :]]
    shared = want.map(lambda array: np.take(array.reshape(grouped), 0, axis=axis + 1))
    if (np.expand_dims(shared.offset, axis + 1) != want.offset.reshape(grouped)).any():
        return Barrier("heads that share a value ask for different constant shifts")
    every = np.broadcast_to(np.expand_dims(shared.scale, axis + 1), grouped)
    return Push([(value, shared)], ties=[(every, want.scale.reshape(grouped))])


@rule(aten.matmul.default, aten.bmm.default)
def matmul(node: fx.Node, want: Want) -> Outcome:
    """(a, 0) to the right operand's columns, with c behind a softmax, or to the left one's rows."""
    left, right = factors_of(node)
    if want.offset.any() and (reason := product_drops(left)) is not None:
        return Barrier(reason)
    rows = min(len(shape_of(left)), len(shape_of(right))) >= 2 and want.varies(want.scale.ndim - 2)
    if (
        rows and not want.varies(want.scale.ndim - 1) and not want.offset.any()
    ):  # Channels come first, as in linear attention.
        pushed = elementwise(node, left, want)
        return Push(pushed) if pushed else cannot_broadcast(node)
    if len(shape_of(right)) < 2 or want.scale.ndim < len(shape_of(right)):
        return Barrier("a product with a vector has no channels to scale")
    found = tied(want, [want.scale.ndim - 2], "a matrix product mixes tokens, which have to share their factors")
    if found is not None:
        return found
    pushed = elementwise(node, right, want)
    return Push(pushed) if pushed else cannot_broadcast(node)


@rule(aten.einsum.default)
def einsum(node: fx.Node, want: Want) -> Outcome:
    """(a, 0) to ONE factor, as for a matrix product, with c behind a softmax."""
    if (letters := letters_of(node)) is None:
        return Barrier("an einsum with dots, repeated letters or no result has no channel rule")
    *names, result = letters
    operands: Sequence[fx.Node] = args(node).tensors
    varied = {letter for axis, letter in enumerate(result) if want.varies(axis)}
    if want.offset.any():
        if (reason := einsum_drops(operands, letters)) is not None:
            return Barrier(reason)
        takers = [1]
    else:
        takers = [number for number, own in enumerate(names) if varied <= set(own)]
    if not takers or not varied <= set(names[takers[-1]]):
        axes = [axis for axis, letter in enumerate(result) if letter not in names[-1]]
        found = tied(want, axes, "a matrix product mixes tokens, which have to share their factors")
        return Barrier("an einsum of these letters has no channels to scale") if found is None else found
    ways = []
    for number in takers:
        moved = _moved(want, result, names[number], shape_of(operands[number]))
        if moved is not None:
            ways.append(Push([(operands[number], moved)]))
    return Choose(ways) if len(ways) > 1 else ways[0] if ways else cannot_broadcast(node)


def letters_of(node: fx.Node) -> list[str] | None:
    """The letters of each factor of an einsum, and those of its result; None for forms that rules do not know."""
    equation = str(args(node).equation).replace(" ", "")
    left, arrow, result = equation.partition("->")
    names = [*left.split(","), result]
    if not arrow or "." in equation or any(len(set(own)) < len(own) for own in names):
        return None
    return names


def einsum_drops(operands: Sequence[fx.Node], letters: list[str]) -> str | None:
    """Why a shift of the second factor of an einsum does not reach the result unchanged, or None if it does."""
    if len(operands) != 2:
        return "a constant shift cannot pass a matrix product"
    left, right, result = letters
    summed = {*left, *right} - set(result)
    if summed != {left[-1:]} or left[-1:] not in right or not set(result) <= {*left, *right}:
        return "a constant shift cannot pass a matrix product"
    keys = shape_of(operands[1])[right.index(left[-1])]
    if str(shape_of(operands[0])[-1]) != str(keys):  # One probability stands for all keys.
        return "a constant shift cannot pass a matrix product"
    return product_drops(operands[0])


def _moved(want: Want, result: str, own: str, shape: tuple[Any, ...]) -> Want | None:
    """A want on an einsum's result, moved to the factor of these letters, which include all along which it differs."""
    if any(static(size) == 1 and letter in result and want.varies(result.index(letter))
           for letter, size in zip(own, shape, strict=True)):  # fmt: skip
        return None
    kept = [letter for letter in result if letter in own]
    order = [kept.index(letter) for letter in own if letter in kept]

    def move(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        array = array[tuple(slice(None) if letter in own else 0 for letter in result)].transpose(order)
        return np.expand_dims(array, [axis for axis, letter in enumerate(own) if letter not in result])

    return want.map(move)
