"""Kills, interrupts and races a few saves; ``make storm`` runs many."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.storms.__main__ import storm


@pytest.mark.filterwarnings("ignore")  # About forks with threads; forked processes run nothing of torch but copies.
def test_nothing_is_lost(tmp_path: Path) -> None:
    lines = storm(kills=16, races=8, folder=tmp_path)
    assert len(lines) == 12
    assert all(line.endswith("; 0 lost") for line in lines), lines
