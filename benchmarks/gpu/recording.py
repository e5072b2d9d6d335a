"""A plugin of pytest that records each test when it ends, and leaves out those that ended in an earlier run.

    python -m pytest -p benchmarks.gpu.recording --ledger out/results.jsonl tests/backends/native/gpu

Tests that need a GPU run, and those of the folder of kernels, which use a GPU if there is one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.agenda import KERNELS
from benchmarks.gpu.ledger import MOST_ATTEMPTS, Entry, Ledger, attempts, end_with_parent, latest

_MOST_TEXT = 4000
"""Characters of a failure that are kept: its end, which has the error."""
_LOST = 70
"""Exit status of a process whose device was lost; none of pytest's."""
_AHEAD = "test_ahead.py"
"""Compiles for several devices without using one."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ledger", help="file for the outcome of each test")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--ledger")
    if path is None:
        raise pytest.UsageError("benchmarks.gpu.recording needs --ledger FILE")
    config.pluginmanager.register(Recording(Ledger(Path(path)), worker=hasattr(config, "workerinput")))


class Recording:
    """Records in the main process, and selects in each process.

    Args:
        ledger: Where outcomes go.
        worker: Whether this is a process of pytest-xdist, whose outcomes the main process records.
    """

    def __init__(self, ledger: Ledger, worker: bool) -> None:
        self._ledger, self._worker = ledger, worker
        if not worker:
            end_with_parent()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        entries = self._ledger.read()
        kept, left_out = [], []
        for item in items:
            (kept if wanted(item, entries) else left_out).append(item)
        items[:] = sorted(kept, key=lambda item: item.get_closest_marker("slow") is not None)
        if left_out:
            config.hook.pytest_deselected(items=left_out)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if not self._worker:
            self._ledger.add("begin", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # The outcome is that of the call, or of the setup or the teardown if these fail.
        if self._worker or (report.when != "call" and report.passed):
            return
        text = "" if report.passed else str(report.longrepr)[-_MOST_TEXT:]
        self._ledger.add("test", report.nodeid, outcome=report.outcome, seconds=report.duration, text=text)

    def pytest_runtest_logfinish(self) -> None:
        """End a process whose device no longer responds, as its further tests would all fail.

        pytest-xdist starts another process; without it, the step is run again.
        """
        if not torch.cuda.is_available() or not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(_LOST)


def wanted(item: pytest.Item, entries: list[Entry]) -> bool:
    """Whether a test uses a device and is still to be run."""
    if item.get_closest_marker("exhaustive") is not None or item.path.name == _AHEAD:
        return False
    if item.get_closest_marker("gpu") is None and not item.nodeid.startswith(KERNELS):
        return False
    return item.nodeid not in latest(entries, "test") and attempts(entries).get(item.nodeid, 0) < MOST_ATTEMPTS
