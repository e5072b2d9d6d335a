"""The benchmark of models larger than memory, on tiny ones."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import scale


def _options(folder: Path, recipe: str) -> argparse.Namespace:
    return argparse.Namespace(recipe=recipe, calls=1, shard="300MB", json=folder / "scale.json", threads=1)


@pytest.mark.slow
def test_cases_are_measured_once_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scale.SHAPES, 0.001, (1, 1, 1))
    monkeypatch.setitem(scale.BOUNDS, 0.001, "64GB")
    report: dict[str, list[dict[str, float]]] = {"cases": []}
    for _ in range(2):
        scale.measure(report, _options(tmp_path, "rtn-w8a8"), tmp_path, 0.001, "bounded")
    assert json.loads((tmp_path / "scale.json").read_text())["cases"] == report["cases"]
    (case,) = report["cases"]
    assert case["total"] > case["anonymous"] > 10**8 and case["total"] > case["imports"]
    assert 10**6 < case["float_bytes"] < 10**8 and not (tmp_path / "out").exists()
    page = tmp_path / "scale.md"
    page.write_text(f"before\n\n{scale._START}\n\n{scale._END}\n\nafter\n")
    scale.show(report, page)
    assert "| 0.001 |" in page.read_text() and "within 64GB" in page.read_text()
    assert "| phase | 0.001, bounded |" in page.read_text() and "| quantize-linears | " in page.read_text()
    assert page.read_text().endswith("after\n") and (tmp_path / "pictures" / "scale.svg").stat().st_size > 1000


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(SystemExit, match="lacks the lines"):
        scale.show({"cases": []}, tmp_path / "page.md")


@pytest.mark.exhaustive
def test_a_process_stays_within_its_bound(tmp_path: Path) -> None:
    scale.write_model(tmp_path / "model", 0.1, "50MB")
    task = {"model": str(tmp_path / "model"), "out": str(tmp_path / "out"), "recipe": "ptq4dit-w4a8"}
    found = scale.run({**task, "bound": "1GB", "calls": 2, "threads": 2})
    assert found["total"] < 1.1e9  # Pages come in between two looks at the resident set.
