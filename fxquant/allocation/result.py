"""What a search found."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fxquant.planning.layer_times import LayerTimes
from fxquant.planning.pass_decisions import Decision
from fxquant.planning.plan import Plan
from fxquant.planning.sensitivities import Sensitivities
from fxquant.runtime.model import GraphModel
from fxquant.text import decimal, fitted, json_values, printable


@dataclass
class Choice(Decision, of="search"):
    """Why a layer has its precision; kept in the plan.

    Attributes:
        precision: The precision.
        size: Bytes of the weight.
        alone_db: Estimated SQNR of the output in dB if this layer alone is quantized; None if it adds no error.
        share: Its part of the summed errors of all layers, 0 to 1.
        why: What the next cheaper precision would have cost.
    """

    precision: str
    size: int
    alone_db: float | None
    share: float
    why: str


@dataclass(frozen=True)
class Point:
    """A choice of precisions for the whole model.

    Attributes:
        name: ``searched``, or the precision that all layers have.
        size: Bytes of the model's tensors.
        estimated_db: Estimated SQNR of the output in dB, mean over timesteps; None for uniform precisions.
        measured_db: The same, measured; None if it was not.
        speed: How many times faster than the float model's a call is, measured; None if it was not.
    """

    name: str
    size: int
    estimated_db: float | None
    measured_db: float | None = None
    speed: float | None = None


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The precisions that a search chose, and the model that has them; prints as text.

    Attributes:
        model: The quantized model.
        target: The target in words.
        chosen: Precision by layer.
        point: Size and quality of the model.
        curve: The best estimated quality at sizes from the smallest to the largest.
        uniform: All layers in one precision, measured.
        checks: What was compiled and measured on the way; the last one is the result.
        sensitivities: What the choice was made from.
        cost_model: The speed, and what was timed, in words; empty unless the target is a speed.
        choices: By layer, the choice with its reason.
        times: The times of layers that the choice was made from; None unless the target is a speed.
        refused: Candidates that the backend does not run, and why.
    """

    model: GraphModel
    target: str
    chosen: dict[str, str]
    point: Point
    curve: tuple[Point, ...]
    uniform: tuple[Point, ...]
    checks: tuple[Point, ...]
    sensitivities: Sensitivities
    cost_model: str = ""
    choices: dict[str, Choice] = field(default_factory=dict)
    times: LayerTimes | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """The plan with the choices."""
        assert self.model.plan is not None
        return self.model.plan

    @property
    def average_bits(self) -> float:
        """Bits per weight of the chosen layers, with scales and zero points."""
        layers = self.sensitivities.layers
        total = sum(layers[name].size(precision) for name, precision in self.chosen.items())
        return 8 * total / self.sensitivities.weights_of_layers

    def table(self) -> str:
        """The result, the choices, and the uniform precisions beside it."""
        before, point, bits = max(self.sensitivities.bytes_before, 1), self.point, self.average_bits
        counts = Counter(self.chosen.values())
        lines = [
            f"target: {self.target}",
            f"size {point.size / 1e6:.2f} MB, {point.size / before:.1%} of float, {bits:.2f} bits per weight",
            f"output SQNR {_db(point.measured_db)} dB measured, {_db(point.estimated_db)} dB estimated",
            "layers: " + ", ".join(f"{counts[name]} in {name}" for name in sorted(counts)),
        ]
        if self.cost_model:
            lines += textwrap.wrap(f"speed: {self.cost_model}", 140, subsequent_indent="  ")
        for what, why in self.refused.items():
            lines += textwrap.wrap(printable(f"not considered: {what}: {why}"), 140, subsequent_indent="  ")
        cells = [
            [name, one.precision, f"{one.size:,}", _db(one.alone_db), f"{one.share:.1%}", one.why]
            for name, one in self.choices.items()
        ]
        header = ["layer", "precision", "bytes", "alone dB", "share", "why"]
        lines += ["", fitted(header, cells, {0: 50, 5: 60}, (2, 3, 4)), ""]
        rows = [
            [one.name, f"{one.size / 1e6:.2f}", f"{one.size / before:.1%}", _db(one.measured_db)]
            for one in (*self.uniform, point)
        ]
        lines.append(fitted(["precision", "MB", "of float", "SQNR dB"], rows, {0: 30}, (1, 2, 3)))
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values, without the model and the sensitivities."""
        points = {name: [vars(one) for one in getattr(self, name)] for name in ("curve", "uniform", "checks")}
        values = json_values(
            {
                "target": self.target,
                "cost_model": self.cost_model,
                "times": None if self.times is None else asdict(self.times),
                "refused": self.refused,
                "average_bits": self.average_bits,
                "point": vars(self.point),
                **points,
                "choices": {name: vars(one) for name, one in self.choices.items()},
            }
        )
        assert isinstance(values, dict)
        return values


def _db(value: float | None) -> str:
    return "" if value is None else decimal(value)
