"""Several ranks quantize one model: the same result on all of them, and that of one process from equal statistics."""

from __future__ import annotations

import pytest
import torch

import fxquant
from fxquant.errors import CalibrationError, NotCalledError, RankError, RanksDifferError
from tests.distributed import work
from tests.distributed.ranks import run_ranks
from tests.tiny import make_dit

CALLS = [{"timestep": step, "seed": seed} for seed in range(4) for step in (900.0, 500.0, 20.0)]
SMALL = [{**call, "size": 4} for call in CALLS[:3]]
GPTQ = "ptq4dit-gptq-w4a8"
FLUX = fxquant.make_recipe("svdquant-gptq-w4a8").with_options("split-low-rank", rank=2)
RECIPES = ["rtn-w8a8", GPTQ, "ptq4dit-reconstruct-w4a8"]
KINDS = {
    "other order": [[*CALLS[:2], *SMALL], [*SMALL, *CALLS[2:4]]],
    "other kinds": [CALLS[:3], SMALL],
    "none on rank 0": [[], [*SMALL, *CALLS[:2]]],
}


def made(name):
    recipe = fxquant.make_recipe(name)
    return recipe.with_options("reconstruct-blocks", iterations=20, batch=8) if "reconstruct" in name else recipe


def shares(size, calls=CALLS):
    return [calls[len(calls) * rank // size : len(calls) * (rank + 1) // size] for rank in range(size)]


def results(size, folder, wanted):
    """The results of all ranks, by the names of the jobs."""
    for name in wanted:
        (folder / name).mkdir()
    jobs = [(function, *arguments(folder / name)) for name, (function, arguments) in wanted.items()]
    ranks = run_ranks(work.jobs, size, jobs)
    for found in ranks:
        if isinstance(found, Exception):
            raise found
    return {name: [found[number] for found in ranks] for number, name in enumerate(wanted)}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two ranks make, by the names of the jobs, and the folder of their statistics."""
    folder = tmp_path_factory.mktemp("two")

    def quantize(recipe, parts, **options):
        return work.quantize, lambda folder: (folder, recipe, parts, options)

    wanted = {
        **{name: quantize(made(name), shares(2), measure=0) for name in RECIPES},
        **{name: quantize(GPTQ, parts, measure=0) for name, parts in KINDS.items()},
        "not called": quantize("rtn-w8a8", [[], []]),
        "failed": quantize("rtn-w8a8", [CALLS[:2], [{"timestep": 500.0, "batch": 0}]]),
        "flux": (work.flux, lambda folder: (folder, FLUX)),
        "experts": (work.experts, lambda folder: ()),
        "twice": (work.twice, lambda folder: (folder, CALLS)),
        "other weights": (work.quantize_other, lambda folder: (CALLS[:1],)),
        "other recipe": (work.quantize_recipes, lambda folder: (["rtn-w8a8", "rtn-w4a8"], CALLS[:1])),
        "resumed": (work.resumed, lambda folder: (folder, GPTQ, shares(2))),
        "failed step": (work.quantize_until, lambda folder: (made(RECIPES[-1]), shares(2), 3)),
        "broken": (work.quantize_broken, lambda folder: (CALLS[:2],)),
    }
    return results(2, folder, wanted), folder


def assert_same(found, expected):
    assert not isinstance(found, Exception), found
    assert not isinstance(expected, Exception), expected
    assert found["plan"] == expected["plan"]
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in found["tensors"].items():
        assert tensor.dtype == expected["tensors"][name].dtype
        assert torch.equal(tensor, expected["tensors"][name]), name


def loaded(folder, size):
    """The statistics that all ranks saved, with the same bytes."""
    first = (folder / "0.statistics").read_bytes()
    assert all((folder / f"{rank}.statistics").read_bytes() == first for rank in range(1, size))
    return fxquant.Statistics.load(folder / "0.statistics")


def assert_of_one_process(found, calls, recipe):
    alone = fxquant.Statistics(keep_calls=32)
    one = work.compiled(make_dit(2), recipe, calls, statistics=alone)
    assert list(found) == list(alone)
    assert found.calls.kinds == alone.calls.kinds
    assert found.calls.seen == alone.calls.seen
    assert found.seed == alone.seed
    for key, channels in alone.items():
        for part in ("timesteps", "minimum", "maximum", "count"):
            assert torch.equal(getattr(found[key], part), getattr(channels, part)), (key, part)
        assert [len(rows) for rows in found[key].rows_by_timestep] == [len(rows) for rows in channels.rows_by_timestep]
        if channels.moments is not None:
            expected = channels.moments.matrix
            torch.testing.assert_close(found[key].moments.matrix, expected, rtol=1e-5, atol=1e-5 * expected.max())
            assert found[key].moments.counts == channels.moments.counts
    kept, all_calls = list(found.calls), list(alone.calls)
    assert len(kept) == len(all_calls) == len(calls)
    for call, other in zip(kept, all_calls, strict=True):
        assert call.timestep == other.timestep
        assert all(map(torch.equal, call.inputs, other.inputs))
    return one


@pytest.mark.slow
def test_statistics_are_those_of_one_process(two):
    assert_of_one_process(loaded(two[1] / GPTQ, 2), CALLS, GPTQ)


@pytest.mark.slow
def test_four_ranks(tmp_path):
    wanted = {"four": (work.quantize, lambda folder: (folder, GPTQ, shares(4), {"measure": 5}))}
    first, *others = results(4, tmp_path, wanted)["four"]
    for other in others:
        assert_same(other, first)
    one = assert_of_one_process(loaded(tmp_path / "four", 4), CALLS, GPTQ)
    measured = dict(first["plan"]["output_sqnr_db"])
    assert len(measured) > 1
    for step, db in one.plan.to_json()["output_sqnr_db"]:
        assert abs(measured[step] - db) < 3  # Rows were sampled by other random numbers.


@pytest.mark.parametrize("recipe", RECIPES[:-1])
def test_ranks_end_with_what_one_process_makes_of_the_statistics(recipe, two):
    first, second = two[0][recipe]
    assert_same(second, first)
    alone = work.compiled_from(make_dit(2), made(recipe), loaded(two[1] / recipe, 2), measure=0)
    assert_same(first, work.facts(alone))


def test_blocks_are_learned_together(two):
    """Ranks add up gradients of their samples, so all learn the same, and what one process learns up to rounding."""
    recipe = RECIPES[-1]
    first, second = two[0][recipe]
    assert_same(second, first)
    alone = work.facts(work.compiled_from(make_dit(2), made(recipe), loaded(two[1] / recipe, 2), measure=0))
    assert first["gradients"] > 20
    found, expected = first["plan"].pop("reconstruction"), alone["plan"].pop("reconstruction")
    for name, errors in expected.items():
        assert found[name] == pytest.approx(errors, abs=0.05), name
    different = total = 0
    for name, tensor in alone["tensors"].items():
        if tensor.dtype == torch.uint8:
            different += int((first["tensors"][name] != tensor).sum())
            total += tensor.numel()
    assert different <= total / 100


def test_failed_step(two):
    """A rank that fails in a step ends the others, which wait for its gradients."""
    found = two[0]["failed step"]
    assert sum(isinstance(error, RankError) for error in found) == 1
    assert all("no more memory" in str(error) for error in found)


@pytest.mark.slow
def test_flux(two):
    first, second = two[0]["flux"]
    assert_same(second, first)
    assert first["fitted"] and second["fitted"]  # Each rank fits branches of its own.
    assert not {*first["fitted"]} & {*second["fitted"]}
    statistics = loaded(two[1] / "flux", 2)
    assert statistics.calls.seen == 4
    alone = work.compiled_from(work.flux_pipe().transformer, FLUX, statistics, measure=0)
    assert_same(first, work.facts(alone))


def test_two_models_in_one_calibration(two):
    first, second = two[0]["experts"]
    assert list(first) == list(second) == ["transformer", "transformer_2"]
    for name in first:
        assert_same(second[name], first[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_call_are_numbered_alike(name, two):
    """Ranks make calls of other kinds, or in another order."""
    first, second = two[0][name]
    assert_same(second, first)
    statistics = loaded(two[1] / name, 2)
    alone = work.compiled_from(make_dit(2), GPTQ, statistics, measure=0)
    assert_same(first, work.facts(alone))
    calls = [call for part in KINDS[name] for call in part]
    in_order = assert_of_one_process(statistics, calls, GPTQ)
    assert [str(call) for call in in_order.plan.calls] == [str(call) for call in alone.plan.calls]


def test_statistics_go_on(two):
    """Statistics that hold data already receive that of the ranks."""
    assert two[0]["twice"] == [None, None]
    found, alone = loaded(two[1] / "twice", 2), fxquant.Statistics()
    work.compiled(make_dit(2), "rtn-w8a8", [*CALLS, *CALLS], statistics=alone)
    for key, channels in alone.items():
        assert torch.equal(found[key].maximum, channels.maximum)
        assert torch.equal(found[key].count, channels.count)


def test_no_rank_calls_the_model(two):
    for error in two[0]["not called"]:
        assert isinstance(error, NotCalledError)


@pytest.mark.parametrize(
    ("name", "difference"), [("other weights", "digest of the weights"), ("other recipe", "recipe")]
)
def test_ranks_differ(name, difference, two):
    for error in two[0][name]:
        assert isinstance(error, RanksDifferError)
        assert f"rank 1 has another {difference} than rank 0" in str(error)


def test_failed_calibration(two):
    first, second = two[0]["failed"]
    assert isinstance(second, CalibrationError)
    assert isinstance(first, RankError)
    assert first.rank == 1
    assert str(second) in str(first)


def test_failed_rounding(two):
    found = two[0]["broken"]
    assert sum(isinstance(error, RankError) for error in found) == 1
    assert all("layer transformer_blocks.1.ff.net.2: cannot be factorized" in str(error) for error in found)


def test_ranks_continue_from_what_each_has_finished(two):
    ranks = two[0]["resumed"]
    for found in ranks:
        assert not isinstance(found, Exception), found
        assert_same(found["again"], found["whole"])
        assert found["calls"] == len(CALLS) // 2
        assert len(found["layers"]) == len(set(found["layers"])) > 2
    assert not set(ranks[0]["layers"]) & set(ranks[1]["layers"])
