"""Attention of codes against float64, on a GPU or interpreted; and compiled for a GPU that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.backends.native.gpu import machine
from fxquant.backends.native.gpu.attention_ops import Cut, choose, int8_attention, parts
from fxquant.errors import BackendError
from fxquant.numerics.sqnr import sqnr_db
from tests.sampling import covering

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MISSING = machine.missing(DEVICE)
runs = pytest.mark.skipif(MISSING is not None, reason=f"no Triton kernels: {MISSING}")
native = torch.ops.fxquant_native
Coded = tuple[Tensor, Tensor, Tensor]
SHAPES = [
    (2, 4, 4, 33, 33, 72),
    (1, 3, 3, 13, 7, 40),
    (2, 4, 2, 5, 33, 17),
    (1, 2, 1, 1, 1, 16),
    (1, 1, 1, 20, 100, 128),
    (1, 2, 1, 20, 300, 24),
    (1, 1, 1, 9, 21, 160),
]
SMALL = Cut(16, 16, 4, 2)


def coded(x: Tensor, each: bool = False) -> Coded:
    """Codes of 0 to 255 and their grid, one for all or one a sample."""
    axes = tuple(range(int(each), x.dim()))
    low, high = x.amin(axes, keepdim=each).clamp(max=0), x.amax(axes, keepdim=each).clamp(min=0)
    scale = (high - low) / 255
    zero_point = (-low / scale).round()
    return ((x / scale).round() + zero_point).clamp(0, 255).to(torch.uint8), scale, zero_point.to(torch.uint8)


def real(x: Coded) -> Tensor:
    codes, scale, zero_point = x
    return (codes.double() - zero_point.double()) * scale.double()


def inputs(batch: int, heads: int, shared: int, queries: int, keys: int, depth: int, each: bool = False) -> list[Coded]:
    """Queries, keys and values, laid out as linears leave them: tokens before heads."""
    torch.manual_seed(0)
    q = coded(torch.randn(batch, queries, heads, depth).transpose(1, 2) * depth**-0.5, each)
    k, v = (coded(torch.randn(batch, keys, shared, depth).transpose(1, 2) + 0.5, each) for _ in range(2))
    return [q, k, v]


def masks(kind: str, batch: int, queries: int, keys: int) -> Tensor | None:
    if kind == "float":
        return torch.randn(batch, 1, queries, keys)
    if kind == "padding":  # Of keys alone, as text encoders give it.
        return torch.where(torch.rand(batch, 1, 1, keys) > 0.3, 0.0, -torch.inf)
    return torch.rand(1, 1, queries, keys) > 0.3 if kind == "bool" else None


def probabilities(q: Coded, k: Coded, mask: Tensor | None) -> Tensor:
    scores = real(q) @ real(k).repeat_interleave(q[0].shape[1] // k[0].shape[1], 1).transpose(-1, -2)
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
    return torch.nan_to_num(scores.softmax(-1))


def expected(q: Coded, k: Coded, v: Coded, mask: Tensor | None, step: float, highest: int) -> tuple[Tensor, Tensor]:
    """Attention, and the rows of it without a probability between two codes."""
    steps = probabilities(q, k, mask) / step
    values = real(v).repeat_interleave(q[0].shape[1] // v[0].shape[1], 1)
    certain = ((steps - steps.floor() - 0.5).abs() > 1e-3).all(-1)
    return steps.round().clamp(max=highest) * step @ values, certain


def attend(q: Coded, k: Coded, v: Coded, mask: Tensor | None = None, **more: Any) -> Tensor:
    """The op on the device, from codes of 0 to 255; heads before tokens."""
    rest = {"step": torch.tensor(1 / 255), "zero": torch.zeros((), dtype=torch.uint8), "highest": 255} | {
        "out_scale": None,
        "out_zero_point": None,
        "qmax": 255,
        "dtype": torch.float32,
    }
    cut = more.pop("cut", None)
    parts = [part for codes, *grid in (q, k, v) for part in ((codes.to(torch.int16) - 128).to(torch.int8), *grid)]
    arguments = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in (*parts, mask, *(rest | more).values())]
    found = native.triton_attention(*arguments) if cut is None else int8_attention(*arguments, cut=cut)
    return found.cpu().transpose(1, 2)


@runs
@pytest.mark.parametrize(
    ("number", "mask"), covering(range(len(SHAPES)), ["none", "float", "bool", "padding"], together=1)
)
def test_of_codes(number: int, mask: str) -> None:
    shape = SHAPES[number]
    q, k, v = inputs(*shape)
    given = masks(mask, shape[0], shape[3], shape[4])
    right, certain = expected(q, k, v, given, 1 / 255, 255)
    for cut in (None, SMALL):
        found = attend(q, k, v, given, cut=cut)
        torch.testing.assert_close(found[certain], right.float()[certain], rtol=1e-5, atol=1e-5)
        assert certain.any()
        assert sqnr_db(right, found) > 40.0


@runs
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_a_grid_for_each_sample(mask: str) -> None:
    q, k, v = inputs(3, 2, 1, 6, 40, 24, each=True)
    assert len({float(x) for x in q[1].flatten()}) == 3
    given = masks(mask, 3, 6, 40)
    right, certain = expected(q, k, v, given, 1 / 255, 255)
    for cut in (None, SMALL):
        found = attend(q, k, v, given, cut=cut)
        torch.testing.assert_close(found[certain], right.float()[certain], rtol=1e-5, atol=1e-5)


@runs
@pytest.mark.parametrize("cut", [None, SMALL])
@pytest.mark.parametrize("depth", [128, 129, 130, 256])
@pytest.mark.parametrize(("code", "key", "zero_q", "zero_k"), [(255, 255, 0, 0), (255, 0, 0, 255), (0, 0, 255, 255)])
def test_largest_scores_are_exact(code: int, key: int, zero_q: int, zero_k: int, depth: int, cut: Cut | None) -> None:
    """One key scores as far from zero as codes can, another one step of the grid less, and a third nothing."""
    q = torch.full((1, 1, 2, depth), code, dtype=torch.uint8)
    k = torch.full((1, 1, 33, depth), zero_k, dtype=torch.uint8)
    k[0, 0, :2] = key
    k[0, 0, 1, 0] = abs(key - 1)
    v = torch.arange(33, dtype=torch.uint8).reshape(1, 1, 33, 1).expand(1, 1, 33, 16).contiguous()
    zero = [torch.tensor(number, dtype=torch.uint8) for number in (zero_q, zero_k, 0)]
    grids = [(torch.tensor(scale), point) for scale, point in zip((1 / 255, 1.0, 1.0), zero, strict=True)]
    three = [(codes, *grid) for codes, grid in zip((q, k, v), grids, strict=True)]
    right, certain = expected(*three, None, 1 / 255, 255)  # type: ignore[arg-type]
    assert certain.all()
    torch.testing.assert_close(attend(*three, cut=cut), right.float(), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


@runs
@pytest.mark.parametrize("cut", [None, SMALL])
def test_sums_of_saturated_codes_are_exact(cut: Cut | None) -> None:
    """Every probability beyond the highest code, every value as far from its zero point as there is."""
    keys = 200
    q = torch.zeros(1, 1, 3, 16, dtype=torch.uint8), torch.tensor(1.0), torch.tensor(0, dtype=torch.uint8)
    k = torch.zeros(1, 1, keys, 16, dtype=torch.uint8), torch.tensor(1.0), torch.tensor(0, dtype=torch.uint8)
    for code, zero_point in ((255, 0), (0, 255)):
        v = torch.full((1, 1, keys, 24), code, dtype=torch.uint8), torch.tensor(1.0), torch.tensor(zero_point).byte()
        for highest, zero in ((255, 0), (15, 0), (255, 3)):
            step = torch.tensor(2.0**-20)
            found = attend(q, k, v, step=step, zero=torch.tensor(zero).byte(), highest=highest, cut=cut)
            assert (found == keys * (highest - zero) * (code - zero_point) * 2.0**-20).all()


@runs
@pytest.mark.parametrize(("half", "code"), [(0.5, 0), (1.5, 2), (2.5, 2), (5.5, 6)])
def test_halves_go_to_even_codes(half: float, code: int) -> None:
    """Of eight equal probabilities each is so many steps."""
    if half > 0.5 and DEVICE.type != "cpu":
        pytest.skip("GPUs divide by the step to within a unit in the last place")
    step = torch.tensor(0.125 / half)
    assert 1 / (8 * step) == half
    q, k, _ = inputs(1, 1, 1, 4, 8, 32)
    k = (torch.zeros_like(k[0]), k[1], k[2])
    v = torch.ones(1, 1, 8, 16).byte(), torch.tensor(1.0), torch.tensor(0).byte()
    torch.testing.assert_close(attend(q, k, v, step=step), torch.full((1, 1, 4, 16), 8.0 * code) * step)


@runs
@pytest.mark.parametrize("cut", [None, SMALL])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_that_sees_nothing_is_zero(kind: str, cut: Cut | None) -> None:
    q, k, v = inputs(1, 2, 2, 3, 40, 16)
    seen = torch.ones(1, 1, 3, 40, dtype=torch.bool)
    seen[..., 1, :] = False
    seen[..., 2, :16] = False  # The first steps see nothing, later ones do.
    mask = seen if kind == "bool" else torch.where(seen, 0.0, -torch.inf)
    right, certain = expected(q, k, v, mask, 1 / 255, 255)
    found = attend(q, k, v, mask, cut=cut)
    assert (found[:, :, 1] == 0).all()
    assert certain[:, :, 1:].any()
    torch.testing.assert_close(found[certain], right.float()[certain], rtol=1e-5, atol=1e-5)


@runs
@pytest.mark.parametrize("each", [False, True])
def test_output_codes(each: bool) -> None:
    q, k, v = inputs(2, 2, 2, 19, 33, 72)
    values = attend(q, k, v)
    shape = (2, 1, 1, 1) if each else ()
    scale, zero_point = torch.rand(shape) * 0.002 + 0.001, torch.randint(60, 200, shape, dtype=torch.uint8)
    codes = attend(q, k, v, out_scale=scale, out_zero_point=zero_point, qmax=250)
    steps = values.double() / scale.double()
    distance = (codes.double() + 128 - (steps.round() + zero_point.double()).clamp(0, 250)).abs()
    assert codes.dtype == torch.int8
    assert (distance[(steps - steps.floor() - 0.5).abs() > 1e-3] == 0).all()
    assert distance.max() <= 1
    assert {-128, 250 - 128} < set(codes.flatten().tolist())  # Cut off at both ends.


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_results(dtype: torch.dtype) -> None:
    q, k, v = inputs(1, 2, 2, 5, 20, 32)
    found = attend(q, k, v, dtype=dtype)
    assert found.dtype == dtype
    # The interpreter cuts bfloat16 off instead of rounding it.
    rtol = 2**-7 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(found, attend(q, k, v).to(dtype), rtol=rtol, atol=0.0)


@runs
def test_values_of_other_channels_and_strides() -> None:
    q, k, _ = inputs(1, 2, 2, 5, 20, 32)
    joined = torch.randint(0, 256, (1, 20, 3, 2, 56), dtype=torch.uint8)
    v = joined[:, :, 1].transpose(1, 2)[..., 3:43], torch.tensor(0.01), torch.tensor(100).byte()
    right, certain = expected(q, k, v, None, 1 / 255, 255)
    signed = [(x.to(torch.int16) - 128).to(torch.int8).to(DEVICE) for x in (q[0], k[0], joined)]
    given = signed[2][:, :, 1].transpose(1, 2)[..., 3:43]
    assert not given.is_contiguous()
    one = torch.tensor(1 / 255), torch.tensor(0).byte()
    grids = [part.to(DEVICE) for part in (*q[1:], *k[1:], *v[1:], *one)]
    found = native.triton_attention(
        signed[0], *grids[:2], signed[1], *grids[2:4], given, *grids[4:6], None, *grids[6:], 255, None, None, 255,
        torch.float32,
    )  # fmt: skip
    found = found.cpu().transpose(1, 2)
    torch.testing.assert_close(found[certain], right.float()[certain], rtol=1e-5, atol=1e-5)


@runs
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_masks_of_fewer_axes(dims: int) -> None:
    q, k, v = inputs(1, 2, 2, 5, 20, 32)
    mask = torch.randn((2, 5, 20)[-dims:])
    right, certain = expected(q, k, v, mask, 1 / 255, 255)
    found = attend(q, k, v, mask)
    torch.testing.assert_close(found[certain], right.float()[certain], rtol=1e-5, atol=1e-5)


@runs
def test_no_queries() -> None:
    q, k, v = inputs(1, 2, 2, 5, 20, 32)
    assert attend((q[0][:, :, :0], *q[1:]), k, v).shape == (1, 2, 0, 32)


def arguments(**other: Any) -> list[Any]:
    one, zero = torch.tensor(1.0), torch.tensor(0).byte()
    x = torch.zeros(2, 4, 3, 16, dtype=torch.int8)
    given: dict[str, Any] = {
        "q": x,
        "qs": one,
        "qz": zero,
        "k": x,
        "ks": one,
        "kz": zero,
        "v": x,
        "vs": one,
        "vz": zero,
    }
    given |= {"mask": None, "ps": one, "pz": zero, "highest": 255, "os": None, "oz": None, "qmax": 255}
    found = given | {"dtype": torch.float32} | other
    return [value.to(DEVICE) if isinstance(value, Tensor) else value for value in found.values()]


@runs
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"q": torch.zeros(2, 4, 3, 16, dtype=torch.uint8)}, "int8 codes, stored minus 128, not torch.uint8"),
        ({"q": torch.zeros(4, 3, 16, dtype=torch.int8)}, r"must be \[batch, heads, tokens, channels\]"),
        ({"q": torch.zeros(2, 4, 3, 24, dtype=torch.int8)}, "differ in their channels"),
        ({"q": torch.zeros(2, 6, 3, 16, dtype=torch.int8)}, "do not divide"),
        ({"v": torch.zeros(2, 4, 5, 16, dtype=torch.int8)}, "same number of heads and tokens"),
        ({"v": torch.zeros(2, 4, 3, 257, dtype=torch.int8)}, "1 to 256 channels"),
        ({"q": torch.zeros(2, 4, 16, 3, dtype=torch.int8).transpose(2, 3)}, "last axis has stride 1"),
        ({"qs": torch.ones(3, 1, 1, 1)}, r"queries must be one for all or one for each of 2 samples, not \(3,"),
        ({"ps": torch.ones(2, 1, 1, 1)}, "grid of the probabilities must be one for all"),
        ({"vz": torch.tensor(0)}, "of float32 and uint8, not torch.float32, torch.int64"),
        ({"os": torch.tensor(1.0)}, "only one is given"),
        ({"mask": torch.ones(3, 4)}, r"mask \(3, 4\) does not broadcast"),
        ({"mask": torch.ones(3, 3, dtype=torch.int32)}, "a mask must be of bool"),
        ({"highest": 256}, "softmax_qmax=256"),
        ({"dtype": torch.float64}, "writes float32, bfloat16 and float16"),
    ],
)
def test_what_does_not_fit_is_refused(other: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        native.triton_attention(*arguments(**other))


@runs
def test_tensors_of_two_devices_are_refused() -> None:
    given = arguments()
    given[5] = given[5].to("meta")
    with pytest.raises(BackendError, match="move the model and its inputs to one device"):
        int8_attention(*given)


@runs
def test_no_keys_are_refused() -> None:
    empty = torch.zeros(2, 4, 0, 16, dtype=torch.int8)
    with pytest.raises(BackendError, match="there are no keys"):
        native.triton_attention(*arguments(k=empty, v=empty))


def test_the_result_is_known_without_running() -> None:
    given = [value.to("meta") if isinstance(value, Tensor) else value for value in arguments()]
    found = native.triton_attention(*given)
    assert (found.shape, found.dtype) == ((2, 3, 4, 16), torch.float32)
    given[13], given[14] = given[1], given[2]
    assert native.triton_attention(*given).dtype == torch.int8


def test_heads_are_cut_into_few_tiles() -> None:
    for channels in range(1, 257):
        for least in (16, 32):
            first, second = parts(channels, least)
            assert first + second >= channels
            assert all(part == 0 or (part >= least and part & (part - 1) == 0) for part in (first, second))
            assert first + second <= max(least, 1 << (channels - 1).bit_length())
    assert (parts(72, 32), parts(72, 16), parts(128, 16), parts(120, 16)) == ((64, 32), (64, 16), (128, 0), (128, 0))


COMPILE = """
import json, sys
from fxquant.backends.native.gpu.ahead import compile_kernel
from fxquant.backends.native.gpu.attention_ops import choose, constants
from fxquant.backends.native.gpu.kernels.attention import attention_kernel, key_offsets_kernel

types = {"k": "*i8", "offsets": "*i32", "q_zero_point": "*u8"}
made = compile_kernel(key_offsets_kernel, types, {"DEPTH": 72, "WIDTH": 128, "ALIGN": 8, "BLOCK": 128}, 4, 3)
assert made.spilled == 0, made
for queries, keys, depth, mask, coded in json.loads(sys.argv[1]):
    cut = choose(queries, keys, depth, mask != "none")
    grids = ("q", "k", "v", "softmax", "out")
    types = {"q": "*i8", "k": "*i8", "v": "*i8", "k_offsets": "*i32", "out": "*i8" if coded else "*bf16"}
    types |= {"mask": "*u8" if mask == "bool" else "*fp32"}
    types |= {f"{name}_scale": "*fp32" for name in grids} | {f"{name}_zero_point": "*u8" for name in grids}
    fixed = constants(depth, depth, keys, mask, 8 if depth % 16 else 16, cut)
    fixed |= {} if coded else {"out_scale": None, "out_zero_point": None}
    fixed |= {"mask": None} if mask == "none" else {}
    aligned = tuple(name for name, number in (("queries", queries), ("keys", keys)) if number % 16 == 0)
    made = compile_kernel(attention_kernel, types, fixed, cut.warps, cut.stages, aligned)
    print(json.dumps([made.spilled, made.shared, list(made.instructions)]))
"""
CASES = [
    (256, 256, 72, "none", True),  # Of 256 and of 512 pixels, as DiT-XL/2 has them.
    (1024, 1024, 72, "none", True),
    (1024, 1024, 72, "none", False),
    (1178, 1178, 64, "none", False),  # SD3 with its text.
    (4608, 4608, 128, "none", True),  # FLUX with its text.
    (256, 200, 128, "none", False),
    (1000, 1000, 128, "bool", True),
    (1024, 120, 72, "float", False),  # PixArt's text.
    (1024, 300, 72, "float", False),
    (60, 1000, 128, "float", True),
    (1, 1000, 72, "none", False),
    (1000, 1000, 256, "bool", False),
]


@pytest.mark.slow
@pytest.mark.skipif(machine.missing_triton() is not None, reason="there is no Triton")
@pytest.mark.parametrize("cases", [pytest.param(CASES, marks=pytest.mark.exhaustive, id="all"), CASES[::4]])
def test_compiles_for_hopper_into_tensor_core_instructions_without_spills(cases: list[Any], tmp_path: Path) -> None:
    # This process may have imported Triton as an interpreter; the other one compiles, and anew.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(cases)], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    made = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(made) == len(cases)
    for case, (spilled, shared, instructions) in zip(cases, made, strict=True):
        assert (case, spilled) == (case, 0)
        assert shared <= 227 * 1024, case
        # Bytes for the scores, float16 for the values.
        shapes = [word.split() for word in instructions if " " in word]
        assert {name for name, _ in shapes} == {"wgmma" if case[0] > 16 else "mma"}, case
        assert {"s32.s8"} <= set(instructions), case
        assert {"k32", "k16"} == {f"k{shape.rsplit('k', 1)[1]}" for _, shape in shapes}, case


def test_few_queries_and_all_keys_at_once() -> None:
    assert choose(1, 1000, 72, False).block_m == 16
    assert choose(256, 256, 72, False).block_n == 256
    assert choose(256, 256, 72, True).block_n == 64
    assert choose(1024, 1024, 128, False) == Cut(128, 128, 8, 3)
    assert choose(1024, 1024, 160, False).block_n == 32
