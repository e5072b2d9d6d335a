"""Packing is lossless, dense and independent of values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.errors import ConfigurationError
from fxquant.numerics.packing import pack, packed_size, unpack

BITS = range(2, 9)


@given(bits=st.integers(2, 8), rows=st.integers(1, 3), n=st.integers(0, 40), seed=st.integers(0, 2**16))
@settings(deadline=None)
def test_round_trip(bits: int, rows: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, n), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_size(n, bits))
    assert torch.equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", BITS)
def test_is_dense(bits: int) -> None:
    assert packed_size(1152, bits) == 1152 * bits // 8
    # No more than the unused rest of one byte for each of at most three planes.
    assert all(n * bits <= 8 * packed_size(n, bits) <= n * bits + 3 * 7 for n in range(200))


def test_layout_is_the_documented_one() -> None:
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([0, 1, 2, 3], dtype=torch.uint8), 2).tolist() == [0b11_10_01_00]
    # 3 bits: the low two of each code first, then the plane of the third.
    assert pack(torch.tensor([0b101, 0b010], dtype=torch.uint8), 3).tolist() == [0b10_01, 0b01]


@pytest.mark.parametrize("bits", BITS)
def test_more_axes_and_strides(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 13, 3), dtype=torch.uint8).transpose(1, 2)
    assert torch.equal(unpack(pack(codes, bits), bits, 13), codes)


@pytest.mark.parametrize("bits", BITS)
def test_meta_and_fake(bits: int) -> None:
    on_meta = pack(torch.empty(5, 13, dtype=torch.uint8, device="meta"), bits)
    assert on_meta.shape == (5, packed_size(13, bits))
    assert unpack(on_meta, bits, 13).shape == (5, 13)
    with FakeTensorMode():
        fake = pack(torch.empty(5, 13, dtype=torch.uint8), bits)
        assert fake.shape == on_meta.shape
        assert unpack(fake, bits, 13).shape == (5, 13)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9])
def test_refuses_other_widths(bits: int) -> None:
    with pytest.raises(ConfigurationError, match=f"bits={bits}"):
        packed_size(8, bits)
    with pytest.raises(ConfigurationError, match=f"bits={bits}"):
        pack(torch.zeros(8, dtype=torch.uint8), bits)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigurationError, match="uint8"):
        pack(torch.zeros(8, dtype=torch.int64), 4)
    with pytest.raises(ConfigurationError, match="uint8"):
        unpack(torch.zeros(4, dtype=torch.int8), 4, 8)
    with pytest.raises(ConfigurationError, match=r"takes 4 bytes.*have 5"):
        unpack(torch.zeros(5, dtype=torch.uint8), 4, 8)
