"""Which calls statistics keep."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from fxquant.errors import CalibrationError, CheckpointError, ConfigurationError
from fxquant.statistics.collection import Statistics
from fxquant.statistics.kept_calls import KeptCalls, Run

KIND = {"names": ["x"], "leaves": [{"shape": ["batch", 2], "dtype": "float32"}], "structure": {"dict": {"x": 0}}}


def kept(most: int, steps: list[float], seed: int = 0) -> KeptCalls:
    calls = KeptCalls(most, seed)
    kind = calls.kind(KIND)
    for number, step in enumerate(steps):
        priority = calls.wants(kind, step)
        if priority is not None:
            calls.keep(kind, step, priority, [torch.full((1, 2), float(number))])
    return calls


@pytest.mark.parametrize("timesteps", [3, 8, 16])
def test_timesteps_are_covered_evenly(timesteps: int) -> None:
    """Also where a stride of two would always meet the same steps of the sampler."""
    calls = kept(16, [float(step) for _ in range(20) for step in range(timesteps)])
    assert len(calls) == 16
    counts = Counter(call.timestep for call in calls)
    assert len(counts) == timesteps
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_calls_of_a_timestep_are_spread_over_the_run() -> None:
    numbers = [call.number for call in kept(8, [5.0] * 400)]
    assert numbers == sorted(numbers)
    assert min(numbers) < 150 and max(numbers) > 250


def test_the_seed_decides() -> None:
    steps = [float(step % 5) for step in range(100)]
    assert [call.number for call in kept(6, steps)] == [call.number for call in kept(6, steps)]
    assert [call.number for call in kept(6, steps)] != [call.number for call in kept(6, steps, seed=1)]


def test_more_timesteps_than_calls() -> None:
    assert len({call.timestep for call in kept(8, [float(step) for step in range(50)])}) == 8


def test_none_are_kept_by_default() -> None:
    calls = kept(0, [1.0, 2.0])
    assert not len(calls) and calls.kinds == [KIND]


def test_equal_inputs_are_held_once() -> None:
    calls, prompt = KeptCalls(4), torch.ones(1, 1000)
    for step in (3.0, 2.0, 1.0):
        priority = calls.wants(0, step)
        assert priority is not None
        calls.keep(0, step, priority, [torch.full((1, 2), step), prompt.clone()])
    assert len({id(call.inputs[1]) for call in calls}) == 1
    assert calls.nbytes == prompt.nbytes + 3 * 8
    prompt.zero_()
    assert all(call.inputs[1].all() for call in calls), "the caller's tensor was kept, not a copy"


def test_merge() -> None:
    first, second = kept(6, [1.0, 2.0, 3.0]), kept(6, [4.0, 5.0, 6.0, 7.0, 8.0, 9.0], seed=1)
    first.merge(second)
    assert len(first) == 6
    assert first.kinds == [KIND]
    assert len(second) == 6


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not a number of calls"):
        Statistics(keep_calls=-1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Run("m:Other", "a", "timestep"), "are of a m:Model"),
        (Run("m:Model", "b", "timestep"), "other weights or another dtype"),
        (Run("m:Model", "a", "t"), "timestep='timestep'"),
    ],
)
def test_statistics_of_another_model(other: Run, message: str) -> None:
    own = Run("m:Model", "a", "timestep")
    own.check_same(own, "this model")
    with pytest.raises(CalibrationError, match=message):
        own.check_same(other, "this model")
    first, second = Statistics(seed=1), Statistics(seed=2)
    first.run, second.run = own, other
    with pytest.raises(CalibrationError, match=message):
        first.merge(second)


def record(calls: KeptCalls, steps: list[float]) -> None:
    kind = calls.kind(KIND)
    for step in steps:
        number = calls.seen
        priority = calls.wants(kind, step)
        if priority is not None:
            calls.keep(kind, step, priority, [torch.full((1, 2), float(number))])


@pytest.mark.parametrize("first", [1, 7, 40, 93])
def test_recording_goes_on_after_loading_as_if_it_had_not_stopped(tmp_path: Path, first: int) -> None:
    steps = [float(step % 3) for step in range(120)]
    whole, part = Statistics(keep_calls=4), Statistics(keep_calls=4)
    record(whole.calls, steps)
    record(part.calls, steps[:first])
    part.save(tmp_path / "part.safetensors")
    loaded = Statistics.load(tmp_path / "part.safetensors")
    assert loaded.calls.seen == first
    record(loaded.calls, steps[first:])
    assert [(call.number, call.priority) for call in loaded.calls] == [(c.number, c.priority) for c in whole.calls]
    assert all(torch.equal(a.inputs[0], b.inputs[0]) for a, b in zip(loaded.calls, whole.calls, strict=True))


def test_calls_that_came_while_none_were_kept_are_counted_in_the_file(tmp_path: Path) -> None:
    whole, part = Statistics(), Statistics()
    for statistics in (whole, part):
        record(statistics.calls, [1.0] * 10)
    part.save(tmp_path / "part.safetensors")
    loaded = Statistics.load(tmp_path / "part.safetensors")
    for statistics in (whole, loaded):
        statistics.calls.most = 3
        record(statistics.calls, [1.0] * 30)
    assert [call.number for call in loaded.calls] == [call.number for call in whole.calls]
    assert min(call.number for call in loaded.calls) >= 10


def test_a_file_that_counts_fewer_calls_than_it_holds(tmp_path: Path) -> None:
    statistics = Statistics(keep_calls=4)
    record(statistics.calls, [1.0] * 10)
    statistics.calls.restore(list(statistics.calls), seen=2)
    with pytest.raises(CheckpointError, match="is not among the 2 calls that came"):
        statistics.save(tmp_path / "damaged.safetensors")


def test_a_file_of_an_earlier_version_goes_on_after_its_last_kept_call() -> None:
    calls = kept(4, [1.0] * 10)
    again = KeptCalls(4)
    again.restore(list(calls))
    assert again.seen == 1 + max(call.number for call in calls)
