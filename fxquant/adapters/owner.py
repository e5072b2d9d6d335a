"""What adapters need of the model that owns them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from fxquant.adapters.branches import Branching
from fxquant.capture.calls import Call, CallSpec
from fxquant.capture.graph import CapturedGraph


class Owner(Protocol):
    """What adapters need of the quantized model."""

    architecture: Any

    @property
    def lasting(self) -> list[CapturedGraph]:
        """The graphs captured in calibration."""

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""

    def _at_home(self) -> AbstractContextManager[None]:
        """Bring parked tensors to the device of the graphs meanwhile."""

    def _share(self, graphs: list[CapturedGraph]) -> None:
        """Let graphs hold the same tensor under each name."""

    def make_graph(self, call: Call | CallSpec, branching: Branching | None = None) -> CapturedGraph:
        """Capture and quantize a graph for a call, with branches."""
