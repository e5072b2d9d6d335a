"""Lets the tests of a model share its graphs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest

from fxquant.capture.graph import CapturedGraph
from fxquant.capture.trace import Architecture
from fxquant.ir.stages import SPECS, Stage, verify
from tests.zoo.models import Entry

TRACED: dict[Entry, list[CapturedGraph]] = defaultdict(list)


@pytest.fixture(autouse=True)
def traced_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace each model once per kind of call; later captures get a copy of the traced graph."""
    entry = getattr(request.node, "callspec", None) and request.node.callspec.params.get("entry")
    if entry is None:
        return
    capture = Architecture.capture

    def shared(
        self: Architecture, names: tuple[str, ...], leaves: Sequence[Any], structure: Any, *others: Any
    ) -> CapturedGraph:
        found = next((graph for graph in TRACED[entry] if graph.call.fits(names, leaves, structure)), None)
        if found is None:
            found = capture(self, names, leaves, structure, *others)
            verify(found.module, SPECS[Stage.CAPTURED])  # Its copies keep the proofs.
            TRACED[entry].append(found)
        return found.copy()

    monkeypatch.setattr(Architecture, "capture", shared)
