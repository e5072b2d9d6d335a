"""Ten evaluations that are killed; ``make chaos`` kills more."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.storms.evaluations import storm


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # About forks with threads; torch has one thread here.
def test_killed_evaluations_end_with_the_same_images_and_figures(tmp_path: Path) -> None:
    random.seed(0)
    outcome = storm(10, tmp_path)
    assert not outcome.wrong, "\n".join(outcome.lines())
    assert outcome.kills >= 10 and outcome.lost <= 1
