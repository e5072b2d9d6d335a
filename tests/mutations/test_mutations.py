"""A thousand damaged files of all kinds: each is refused with a typed error within limits, or read equal.

``make fuzz-load`` reads many more, and different ones each time. Packages are damaged only there and in
``tests/storage/aot``, because one of them takes a minute of the C++ compiler.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.cases import Cases, Tally
from tests.mutations.kinds import KINDS


def test_a_thousand_cases() -> None:
    assert sum(kind.in_tests for kind in KINDS.values()) == 1000
    assert sum(kind.share for kind in KINDS.values()) == 1000
    assert KINDS["checkpoint"].share + KINDS["checkpoint of diffusers"].share > 500


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if kind.in_tests else (pytest.mark.slow, pytest.mark.exhaustive))
        for name, kind in KINDS.items()
    ],
)
def test_damaged_files_are_refused_or_read_equal(name: str, tmp_path: Path) -> None:
    kind, tally = KINDS[name], Tally()
    made = Cases(kind, tmp_path / "whole", most=1 if name == "checkpoint of diffusers" else 2)
    files = made.files()
    for number in range(kind.in_tests or 20):
        made.run(tmp_path / "cases", f"0-{number}", files, tally)
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.outcomes["refused"] or name == "resumed work", "a refused part of a job is computed anew"
