from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fxquant.errors import CalibrationError, CheckpointError
from fxquant.numerics.finite import within_float32
from fxquant.statistics import moments as moments_module
from fxquant.statistics.channels import ChannelStatistics
from fxquant.statistics.collection import Statistics
from fxquant.statistics.moments import ROWS_PER_CALL, SecondMoments


def rows(number: int, seed: int = 0, channels: int = 6) -> torch.Tensor:
    return torch.randn(number, channels, generator=torch.Generator().manual_seed(seed)).add(0.5)


def test_moments_of_shifted_and_divided_rows():
    moments, steps = SecondMoments(6), {1.0: rows(30, 1), 2.5: rows(50, 2)}
    for step, x in steps.items():
        moments.add(x[:20], step)
        moments.add(x[20:], step)
    shifts, factor = {1.0: rows(1, 3)[0], 2.5: rows(1, 4)[0]}, torch.rand(6) + 0.5
    y = torch.cat([(x - shifts[step]) / factor for step, x in steps.items()]).double()
    torch.testing.assert_close(moments.of(factor, shifts), y.T @ y / 80, rtol=1e-5, atol=1e-5)
    x = torch.cat([*steps.values()]).double()
    torch.testing.assert_close(moments.of(), x.T @ x / 80, rtol=1e-5, atol=1e-5)
    with pytest.raises(CalibrationError, match=r"2\.5"):
        moments.of(None, {1.0: shifts[1.0]})


def test_statistics_record_them_on_demand_and_a_bounded_number_of_rows():
    statistics = Statistics()
    statistics.wants_moments = {"a"}.__contains__
    x = rows(3 * ROWS_PER_CALL).reshape(3, ROWS_PER_CALL, 6)
    for key in ("a", "b"):
        statistics.record(key, x, torch.tensor([5, 5, 7]))
    assert statistics["b"].moments is None
    moments = statistics["a"].moments
    assert moments is not None and moments.counts == {5.0: ROWS_PER_CALL // 2, 7.0: ROWS_PER_CALL // 2}
    exact = x.reshape(-1, 6).T @ x.reshape(-1, 6) / (3 * ROWS_PER_CALL)
    torch.testing.assert_close(moments.of().float(), exact, atol=0.2, rtol=0)
    again = Statistics()
    again.wants_moments = {"a"}.__contains__
    again.record("a", x, torch.tensor([5, 5, 7]))
    assert torch.equal(again["a"].moments.matrix, moments.matrix)


def test_they_merge_and_are_stored(tmp_path):
    runs, parts = [Statistics(seed=seed) for seed in (1, 2)], [rows(20, 1)[None], rows(20, 2)[None]]
    for run, x in zip(runs, parts, strict=True):
        run.wants_moments = {"a"}.__contains__
        run.record("a", x, torch.tensor([3.0]))
        run.record("b", x, torch.tensor([3.0]))
    runs[0].merge(runs[1])
    both = torch.cat([part[0] for part in parts])
    torch.testing.assert_close(runs[0]["a"].moments.matrix, both.double().T @ both.double(), rtol=1e-5, atol=1e-5)
    runs[0].save(tmp_path / "s")
    loaded = Statistics.load(tmp_path / "s")
    assert torch.equal(loaded["a"].moments.matrix, runs[0]["a"].moments.matrix)
    assert loaded["a"].moments.counts == {3.0: 40} and loaded["b"].moments is None
    torch.testing.assert_close(
        loaded["a"].moments.of(None, {3.0: torch.ones(6)}), runs[0]["a"].moments.of(None, {3.0: torch.ones(6)})
    )


def test_statistics_of_dit_xl_fit_in_a_gigabyte():
    total = 0
    for channels in (1152, 1152, 1152, 4608):  # q/k/v, output projection, both feed-forward linears
        one = ChannelStatistics("layer")
        one.record(torch.zeros(1, 2, channels), torch.tensor(1.0))
        total += 28 * 50 * one.nbytes
    assert total < 1e9


@pytest.mark.parametrize("channels", [1, 255, 256, 257, 600])
def test_half_of_the_matrix_is_kept_whatever_its_size(channels, tmp_path):
    statistics = Statistics()
    statistics.wants_moments = {"a"}.__contains__
    x = torch.randn(1, 40, channels, generator=torch.Generator().manual_seed(channels))
    statistics.record("a", x, torch.tensor([3.0]))
    found = statistics["a"].moments
    torch.testing.assert_close(found.matrix, (x[0].T @ x[0]).double(), rtol=1e-5, atol=1e-4)
    assert found.nbytes < 4 * channels**2 * (0.5 + 128 / channels) + 8 * channels + 4 * 256**2
    statistics.save(tmp_path / "statistics.safetensors")
    again = Statistics.load(tmp_path / "statistics.safetensors")["a"].moments
    assert torch.equal(again.matrix, found.matrix)


@pytest.mark.parametrize("channels", [3, 257, 300])
def test_sealed_they_take_half_the_room_and_stay_what_they_were(channels):
    x = torch.randn(500, channels, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, channels)
    x[:, 1] = 0.0
    moments = SecondMoments(channels)
    moments.add(x, 3.0)
    before, size = moments.matrix, moments.nbytes
    moments.seal()
    moments.seal()
    assert moments.nbytes < 0.52 * size + 8 * channels
    root = before.diagonal().sqrt()
    assert ((moments.matrix - before).abs() <= 2**-11 * root * root[:, None] * (1 + 1e-6)).all()
    assert torch.equal(moments.matrix, moments.matrix.T)
    torch.testing.assert_close(moments.matrix.diagonal(), before.diagonal(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("largest", [1.0, 1e30])
def test_few_rows_are_held_in_place_of_the_matrix_which_is_the_same(sealed, dtype, largest, monkeypatch):
    def made():
        generator, found = torch.Generator().manual_seed(0), SecondMoments(700)
        for step in (3.0, 1.0, 3.0):
            x = torch.randn(20, 700, generator=generator)
            x[:, 5] *= largest
            found.add(x.to(dtype), step)
        if sealed:
            found.seal()
        return found

    held = made()
    assert held.nbytes <= 60 * 700 * dtype.itemsize + 2 * 8 * 700
    monkeypatch.setattr(moments_module, "_SHARE", 0.0)
    summed = made()
    assert summed.nbytes > 700 * 350 * (2 if sealed else 4)
    shifts = {step: torch.ones(700) for step in (1.0, 3.0)}
    assert torch.equal(held.of(torch.full((700,), 3.0), shifts), summed.of(torch.full((700,), 3.0), shifts))
    assert held.nbytes <= 60 * 700 * dtype.itemsize + 2 * 8 * 700
    few = held.rows(torch.full((700,), 3.0), shifts)
    expected = held.of(torch.full((700,), 3.0), shifts)
    root = expected.diagonal().sqrt()
    error = (few.T @ few - expected).abs() / (root * root[:, None]).clamp_min(1e-300)
    assert few.dtype == torch.float64 and few.shape == (60, 700) and error.max() < (1e-3 if sealed else 1e-5)
    assert summed.rows() is None
    if not sealed:
        assert held.dtype == summed.dtype and held.rows() is None  # Who asks for the dtype is about to sum them up.
        assert all(torch.equal(one, dict(summed.tensors())[name]) for name, one in held.tensors())
        both = made()
        both.merge(held)
        assert torch.equal(both.matrix, 2 * summed.matrix)


def few_rows(seed=0):
    found, generator = SecondMoments(90), torch.Generator().manual_seed(seed)
    for step in (3.0, 1.0, 3.0):
        found.add(torch.randn(4, 90, generator=generator), step)
    return found


def test_few_rows_are_merged_moved_and_stored_as_rows(tmp_path):
    one, other = few_rows(1), few_rows(2)
    expected = torch.cat([one.rows(), other.rows()]) / 2**0.5
    one.merge(other)
    torch.testing.assert_close(one.rows(), expected, rtol=1e-14, atol=0)
    assert one.counts == {3.0: 16, 1.0: 8} and other.counts == {3.0: 8, 1.0: 4}
    torch.testing.assert_close(one.of(), expected.T @ expected, rtol=1e-5, atol=1e-5)
    before = one.rows()
    assert torch.equal(one.to("cpu").rows(), before)
    again = SecondMoments.restore({name: tensor.clone() for name, tensor in one.tensors()}, 90)
    shifts = {3.0: torch.ones(90), 1.0: torch.zeros(90)}
    assert torch.equal(again.rows(None, shifts), one.rows(None, shifts)) and torch.equal(again.matrix, one.matrix)
    with pytest.raises(CalibrationError, match="timestep 1"):
        one.rows(None, {3.0: torch.ones(90)})


def test_bytes_and_numbers_of_rows_are_counted_as_they_come():
    one, other = few_rows(1), few_rows(2)
    restored = SecondMoments.restore(dict(one.tensors()), 90)
    assert one.nbytes == restored.nbytes == (4 * 12 + 8 * 2) * 90 and one.rows_held == restored.rows_held == 12
    one.merge(other)
    assert one.nbytes == (4 * 24 + 8 * 2) * 90 and one.rows_held == 24
    one.add(torch.ones(400, 90), 3.0)
    assert one.nbytes == 4 * 90 * 90 + 8 * 2 * 90 and one.rows_held == 0 and one.rows() is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_rows_that_are_not_floating_point_are_stored_as_float32(dtype, tmp_path):
    statistics, x = Statistics(), torch.arange(180).reshape(1, 2, 90).to(dtype)
    statistics.wants_moments = {"a"}.__contains__
    statistics.record("a", x, torch.tensor([3.0]))
    statistics.save(tmp_path / "s")
    matrix = Statistics.load(tmp_path / "s")["a"].moments.matrix
    assert torch.equal(matrix, statistics["a"].moments.matrix) and torch.equal(matrix, x[0].double().T @ x[0].double())


@pytest.mark.parametrize("number", [3, 400])
def test_no_rows_change_nothing(number):
    moments = SecondMoments(90)
    for x in (torch.ones(0, 90), torch.ones(number, 90), torch.ones(0, 90)):
        moments.add(x, 3.0)
    again = SecondMoments.restore(dict(moments.tensors()), 90)
    assert moments.counts == again.counts == {3.0: number} and torch.equal(again.matrix, moments.matrix)


def test_rows_of_two_dtypes_are_summed_up():
    found = few_rows()
    found.add(torch.ones(2, 90, dtype=torch.bfloat16), 3.0)
    assert found.rows() is None and found.counts == {3.0: 10, 1.0: 4}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("moment_rows", lambda rows: rows[:-1]),
        ("moment_rows", lambda rows: rows[:, :-1]),
        ("moment_rows", lambda rows: rows.fill_(torch.nan)),
        ("moment_rows", lambda rows: rows.long()),
        ("moment_rows", lambda rows: rows.repeat(40, 1)),
        ("moment_calls", lambda lengths: lengths * 0),
        ("moment_calls", lambda lengths: lengths[:-1]),
        ("moment_call_timesteps", lambda steps: steps + 1),
        ("moment_call_timesteps", lambda steps: steps[:-1]),
        ("moment_call_timesteps", lambda steps: steps.to(torch.complex128)),
        ("moment_timesteps", lambda steps: steps.to(torch.complex64)),
        ("moment_sums", lambda sums: sums.to(torch.complex64)),
        ("moment_counts", lambda counts: counts.double()),
        ("moment_calls", lambda lengths: lengths.double()),
    ],
)
def test_rows_that_do_not_fit_are_refused(name, change):
    tensors = {key: tensor.clone() for key, tensor in few_rows().tensors()}
    tensors[name] = change(tensors[name])
    with pytest.raises(ValueError):
        SecondMoments.restore(tensors, 90)


def test_a_timestep_that_is_listed_twice_is_refused():
    moments = SecondMoments(6)
    for step in (3.0, 1.0):
        moments.add(rows(20), step)
    tensors = {key: tensor.clone() for key, tensor in moments.tensors()}
    tensors["moment_timesteps"].fill_(3.0)
    with pytest.raises(ValueError, match="a timestep twice"):
        SecondMoments.restore(tensors, 6)


def test_files_without_rows_are_of_the_version_that_earlier_releases_read(tmp_path):
    versions = {}
    for name, count in (("few", 2), ("many", 400)):
        statistics = Statistics()
        statistics.wants_moments = {"a"}.__contains__
        x = torch.randn(1, count, 90, generator=torch.Generator().manual_seed(0))
        statistics.record("a", x, torch.tensor([3.0]))
        statistics.save(tmp_path / name)
        assert torch.equal(Statistics.load(tmp_path / name)["a"].moments.matrix, statistics["a"].moments.matrix)
        with safe_open(tmp_path / name, framework="pt") as file:
            versions[name] = json.loads(next(iter(file.metadata().values())))["version"]
    assert versions == {"few": 2, "many": 1}


def test_more_rows_are_summed_up():
    moments, x = SecondMoments(300), torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    for part in x.split(50):
        moments.add(part, 1.0)
    assert moments.nbytes < 4 * 300 * 320
    torch.testing.assert_close(moments.matrix, (x.T @ x).double(), rtol=1e-5, atol=1e-4)


def test_sealed_they_are_neither_saved_nor_added_to(tmp_path):
    """What they hold is divided by a scale that no file has."""
    sealed, other = Statistics(seed=1), Statistics(seed=2)
    for statistics in (sealed, other):
        statistics.wants_moments = {"a"}.__contains__
        statistics.record("a", rows(20)[None], torch.tensor([3.0]))
    sealed.seal()
    with pytest.raises(CalibrationError, match="neither saved nor added to"):
        sealed.save(tmp_path / "s")
    assert not (tmp_path / "s").exists()
    for left, right in ((sealed, other), (other, sealed)):
        with pytest.raises(CalibrationError, match="neither saved nor added to"):
            left.merge(right)
    assert other["a"].moments.counts == {3.0: 20} and int(other["a"].count.sum()) == 20


def test_moments_of_another_dtype_are_refused(tmp_path):
    statistics = Statistics(seed=1)
    statistics.wants_moments = {"a"}.__contains__
    statistics.record("a", rows(20)[None], torch.tensor([3.0]))
    statistics.save(tmp_path / "s")
    tensors = load_file(tmp_path / "s")
    with safe_open(tmp_path / "s", framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors | {"a.moments": tensors["a.moments"].half()}, tmp_path / "s", metadata=metadata)
    with pytest.raises(CheckpointError, match="float16"):
        Statistics.load(tmp_path / "s")


@pytest.mark.parametrize("largest", [1e18, 1e30, 3e38])
def test_squares_that_float32_does_not_hold(largest, tmp_path):
    """One row of a finite model is huge: moments stay finite and right, merged, sealed and stored as well."""
    ordinary, huge = rows(64, 1), torch.full((4, 6), largest)
    huge[:, 3:] = 1.0
    first, second = Statistics(seed=1), Statistics(seed=2)
    for statistics, parts in ((first, [ordinary[:32], huge]), (second, [ordinary[32:]])):
        statistics.wants_moments = {"a"}.__contains__
        for part in parts:
            statistics.record("a", part[None], torch.tensor([3.0]))
    x = torch.cat([ordinary, huge]).double()
    exact = x.T @ x / len(x)

    def right(moments):
        return torch.allclose(moments, exact, rtol=1e-5, atol=0)

    both, turned = (copy.deepcopy(one) for one in (first, second))
    both.merge(second)
    turned.merge(first)
    assert right(both["a"].moments.of())
    assert right(turned["a"].moments.of())
    both.save(tmp_path / "s")
    assert torch.equal(Statistics.load(tmp_path / "s")["a"].moments.of(), both["a"].moments.of())
    both.seal()
    assert torch.allclose(both["a"].moments.of().diagonal(), exact.diagonal(), rtol=1e-3, atol=0)


def test_ordinary_moments_are_summed_as_they_are():
    moments = SecondMoments(6)
    moments.add(rows(20) * 1e9, 1.0)
    assert dict(moments.tensors())["moments"].dtype == torch.float32
    matrix = moments.of()
    scaled = within_float32(matrix)
    assert float(matrix.max()) > 2**60 >= float(scaled.max())
    assert torch.equal(scaled / scaled.max(), matrix / matrix.max())  # By a power of two, so that no digit is lost.
    assert within_float32(scaled) is scaled


def test_the_default_dtype_does_not_matter(default_dtype):
    def made():
        moments = SecondMoments(6)
        moments.add(rows(20), 1.0)
        return moments.matrix

    expected = made()
    x = rows(20)
    default_dtype(torch.bfloat16)
    moments = SecondMoments(6)
    moments.add(x, 1.0)
    assert torch.equal(moments.matrix, expected)
