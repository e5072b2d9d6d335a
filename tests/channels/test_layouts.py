"""Requests moved through layouts, against tensors moved the same way: scaling commutes with the move."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.channels.layouts import broadcast_back, compress, embed, reshape_back, settle_unread, stretch
from fxquant.channels.wants import IDENTITY, UNREAD, Want


class Symbol:
    """An open size, as ``s77``: it has a hint and a name, and products of it with numbers."""

    def __init__(self, text: str = "s77", hint: int = 3, factor: int = 1) -> None:
        self.text, self.factor, self.node = text, factor, type("Node", (), {"hint": hint})

    def __mul__(self, other: Any) -> Symbol:
        if isinstance(other, int):
            return Symbol(self.text, self.node.hint * other, self.factor * other)
        return Symbol(f"{self}*{other}", self.node.hint * other.node.hint)

    def __rmul__(self, other: int) -> Symbol:
        return self * other

    def __str__(self) -> str:
        return self.text if self.factor == 1 else f"{self.factor}*{self.text}"


def want(*shape: int) -> Want:
    """A variable of its own for each position, and an offset."""
    scale = np.arange(1, 1 + int(np.prod(shape)), dtype=np.int64).reshape(shape)
    return Want(scale, scale / 10)


SHAPES = [
    ((3, 5, 8), (3, 5, 2, 4), (1, 1, 8)),
    ((3, 5, 2, 4), (3, 5, 8), (1, 1, 2, 4)),
    ((15, 8), (3, 5, 8), (1, 8)),
    ((3, 1, 8), (3, 8), (1, 1, 8)),
    ((3, 8), (3, 8, 1), (1, 8)),
    ((3, 8, 1, 1), (3, 8), (1, 8, 1, 1)),
    ((3, 6, 4), (3, 24), (1, 6, 4)),
    ((3, 6, 4), (3, 8, 3), (1, 6, 4)),
    ((3, 24), (3, 6, 4), (1, 24)),
    ((1, 3, 8, 1), (3, 8), (1, 1, 8, 1)),
]


@pytest.mark.parametrize(("output", "source", "wanted"), SHAPES)
def test_a_reshape_commutes_with_its_request(
    output: tuple[int, ...], source: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    asked = want(*wanted)
    moved = reshape_back(asked, output, source)
    assert moved is not None
    value = np.random.default_rng(0).normal(size=source)
    for pick in (lambda w: w.scale, lambda w: w.offset):
        np.testing.assert_array_equal((value * pick(moved)).reshape(output), value.reshape(output) * pick(asked))
    assert moved.scale.ndim == len(source)


def test_an_open_batch_stays_apart_from_the_channels() -> None:
    batch = Symbol()
    moved = reshape_back(want(1, 8), [batch * 5, 8], [batch, 5, 2, 4])
    assert moved is not None
    assert moved.scale.shape == (1, 1, 2, 4)
    assert reshape_back(want(1, 8), [5, 8], [batch, 40]) is None
    assert reshape_back(want(1, 8), [batch, 8], [8, batch]) is None


@given(st.permutations([2, 3, 4]), st.integers(0, 2))
def test_axes_that_do_not_matter_are_left_out(shape: list[int], axis: int) -> None:
    wanted = [1, 1, 1]
    wanted[axis] = shape[axis]
    spread = want(*wanted).map(lambda array: np.broadcast_to(array, shape))
    compressed = compress(spread)
    assert compressed.scale.shape == tuple(wanted)
    np.testing.assert_array_equal(np.broadcast_to(compressed.scale, shape), spread.scale)


def test_a_request_on_a_broadcast_operand() -> None:
    asked = want(1, 1, 8)
    for operand, shape in (([3, 1, 8], (1, 1, 8)), ([8], (8,)), ([5, 8], (1, 8))):
        moved = broadcast_back(asked, operand)
        assert moved is not None
        assert moved.scale.shape == shape
    assert broadcast_back(asked, [3, 5, 1]) is None
    assert broadcast_back(want(1, 5, 8), [8]) is None


@pytest.mark.parametrize(("start", "step", "length"), [(0, 1, 3), (2, 1, 4), (1, 3, 2)])
def test_a_part_is_put_back_in_its_place(start: int, step: int, length: int) -> None:
    part = stretch(want(1, length), 1, length)
    whole = embed(part, 1, start, step, 8)
    assert whole.scale.shape == (1, 8)
    place = slice(start, start + step * length, step)
    np.testing.assert_array_equal(whole.scale[:, place], part.scale)
    np.testing.assert_array_equal(whole.offset[:, place], part.offset)
    assert (np.delete(whole.scale, range(*place.indices(8)), axis=1) == UNREAD).all()


class TestUnread:
    def test_where_the_others_agree_unread_positions_follow(self) -> None:
        settled = settle_unread(embed(want(1, 1, 4), 1, 2, 1, 5))
        assert settled.scale.tolist() == [[[1, 2, 3, 4]]]

    def test_where_they_differ_unread_positions_stay_as_they_are(self) -> None:
        settled = settle_unread(embed(want(1, 1, 4), 2, 2, 1, 8))
        assert settled.scale.tolist() == [[[IDENTITY, IDENTITY, 1, 2, 3, 4, IDENTITY, IDENTITY]]]

    def test_offsets_count_as_well(self) -> None:
        scale = np.array([[7, UNREAD, 7]])
        assert settle_unread(Want(scale, np.array([[1.0, 0.0, 1.0]]))).offset.tolist() == [[1.0]]
        assert settle_unread(Want(scale, np.array([[1.0, 0.0, 2.0]]))).scale.tolist() == [[7, IDENTITY, 7]]

    @given(st.lists(st.sampled_from([UNREAD, IDENTITY, 1, 2]), min_size=6, max_size=6))
    def test_what_is_read_never_changes(self, values: list[int]) -> None:
        asked = Want.of(np.array(values, dtype=np.int64).reshape(2, 3))
        settled = np.broadcast_to(settle_unread(asked).scale, (2, 3))
        read = asked.scale != UNREAD
        np.testing.assert_array_equal(settled[read], asked.scale[read])
        assert (settled != UNREAD).all()


def test_all_torch_reshapes_of_small_shapes() -> None:
    shapes = [shape for rank in (1, 2, 3) for shape in itertools.product((1, 2, 3, 4, 6, 12), repeat=rank)]
    shapes = [shape for shape in shapes if np.prod(shape) == 12]
    for output, source in itertools.product(shapes, shapes):
        asked = want(*output)
        moved = reshape_back(asked, output, source)
        assert moved is not None
        back = torch.from_numpy(np.broadcast_to(moved.scale, source).copy()).reshape(output).numpy()
        np.testing.assert_array_equal(back, asked.scale)
