"""Random models share no traces: all of them differ, and tracing is a part of what is tested."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def shared_traces() -> None:
    """In place of the fixture of all other tests."""
