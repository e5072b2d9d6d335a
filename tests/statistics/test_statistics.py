import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fxquant.errors import CalibrationError, CheckpointError, ConfigurationError, NonFiniteError
from fxquant.statistics.channels import ChannelStatistics, rows_to_sample
from fxquant.statistics.collection import Statistics


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recorded(calls, seed=0, num_rows=4, axis=-1):
    """Statistics of a run: `calls` are (x, timestep) pairs."""
    statistics = ChannelStatistics("layer", num_rows=num_rows, seed=seed)
    for x, timestep in calls:
        statistics.record(x, torch.as_tensor(timestep), axis)
    return statistics


def merged(first, *others):
    result = copy.deepcopy(first)
    for other in others:
        result.merge(other)
    return result


def assert_same_exact_part(a, b):
    assert torch.equal(a.timesteps, b.timesteps)
    assert torch.equal(a.minimum, b.minimum)
    assert torch.equal(a.maximum, b.maximum)
    assert torch.equal(a.count, b.count)


def assert_same(a, b):
    assert_same_exact_part(a, b)
    assert all(torch.equal(p, q) for p, q in zip(a.rows_by_timestep, b.rows_by_timestep, strict=True))


def assert_rows_come_from(rows, source):
    """Each row of `rows` is a different row of `source`."""
    hits = (rows[:, None] == source[None].float()).all(-1)
    assert (hits.sum(1) >= 1).all()
    assert (hits.sum(0) <= 1).all()


# What one call records


def test_extremes_count_and_sample_of_one_call():
    x = values(2, 6, 5)
    got = recorded([(x, 7)])
    flat = x.reshape(-1, 5)
    assert got.timesteps.tolist() == [7.0]
    assert got.timesteps.dtype == torch.float64
    assert torch.equal(got.minimum, flat.amin(0)[None])
    assert torch.equal(got.maximum, flat.amax(0)[None])
    assert torch.equal(got.absmax, flat.abs().amax(0)[None])
    assert got.count.tolist() == [12]
    assert got.count.dtype == torch.int64
    assert got.rows().shape == (4, 5)
    assert_rows_come_from(got.rows(), flat)
    assert torch.equal(got.rows(), got.rows_by_timestep[0])


def test_fewer_rows_than_the_sample_holds_are_all_kept():
    x = values(3, 5)  # [batch, channels], as the input of an adaLN linear
    got = recorded([(x, 7)], num_rows=8)
    assert got.count.tolist() == [3]
    assert got.rows().shape == (3, 5)
    assert_rows_come_from(got.rows(), x)
    assert torch.equal(got.minimum, x.amin(0)[None])


def test_timesteps_are_sorted_whatever_they_are():
    x = values(1, 3, 2)
    moments = [torch.tensor(999), torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor([20.25]), torch.tensor([-0.0])]
    got = recorded([(x, moment) for moment in [*moments, torch.tensor(0)]])
    assert got.timesteps.tolist() == [0.0, 0.5, 20.25, 999.0]
    assert got.count.tolist() == [6, 3, 3, 3]
    assert len(got) == 4


@pytest.mark.parametrize("timestep", [torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([3.0, 3.0])])
def test_one_timestep_for_the_whole_batch(timestep):
    x = values(2, 6, 5)
    assert_same(recorded([(x, timestep)]), recorded([(x, 3)]))


def test_mixed_batch_equals_each_sample_alone():
    x = values(5, 6, 4)
    moments = [3.0, 1.0, 3.0, 2.0, 1.0]
    together = recorded([(x, moments)])
    alone = recorded([(x[i : i + 1], moment) for i, moment in enumerate(moments)])
    assert_same_exact_part(together, alone)
    for moment, rows in zip(together.timesteps, together.rows_by_timestep, strict=True):
        assert_rows_come_from(rows, x[torch.tensor(moments) == moment].reshape(-1, 4))


def test_mixed_batch_of_different_timesteps_samples_as_each_alone():
    x = values(3, 6, 4)
    assert_same(recorded([(x, [3, 1, 2])]), recorded([(x[i : i + 1], t) for i, t in enumerate([3, 1, 2])]))


def test_mixed_batch_without_tokens():
    x = values(4, 3)
    got = recorded([(x, [1, 2, 1, 2])])
    assert torch.equal(got.maximum, torch.stack([x[0::2].amax(0), x[1::2].amax(0)]))
    assert got.count.tolist() == [2, 2]


def test_frames_folded_into_the_batch_belong_to_their_video():
    x = values(6, 4, 3)  # two videos of three frames
    got = recorded([(x, [10, 20])])
    assert_same_exact_part(got, recorded([(x[:3], 10), (x[3:], 20)]))


def test_tokens_with_timesteps_of_their_own():
    x, steps = values(2, 3, 4), torch.tensor([[0, 9, 9], [0, 7, 9]])
    got = recorded([(x, steps)])
    assert got.timesteps.tolist() == [0, 7, 9]
    assert got.count.tolist() == [2, 1, 3]
    for number, step in enumerate((0, 7, 9)):
        assert torch.equal(got.maximum[number], x[steps == step].amax(0))
    assert_rows_come_from(got.rows_by_timestep[1], x[1, 1:2])


@pytest.mark.parametrize("steps", [[[0, 9], [0, 7]], [[9, 0], [7, 0]]])
def test_what_several_tokens_went_into_counts_at_each_of_their_timesteps(steps):
    x = values(2, 5, 3)  # Prompts: five tokens a sample, which the two tokens of the image know nothing of.
    got = recorded([(x, torch.tensor(steps))])
    assert got.timesteps.tolist() == [0, 7, 9]
    assert got.count.tolist() == [10, 5, 5]
    assert torch.equal(got.minimum, torch.stack([x.flatten(0, 1).amin(0), x[1].amin(0), x[0].amin(0)]))


@pytest.mark.parametrize("rows", [1, 3])
def test_samples_in_one_row_count_at_all_timesteps_of_the_call(rows):
    x = values(rows, 7, 3)  # The prompts of two samples, one behind the other.
    assert_same(recorded([(x, [5, 5])]), recorded([(x, 5)]))
    got = recorded([(x, [5, 8])])
    assert got.timesteps.tolist() == [5, 8]
    assert torch.equal(got.maximum, x.flatten(0, 1).amax(0).expand(2, 3))


@pytest.mark.parametrize("moments", [7, [7, 8]])
def test_channel_axis_of_a_convolution(moments):
    x = values(2, 3, 4, 5)
    got = recorded([(x, moments)], axis=1)
    assert_same(got, recorded([(x.movedim(1, -1).contiguous(), moments)]))
    assert got.channels == 3
    assert_rows_come_from(got.rows(), x.movedim(1, -1).reshape(-1, 3))


def test_non_contiguous_value():
    x = values(5, 6, 2).transpose(0, 2)
    assert_same(recorded([(x, 1)]), recorded([(x.contiguous(), 1)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_any_real_dtype_is_kept_as_float32(dtype):
    x = (values(2, 6, 5) * 20).to(dtype)
    got = recorded([(x, 1)])
    assert got.minimum.dtype == got.maximum.dtype == got.rows().dtype == torch.float32
    assert torch.equal(got.minimum[0], x.reshape(-1, 5).amin(0).float())
    assert_rows_come_from(got.rows(), x.reshape(-1, 5))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_does_not_matter(default, default_dtype, tmp_path):
    x = values(2, 6, 5) * 20 + 91555.015625  # No number of float16, and not this one of bfloat16.
    expected, statistics = recorded([(x, 1)]), Statistics()
    default_dtype(default)
    got = recorded([(x, 1)])
    assert_same(got, expected)
    assert got.minimum.dtype == got.maximum.dtype == got.rows().dtype == torch.float32
    assert ChannelStatistics("key").minimum.dtype == torch.float32
    statistics.wants_moments = {"key"}.__contains__
    statistics.record("key", x, torch.tensor(1))
    statistics.save(tmp_path / "s")
    assert torch.equal(Statistics.load(tmp_path / "s")["key"].maximum, expected.maximum)


@pytest.mark.gpu
@pytest.mark.parametrize("moments", [[3, 3], [3, 4]])
def test_values_on_a_gpu(moments):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    x = values(2, 6, 5)
    got = recorded([(x.cuda(), torch.tensor(moments).cuda())])
    assert got.minimum.device.type == got.rows().device.type == "cpu"
    assert_same(got, recorded([(x, moments)]))


@pytest.mark.parametrize("moments", [3, [3, 4]])
def test_large_values_are_reduced_alike(monkeypatch, moments):
    x = values(2, 6, 5)
    serial = recorded([(x, moments)])
    monkeypatch.setattr("fxquant.statistics.channels._SERIAL_ELEMENTS", 0)
    assert_same(recorded([(x, moments)]), serial)
    x[0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="at timestep 3"):
        recorded([(x, moments)])


def test_recording_needs_and_keeps_no_gradient():
    x = values(2, 6, 5).requires_grad_()
    got = recorded([(x * 2, 1)])
    assert not got.minimum.requires_grad
    assert not got.rows().requires_grad


def test_inference_mode_can_be_left_and_entered():
    x = values(2, 6, 5)
    got = ChannelStatistics("layer")
    with torch.inference_mode():
        got.record(x + 1, torch.tensor(1))
    got.record(x, torch.tensor(1))
    with torch.inference_mode():
        got.record(x - 1, torch.tensor(1))
    assert got.count.tolist() == [36]


def test_value_is_not_changed():
    x = values(2, 6, 5)
    before = x.clone()
    got = recorded([(x[:, :1], 1), (x, 1)])
    got.minimum.zero_()
    got.rows().zero_()
    assert torch.equal(x, before)
    assert not torch.equal(got.minimum, torch.zeros(1, 5))


def test_a_kept_value_is_a_copy():
    x = values(2, 5)
    got = recorded([(x, [1, 2])])
    before = got.minimum, got.rows()
    x.zero_()
    assert torch.equal(got.minimum, before[0])
    assert torch.equal(got.rows(), before[1])


def test_empty_batch_records_nothing():
    statistics = Statistics()
    statistics.record("layer", torch.empty(0, 4, 3), torch.tensor(1))
    assert "layer" not in statistics


# What cannot be recorded


def test_no_timestep():
    with pytest.raises(CalibrationError, match=r"'layer'.*the timestep has shape \[0\] and holds no number"):
        recorded([(values(2, 6, 5), torch.zeros(0))])


@pytest.mark.parametrize(("shape", "axis"), [((5,), -1), ((2, 5), 0), ((2, 5), -2), ((2, 5), 2), ((2, 5), -3), ((), 0)])
def test_wrong_channel_axis(shape, axis):
    with pytest.raises(CalibrationError, match=r"'layer'.*channel axis"):
        recorded([(torch.zeros(shape), 1)], axis=axis)


def test_number_of_channels_may_not_change():
    with pytest.raises(CalibrationError, match=r"'layer'.* 5 channels before and now 4"):
        recorded([(values(2, 6, 5), 1), (values(2, 6, 4), 1)])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("moments", [20, [10, 20]])
def test_non_finite_value_names_key_and_timestep_and_changes_nothing(bad, moments):
    x = values(2, 6, 5)
    got = recorded([(x, moments)])
    before = copy.deepcopy(got)
    broken = x * 100
    broken[1, 3, 2] = bad
    with pytest.raises(NonFiniteError, match=r"'layer'.* 1 of 5 channels at timestep 20\b"):
        got.record(broken, torch.tensor(moments))
    assert_same(got, before)


def test_non_finite_timestep():
    with pytest.raises(NonFiniteError, match=r"'layer'.*timestep"):
        recorded([(values(2, 6, 5), [1.0, torch.nan])])


@pytest.mark.parametrize("kind", [Statistics, lambda **options: ChannelStatistics("layer", **options)])
def test_sample_needs_a_row(kind):
    with pytest.raises(ConfigurationError, match="num_rows=0"):
        kind(num_rows=0)


# The sample


@pytest.mark.parametrize("trials", [1000, pytest.param(4000, marks=pytest.mark.exhaustive)])
def test_every_row_is_sampled_equally_often(trials):
    # 40 rows that come in calls of 1, 24, 3 and 12; a fifth of them is kept.
    calls = torch.arange(40.0).reshape(1, 40, 1).split([1, 24, 3, 12], dim=1)
    hits = np.zeros(40)
    for seed in range(trials):
        kept = recorded([(call, 1) for call in calls], seed=seed, num_rows=8).rows().reshape(-1).int().numpy()
        assert len(set(kept)) == 8
        hits[kept] += 1
    deviation = (hits / trials - 0.2) / np.sqrt(0.2 * 0.8 / trials)
    assert np.abs(deviation).max() < 4.5
    assert deviation.std() == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize("trials", [1000, pytest.param(3000, marks=pytest.mark.exhaustive)])
def test_pairs_of_rows_are_sampled_equally_often(trials):
    calls = torch.arange(6.0).reshape(1, 6, 1).split([2, 4], dim=1)
    hits = dict.fromkeys(itertools.combinations(range(6), 2), 0)
    for seed in range(trials):
        hits[tuple(sorted(recorded([(c, 1) for c in calls], seed=seed, num_rows=2).rows().reshape(-1).tolist()))] += 1
    expected = trials / len(hits)
    chi_square = sum((hit - expected) ** 2 / expected for hit in hits.values())
    assert chi_square < 36  # 14 degrees of freedom: exceeded once in a thousand


@pytest.mark.parametrize("trials", [1000, pytest.param(3000, marks=pytest.mark.exhaustive)])
def test_merged_runs_sample_each_row_equally_often(trials):
    # A run of 30 rows and one of 10: the bigger has three quarters of the sample.
    big, small = torch.arange(30.0).reshape(1, 30, 1), torch.arange(30.0, 40).reshape(1, 10, 1)
    share = 0.0
    for seed in range(trials):
        both = merged(recorded([(big, 1)], seed=2 * seed), recorded([(small, 1)], seed=2 * seed + 1))
        share += (both.rows() < 30).float().mean().item() / trials
    assert share == pytest.approx(0.75, abs=0.02)


def test_second_run_is_identical():
    calls = [(values(2, 50, 3, seed=i), i % 4) for i in range(12)]
    assert_same(recorded(calls), recorded(calls))


def test_other_seeds_and_keys_sample_other_rows():
    x = values(1, 200, 2)
    first = recorded([(x, 1)])
    other_key = ChannelStatistics("other layer", num_rows=4)
    other_key.record(x, torch.tensor(1))
    assert not torch.equal(first.rows(), recorded([(x, 1)], seed=1).rows())
    assert not torch.equal(first.rows(), other_key.rows())
    assert not torch.equal(first.rows(), recorded([(x, 2)]).rows())


def test_what_happens_at_other_timesteps_does_not_matter():
    calls = [(values(2, 50, 3, seed=i), i % 3) for i in range(12)]
    by_timestep = sorted(calls, key=lambda call: call[1])
    assert_same(recorded(calls), recorded(by_timestep))


# Merging

run = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 99)), min_size=1, max_size=5)


def calls_of(drawn):
    return [(values(1, tokens, 3, seed=seed), timestep) for timestep, tokens, seed in drawn]


@given(run, run)
@settings(deadline=None, max_examples=50)
def test_merge_is_commutative(first, second):
    a, b = recorded(calls_of(first), seed=1), recorded(calls_of(second), seed=2)
    assert_same(merged(a, b), merged(b, a))


@given(run, run, run)
@settings(deadline=None, max_examples=50)
def test_merge_is_associative(first, second, third):
    a, b, c = (recorded(calls_of(drawn), seed=i) for i, drawn in enumerate((first, second, third)))
    assert_same(merged(merged(a, b), c), merged(a, merged(b, c)))


@given(run, run)
@settings(deadline=None, max_examples=50)
def test_merged_runs_are_one_run(first, second):
    together = recorded(calls_of(first + second))
    parts = merged(recorded(calls_of(first), seed=1), recorded(calls_of(second), seed=2))
    assert_same_exact_part(parts, together)
    sizes = [len(rows) for rows in together.rows_by_timestep]
    assert [len(rows) for rows in parts.rows_by_timestep] == sizes == together.count.clamp(max=4).tolist()


@given(run, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50)
def test_order_does_not_matter(drawn, random):
    calls = calls_of(drawn)
    shuffled = random.sample(calls, len(calls))
    assert_same_exact_part(recorded(calls), recorded(shuffled))
    runs = [recorded([call], seed=i) for i, call in enumerate(calls)]
    assert_same(merged(*runs), merged(*random.sample(runs, len(runs))))


def test_merge_leaves_the_other_run_alone_and_both_can_go_on():
    a, b = recorded([(values(1, 9, 3), 1)], seed=1), recorded([(values(1, 9, 3, seed=1), 2)], seed=2)
    before = copy.deepcopy(b)
    a.merge(b)
    a.record(values(1, 9, 3, seed=2) * 9, torch.tensor(2))
    assert_same(b, before)
    assert a.count.tolist() == [9, 18]
    assert a.seeds == {1, 2}


def test_runs_of_one_seed_merge_only_where_no_timestep_is_shared():
    a, b, c = (recorded([(values(1, 9, 3, seed=t), t)]) for t in (1, 2, 1))
    a.merge(b)
    assert a.timesteps.tolist() == [1, 2]
    with pytest.raises(ConfigurationError, match=r"'layer'.*seed 0.*own seed"):
        a.merge(c)


def test_runs_that_do_not_fit_do_not_merge():
    a = recorded([(values(1, 9, 3), 1)])
    with pytest.raises(ConfigurationError, match="keeps 4 rows per timestep, the other 5"):
        a.merge(recorded([(values(1, 9, 3), 1)], seed=1, num_rows=5))
    with pytest.raises(CalibrationError, match="3 channels, the other 2"):
        a.merge(recorded([(values(1, 9, 2), 1)], seed=1))
    with pytest.raises(CalibrationError, match=r"'elsewhere'.*'layer'"):
        a.merge(ChannelStatistics("elsewhere", num_rows=4))


# All values of a model


def a_run(seed=0, shift=0):
    statistics = Statistics(num_rows=3, seed=seed)
    for i in range(6):
        statistics.record("blocks.0.to_q", values(2, 8, 4, seed=i + shift), torch.tensor(i % 3))
        statistics.record("blocks.0.norm", values(2, 5, seed=i + shift), torch.tensor([i % 3, 100]))
    return statistics


def test_statistics_are_a_mapping():
    statistics = a_run()
    assert sorted(statistics) == ["blocks.0.norm", "blocks.0.to_q"]
    assert len(statistics) == 2
    assert "blocks.0.to_q" in statistics
    assert "blocks.1.to_q" not in statistics
    assert statistics.get("blocks.1.to_q") is None
    assert statistics["blocks.0.to_q"].channels == 4
    assert statistics.timesteps.tolist() == [0, 1, 2, 100]
    assert statistics.nbytes == sum(one.nbytes for one in statistics.values())


def test_unreached_layer():
    with pytest.raises(CalibrationError, match=r"^calibration never reached layer 'blocks.1.to_q'.*Calibrate with"):
        a_run()["blocks.1.to_q"]


def test_failed_first_call_leaves_the_layer_unreached():
    statistics = Statistics()
    with pytest.raises(NonFiniteError):
        statistics.record("layer", torch.full((1, 2, 3), torch.nan), torch.tensor(1))
    assert "layer" not in statistics


def test_statistics_merge_key_by_key():
    a, b = a_run(), a_run(seed=1, shift=50)
    b.record("only there", values(1, 4, 2), torch.tensor(1))
    a.merge(b)
    assert sorted(a) == ["blocks.0.norm", "blocks.0.to_q", "only there"]
    assert a["blocks.0.to_q"].count.tolist() == [64, 64, 64]
    a.record("only there", values(1, 4, 2), torch.tensor(1))
    assert b["only there"].count.tolist() == [4]


def test_failed_merge_changes_nothing():
    a, b = Statistics(), Statistics(seed=1)
    a.record("one", values(1, 4, 2), torch.tensor(1))
    a.record("two", values(1, 4, 2), torch.tensor(1))
    b.record("one", values(1, 4, 2), torch.tensor(1))
    b.record("two", values(1, 4, 3), torch.tensor(1))
    with pytest.raises(CalibrationError, match="'two'"):
        a.merge(b)
    assert a["one"].count.tolist() == [4]


# Storage


def test_loaded_statistics_are_the_saved_ones_and_go_on(tmp_path):
    statistics = a_run()
    statistics.record("few rows", values(1, 2), torch.tensor(0.25))
    statistics.save(tmp_path / "run.safetensors")
    loaded = Statistics.load(tmp_path / "run.safetensors")
    assert (loaded.num_rows, loaded.seed) == (3, 0)
    assert set(loaded) == set(statistics)
    more = values(2, 8, 4, seed=9) * 3
    for one in (statistics, loaded):
        one.record("blocks.0.to_q", more, torch.tensor(1))
        one.record("few rows", values(5, 2, seed=1), torch.tensor(0.25))
        one.merge(a_run(seed=5, shift=50))
    for key in statistics:
        assert_same(loaded[key], statistics[key])
        assert loaded[key].seeds == statistics[key].seeds


def test_nothing_recorded_can_be_saved(tmp_path):
    Statistics(seed=3).save(tmp_path / "empty.safetensors")
    loaded = Statistics.load(tmp_path / "empty.safetensors")
    assert len(loaded) == 0
    assert loaded.seed == 3
    assert loaded.timesteps.shape == (0,)


def test_views_of_nothing_are_empty():
    nothing = ChannelStatistics("layer")
    assert nothing.timesteps.shape == nothing.count.shape == (0,)
    assert nothing.minimum.shape == nothing.absmax.shape == nothing.rows().shape == (0, 0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "holds no fxquant statistics"),
        ({"fxquant-statistics": '{"version": 3}'}, "Upgrade fxquant"),
        ({"fxquant-statistics": "{"}, "cannot read"),
        ({"fxquant-statistics": "[]"}, "cannot read"),
        ({"fxquant-statistics": '{"version": 1, "num_rows": 0, "seed": 0, "keys": {}}'}, "cannot read"),
        ({"fxquant-statistics": '{"version": 1, "num_rows": 3, "seed": 0, "keys": {"gone": [0]}}'}, "cannot read"),
    ],
)
def test_file_of_another_kind(tmp_path, metadata, message):
    save_file({"x": torch.zeros(1)}, tmp_path / "file", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        Statistics.load(tmp_path / "file")


def test_missing_damaged_or_inconsistent_file(tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(CheckpointError, match=r"run\.safetensors"):
        Statistics.load(path)
    a_run().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"run\.safetensors"):
        Statistics.load(path)
    path.write_bytes(whole.replace(b'\\"num_rows\\": 3', b'\\"num_rows\\": 4'))
    with pytest.raises(CheckpointError, match="rows is"):
        Statistics.load(path)


# Cost


def held_bytes(statistics):
    return sum(
        tensor.untyped_storage().nbytes()
        for one in statistics.values()
        for entry in one._entries.values()
        for tensor in (entry.minimum, entry.maximum, entry.rows, torch.from_numpy(entry.priorities))
    )


def test_dit_xl_at_50_timesteps_stays_below_a_gigabyte():
    # Inputs of q/k/v, output projection, first and second feed-forward linear, and of the adaLN linear.
    widths = [1152, 1152, 1152, 4608, 1152]
    statistics = Statistics()
    for timestep in range(3):
        for i, width in enumerate(widths):
            statistics.record(f"{i}", torch.zeros(1, 9, width), torch.tensor(timestep))
    numbers = 2 * 8 * 3 * len(widths)  # each entry's timestep and count
    assert statistics.nbytes == held_bytes(statistics) + numbers
    assert statistics.nbytes == 3 * sum((4 * width + 8) * (rows_to_sample(width) + 2) for width in widths)
    whole = statistics.nbytes * 28 * 50 // 3
    assert whole == pytest.approx(0.67e9, rel=0.01)


def test_memory_does_not_grow_with_the_data():
    statistics = a_run()
    before = held_bytes(statistics)
    for i in range(5):
        statistics.record("blocks.0.to_q", values(4, 30, 4, seed=i), torch.tensor(i % 3))
    assert held_bytes(statistics) == before
