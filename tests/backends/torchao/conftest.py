"""What tests of this backend need of the processor."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _on_any_processor(torchao_on_any_processor: None) -> None:
    """For all files of this folder."""
