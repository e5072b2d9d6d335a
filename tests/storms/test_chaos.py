"""Kills a few commands and repeats them; ``make chaos`` kills many."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.storms.chaos import RECIPES, chaos


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # About forks with threads; torch has one thread here.
def test_killed_commands_end_as_others_do(tmp_path: Path) -> None:
    random.seed(0)
    outcome = chaos(kills=10, folder=tmp_path, recipes=RECIPES[::2], layers=1)
    assert outcome.kills >= 10
    assert not outcome.wrong, outcome.lines()
