"""Folders of images that hold something else are refused with a message that can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxquant.errors import CheckpointError, EvaluationError
from fxquant.evaluation.store import SETTINGS, Store


def test_a_message_names_ten_settings_and_shortens_them(tmp_path: Path) -> None:
    Store(tmp_path, {"steps": 3})
    others = {f"other{number}": "x" * 500 for number in range(2000)}
    (tmp_path / SETTINGS).write_text(json.dumps({"steps": 4, **others}))
    with pytest.raises(EvaluationError, match=r"steps 4, not 3, other0 x+\.\.\.") as raised:
        Store(tmp_path, {"steps": 3})
    assert "and 1991 more" in str(raised.value)
    assert len(str(raised.value)) < 3000


def test_settings_that_are_nested_too_deep_are_refused(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Store(tmp_path, {"steps": 3})
