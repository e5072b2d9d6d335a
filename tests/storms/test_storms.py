"""Kills, interrupts and races a few saves; ``make storm`` runs many."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from fxquant.storage import checkpoint
from tests.storms.__main__ import storm


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # About forks with threads; forked processes run nothing of torch but copies.
def test_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each model is traced again once, not at every save: most of a save is then the writing, and is killed there.
    monkeypatch.setattr(checkpoint, "why_not_rebuilt", functools.cache(checkpoint.why_not_rebuilt))
    lines = storm(kills=16, races=8, folder=tmp_path)
    assert len(lines) == 12
    assert all(line.endswith("; 0 lost") for line in lines), lines
