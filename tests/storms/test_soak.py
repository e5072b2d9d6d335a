"""Uses models for about a hundred calls; ``make soak`` makes two thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.storms.soak import Soak
from tests.traces import traced_anew


@pytest.mark.slow
@traced_anew()  # Traces that tests share keep models alive.
@pytest.mark.filterwarnings("ignore")
def test_results_stay_and_nothing_grows(tmp_path: Path) -> None:
    result = Soak(tmp_path, seed=0, families=["dit/fake-quant"], sizes=(8,), short=True).run(100)
    assert not result.wrong, "\n".join(result.lines())
    assert result.calls >= 100
