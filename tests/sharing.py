"""Fixtures by which all tests share traces and more, see ``tests.traces`` and ``tests.conversions``.

It is also a plugin for tests of other packages:

``pytest -p tests.sharing``, with the root of the repository in ``PYTHONPATH``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch._logging._internal import trace_log

from tests.conversions import rebuilt_once, worked_out_once
from tests.traces import known_memos, memos, traced_once


@pytest.fixture(scope="session", autouse=True)
def shared_memos() -> Iterator[None]:
    """Traces look for caches of functions once for all tests, and conversions compile the code of equal graphs once.

    What torch logs of each trace for its own tools, which pytest would keep for each test, is not written.
    """
    with memos(known_memos), worked_out_once(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_log, "handlers", [])
        yield


@pytest.fixture(scope="module", autouse=True)
def shared_traces() -> Iterator[None]:
    """Equal models are traced once per process and kind of call.

    Tests of what a trace costs, leaves behind or depends on use ``tests.traces.traced_anew``.
    """
    with traced_once(), rebuilt_once():
        yield
