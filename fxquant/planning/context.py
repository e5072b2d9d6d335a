"""What passes are given while they run: the plan, and the data from which they decide what the plan lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.ir.shared import SharedTensors
from fxquant.numerics.weights import QuantizedWeight
from fxquant.planning.plan import Plan
from fxquant.statistics.channels import ChannelStatistics
from fxquant.statistics.collection import Statistics


@dataclass(eq=False)
class PassContext:
    """The plan of a model and what exists only while graphs of the model are rewritten. Nothing but the plan is saved.

    All graphs of a model are rewritten with the same ``codes`` and ``shared``. The memo is new for each pass.

    Attributes:
        plan: Decisions. A pass carries out those that it finds here, and adds those that are missing.
        statistics: What calibration recorded; None if a plan is carried out without them.
        inputs: Tensor inputs of calibration calls of the graph, for passes that run the graph again. One list per call,
            one tensor per graph input. Empty if no pass asked for them (:meth:`Pass.wants_samples`).
        workspace: Folder for finished results of slow passes, or None.
        codes: Weights that are rounded already, by layer. ``quantize-linears`` takes them from here.
        shared: What the graphs of the model decided about the tensors that they share.
        memo: Decisions that a pass may use again within one graph, by keys that the pass chooses.
        progress: Called as ``progress(what, done, total)`` by passes that take long; None if progress is not shown.
    """

    plan: Plan
    statistics: Statistics | None = None
    inputs: list[list[Tensor]] = field(default_factory=list)
    workspace: Path | None = None
    codes: dict[str, QuantizedWeight] = field(default_factory=dict)
    shared: SharedTensors = field(default_factory=SharedTensors)
    memo: dict[Any, Any] = field(default_factory=dict)
    progress: Callable[[str, int, int], object] | None = None

    def observed(self, key: str, why: str | None = None) -> ChannelStatistics:
        """Calibration statistics of one value.

        Args:
            key: Name of the value.
            why: What the statistics are needed for, for the message.

        Raises:
            CalibrationError: If there are no statistics, because no calibration ran or it never reached the layer.
        """
        if self.statistics is None:
            raise CalibrationError(
                f"{why or f'layer {key!r} needs an activation range'}, but there are no calibration statistics; "
                "pass calibrate= to fxquant.compile, or pass plan= with the statistics= that calibration recorded",
                reason=f"the plan does not hold what was decided: {why or f'layer {key!r} needs an activation range'}",
            )
        return self.statistics[key]
