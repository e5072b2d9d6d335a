"""Which precision each layer gets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fxquant.allocation.problem import Problem
from fxquant.errors import ConfigurationError

OPTIONS = ("w2", "w4", "w8")
COSTS = np.array([2.0, 4.0, 8.0])


def problem(layers: int = 5, timesteps: int = 1, seed: int = 0) -> Problem:
    """Errors fall by 12 dB per 2 bits, from a random level for each layer and timestep."""
    level = np.exp(np.random.default_rng(seed).normal(0, 2, (layers, timesteps)))
    drop = np.array([1.0, 1 / 16, 1 / 4096])[:, None]
    names = [f"layer{number}" for number in range(layers)]
    errors = {name: drop * level[number] for number, name in enumerate(names)}
    return Problem(dict.fromkeys(names, OPTIONS), errors, dict.fromkeys(names, COSTS), fixed=3.0)


def every_choice(given: Problem) -> list[dict[str, str]]:
    return [dict(zip(given.options, found, strict=True)) for found in itertools.product(*given.options.values())]


@pytest.mark.parametrize("limit", [13.0, 20.0, 27.0, 43.0])
def test_one_timestep_is_solved_exactly(limit: float) -> None:
    given = problem()
    allowed = [one for one in every_choice(given) if given.cost(one) <= limit]
    found = given.best(limit)
    assert found is not None and given.cost(found) <= limit
    assert given.mean_db(found) == pytest.approx(max(map(given.mean_db, allowed)), abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_many_timesteps_come_close_to_the_best_mean(seed: int) -> None:
    """Five layers whose errors differ by factors of 50 from step to step are the hard case; many layers average."""
    given = problem(timesteps=6, seed=seed)
    allowed = [one for one in every_choice(given) if given.cost(one) <= 27]
    found = given.best(27)
    assert found is not None
    best, summed = max(map(given.mean_db, allowed)), min(allowed, key=lambda one: float(given.error(one).sum()))
    assert best - 0.8 < given.mean_db(found) <= best + 1e-9
    assert given.mean_db(found) >= given.mean_db(summed) - 1e-9  # Which the worst timestep decides.


def test_without_a_limit_every_layer_gets_the_most() -> None:
    given = problem()
    assert given.best() == dict.fromkeys(given.options, "w8")
    assert given.cheapest() == dict.fromkeys(given.options, "w2")
    assert given.cost(given.cheapest()) == 3 + 5 * 2


def test_a_limit_below_the_smallest_has_no_solution() -> None:
    assert problem().best(12.9) is None


def test_layers_that_read_the_same_value_agree() -> None:
    options = ("w4a4", "w4a8", "w8a8")
    errors = {"q": np.array([[1.0], [0.1], [0.01]]), "k": np.array([[1e-6], [1e-7], [1e-8]])}
    costs = {name: np.array([1.0, 2.0, 4.0]) for name in errors}
    tie = {name: ["4", "8", "8"] for name in errors}
    free = Problem(dict.fromkeys(errors, options), errors, costs, 0.0)
    tied = Problem(dict.fromkeys(errors, options), errors, costs, 0.0, [tie])
    assert free.best(5.0) == {"q": "w8a8", "k": "w4a4"}
    assert tied.best(5.0) == {"q": "w4a8", "k": "w4a8"}
    assert tied.best(6.0) == {"q": "w8a8", "k": "w4a8"}


def test_ties_that_cannot_be_met() -> None:
    errors = {"q": np.array([[1.0]]), "k": np.array([[1.0]])}
    costs = {name: np.array([1.0]) for name in errors}
    given = Problem({"q": ("w4a4",), "k": ("w4a8",)}, errors, costs, 0.0, [{"q": ["4"], "k": ["8"]}])
    with pytest.raises(ConfigurationError, match="no activation precision in common"):
        given.cheapest()


def test_the_same_problem_has_the_same_solution() -> None:
    given = problem(layers=40, timesteps=5)
    assert given.best(200.0) == problem(layers=40, timesteps=5).best(200.0)


def test_options_with_infinite_errors_are_not_chosen() -> None:
    """As in a model whose output overflows in float16 with few bits in one layer."""
    given = problem(timesteps=2)
    given.errors["layer2"][:2, 1] = np.inf
    assert given.cheapest() == {**dict.fromkeys(given.options, "w2"), "layer2": "w8"}
    found = given.best(3 + 8 + 4 * 4)
    assert found is not None and found["layer2"] == "w8" and given.cost(found) <= 3 + 8 + 4 * 4
    assert given.best(3 + 7 + 4 * 2) is None
