"""Tests of tracing itself share no traces."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def shared_traces() -> None:
    """In place of the fixture of all other tests."""
