"""A small pipeline for the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_pipeline


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a float pipeline."""
    folder = tmp_path_factory.mktemp("float") / "pipeline"
    make_pipeline().save_pretrained(folder)
    return folder
