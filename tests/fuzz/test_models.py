"""Models with several kinds of call, compiled from one plan, in both orders, compared with the model in float64.

``FXQUANT_FUZZ=20000`` requests one model per 100 graphs; ``make fuzz`` sets it.
"""

from __future__ import annotations

import os
import secrets
from random import Random

import pytest

from fxquant.testing.random_models import BATCH, TOKENS, Choices, RandomTransformer, filled, kinds
from tests.fuzz.models import computed, run
from tests.fuzz.proof import SenselessError

ASKED = int(os.environ.get("FXQUANT_FUZZ", "0"))
SHARD = 25
"""Models per test. Each model is captured and compiled twice, which takes ten times as long as a graph."""

ALWAYS = (4,)
"""Seeds of the models that ``make test`` tries."""

LARGER = (0,)
"""Seeds of models that take longer."""

REFUSED = (685542644,)
"""Seeds of models with a kind of call that is refused, because it needs another form of a tensor that is stored."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [*ALWAYS, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (*LARGER, *REFUSED))]
)
def test_every_kind_of_call_computes_what_the_model_computes(seed: int) -> None:
    try:
        run(seed)
    except SenselessError as reason:
        pytest.fail(f"choose another seed: {reason}")


def test_every_model_that_is_drawn_runs() -> None:
    """A model that fails to run would be counted as one that allows no comparison."""
    for seed in range(100):
        r = Random(seed)
        model = RandomTransformer(Choices(r), seed)
        for kind in kinds(r):
            assert computed(model, filled(kind, 500.0, 0)).shape == (BATCH, TOKENS, 4)


@pytest.mark.parametrize("shard", range(ASKED // 100 // SHARD))
def test_many_models(shard: int) -> None:
    compared = 0
    for _ in range(SHARD):
        seed = secrets.randbits(32)
        try:
            run(seed)
            compared += 1
        except SenselessError:
            continue
        except Exception as error:
            error.add_note(f"python -c 'from tests.fuzz.models import run; run({seed})'")
            raise
    assert compared > SHARD / 2
