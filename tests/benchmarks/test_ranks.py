"""The benchmark of several processes: its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ranks


def _times(seconds: float) -> dict[str, list[float]]:
    return {phase: [seconds, 2 * seconds] for phase in ranks.PHASES}


def test_the_busiest_process_of_the_best_round_counts(tmp_path: Path) -> None:
    times = {"1": [[_times(9.0)], [_times(8.0)]], "2": [[_times(4.0), _times(5.0)], [_times(3.0), _times(6.0)]]}
    report = {"times": times, "differences": {"2": {"extremes": 0.0, "moments": 3e-7}}}
    report |= {"shape": ranks.SMALL, "cores": 2, "load": 3.2}
    assert ranks.best(report, "2", "GPTQ") == (5.0, 10.0)
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{ranks._START}\n\n{ranks._END}\n\nafter\n")
    ranks.show(report, page)
    text = page.read_text()
    assert "| GPTQ | 8.0 (16.0) s | 5.0 (10.0) s |" in text
    assert "| extremes differ by |  | 0 |" in text and "| 3e-07 |" in text
    assert "the best of 2 round(s) on 2 cores; on average 3 programs wanted to run." in text
    assert text.startswith("before") and text.endswith("after\n")


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(SystemExit, match="lacks the lines"):
        ranks.show({"times": {}, "differences": {}}, tmp_path / "page.md")
