"""Statistics that are kept while they are recorded come back with the same bits, and go on from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fxquant.disk.finished_work import FinishedWork, working_in
from fxquant.errors import ResumeWarning
from fxquant.statistics.collection import Statistics
from fxquant.statistics.keeping import KeptStatistics

FROM = {"model": "a"}
STEPS = (700.0, 20.0, 700.0, 300.0)


@pytest.fixture
def work(tmp_path: Path) -> Iterator[FinishedWork]:
    with working_in(tmp_path / "work") as opened:
        assert opened is not None
        yield opened


def new() -> Statistics:
    statistics = Statistics(num_rows=5)
    statistics.wants_moments = lambda key: key != "c"
    return statistics


def record(statistics: Statistics, number: int) -> None:
    """One call: the last one is so large that second moments become float64. Those of ``d`` are rows until then."""
    generator = torch.Generator().manual_seed(number)
    scale = 2.0**45 if number == 3 else 1.0
    for key, channels in (("b", 6), ("a", 4), ("c", 6)):
        x = scale * torch.randn(3, 7, channels, generator=generator)
        statistics.record(key, x, torch.tensor(STEPS[number]))
    statistics.record("d", scale * torch.randn(3, 2, 40, generator=generator), torch.tensor(STEPS[number]))


def file_of(statistics: Statistics, folder: Path) -> bytes:
    statistics.save(folder / "statistics")
    return (folder / "statistics").read_bytes()


@pytest.mark.parametrize("interrupted", range(1, 5))
def test_recording_goes_on_with_the_same_bits(interrupted: int, work: FinishedWork, tmp_path: Path) -> None:
    whole, first, resumed = new(), new(), new()
    for number in range(4):
        record(whole, number)
    kept = KeptStatistics(work)
    for number in range(interrupted):
        record(first, number)
        index = kept.save(first, FROM)
    again = KeptStatistics(work)
    assert again.load(index, resumed, FROM)
    for number in range(interrupted, 4):
        record(resumed, number)
        index = again.save(resumed, FROM)
    assert list(resumed) == list(whole)
    assert file_of(resumed, tmp_path) == file_of(whole, tmp_path)
    for key in ("a", "b", "d"):
        found, expected = resumed[key].moments, whole[key].moments
        assert found is not None and expected is not None
        assert list(found.sums) == list(expected.sums)  # Products over timesteps depend on their order.
        assert torch.equal(found.matrix, expected.matrix)
    last = new()
    assert KeptStatistics(work).load(index, last, FROM)
    assert file_of(last, tmp_path) == file_of(whole, tmp_path)


@pytest.mark.parametrize("device", ["meta", "nowhere", None])
def test_moments_on_a_device_without_values_are_damaged(device: str | None, work: FinishedWork) -> None:
    statistics, kept = new(), KeptStatistics(work)
    record(statistics, 0)
    index = kept.save(statistics, FROM)
    moments = statistics["d"].moments
    assert moments is not None and moments.rows_held == 6
    work.save(next(name for key, name, _ in index["moments"] if key == "d"), FROM, dict(moments.tensors()), device)
    with pytest.warns(ResumeWarning, match="damaged"):
        assert not KeptStatistics(work).load(index, new(), FROM)


def test_only_what_changed_is_written(work: FinishedWork) -> None:
    statistics, kept = new(), KeptStatistics(work)
    record(statistics, 0)
    first = kept.save(statistics, FROM)
    assert kept.save(statistics, FROM) == first
    record(statistics, 1)  # At another timestep.
    second = kept.save(statistics, FROM)
    assert set(kept.files(first)) & set(kept.files(second)) == {first["rows"][0][1]}
    assert all(work.load(name, FROM) for name in (*kept.files(first), *kept.files(second)))
    kept.remove_replaced(first, second)
    assert {path.stem for path in work.folder.iterdir()} == set(kept.files(second))


def test_nothing_changes_if_a_file_is_damaged(work: FinishedWork, tmp_path: Path) -> None:
    statistics, kept, other = new(), KeptStatistics(work), new()
    record(statistics, 0)
    index = kept.save(statistics, FROM)
    record(other, 1)
    before = file_of(other, tmp_path)
    path = work.path(kept.files(index)[-1])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(ResumeWarning, match="is damaged"):
        assert not KeptStatistics(work).load(index, other, FROM)
    assert file_of(other, tmp_path) == before


def test_the_digest_tells_options_and_content_apart() -> None:
    recorded, other = new(), new()
    record(recorded, 0)
    record(other, 1)
    every = [new(), Statistics(num_rows=6), Statistics(num_rows=5, seed=1), Statistics(num_rows=5, keep_calls=1)]
    digests = [KeptStatistics.digest(statistics) for statistics in (*every, recorded, other)]
    assert len(set(digests)) == len(digests)
    assert digests[0] == KeptStatistics.digest(new())


@pytest.mark.parametrize("kind", ["rows", "moments"])
def test_files_of_another_moment_are_not_put_together(kind: str, work: FinishedWork) -> None:
    """As if some files of a folder were copied back from an older copy: each is whole, and made from the same."""
    statistics, kept = new(), KeptStatistics(work)
    record(statistics, 0)
    older = kept.save(statistics, FROM)
    record(statistics, 2)  # At the same timestep.
    newer = kept.save(statistics, FROM)
    work.path(older[kind][0][1]).replace(work.path(newer[kind][0][1]))
    untouched = new()
    with pytest.warns(ResumeWarning, match="holds other calls than the files next to it"):
        assert not KeptStatistics(work).load(newer, untouched, FROM)
    assert not list(untouched)


@pytest.mark.parametrize("kind", ["keys", "rows", "moments"])
def test_an_index_that_lists_something_twice_is_refused(kind: str, work: FinishedWork) -> None:
    """A long list of one file would be read as often as it is listed."""
    statistics = new()
    record(statistics, 0)
    index = KeptStatistics(work).save(statistics, FROM)
    KeptStatistics.check(index)
    index[kind].append(index[kind][0])
    with pytest.raises(ValueError, match="twice"):
        KeptStatistics.check(index)


@pytest.mark.parametrize("what", ["a width", "a key"])
def test_a_part_that_lists_statistics_twice_is_damaged(what: str, work: FinishedWork) -> None:
    statistics = new()
    record(statistics, 0)
    index = KeptStatistics(work).save(statistics, FROM)
    name = index["rows"][0][1]
    part = work.load(name, FROM)
    assert part is not None
    groups = part.data if what == "a width" else part.data[0][1]
    groups.extend(50_000 * [groups[0]])
    work.save(name, FROM, part.tensors, part.data)
    with pytest.warns(ResumeWarning, match="lists the same statistics twice"):
        assert not KeptStatistics(work).load(index, new(), FROM)
