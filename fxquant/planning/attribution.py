"""Where the error of a quantized model comes from: by layer and timestep.

The plan holds the result, if it was measured, and keeps it in a file of its own, ``errors.json``. It is a measurement
and not a decision: plans are equal whether or not they have it, and a plan that was edited afterwards is read without.
"""

from __future__ import annotations

import json
import math
import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fxquant.disk.files import blaming, digest_of
from fxquant.disk.whole_file import whole_file
from fxquant.errors import CheckpointError, DamagedFileWarning, UnknownNameError
from fxquant.schemas.attribution import AttributionFile
from fxquant.schemas.common import check, read_json
from fxquant.text import decimal, fitted, json_values, printable

ATTRIBUTION_FILE = "errors.json"
_FORMAT = 1
_WORST = 10  # Rows of the table.

Cells = tuple[float | None, ...]
"""One number per timestep; None where nothing was measured."""


@dataclass(frozen=True)
class LayerErrors:
    """The errors of one layer, or of the two products of one attention, at each timestep.

    All numbers are energies of errors relative to the energy of the float value: 0.01 is an SQNR of 20 dB.

    Attributes:
        name: Name of the layer or attention.
        timesteps: The timesteps, the noisiest first.
        local: Error of the layer's output if only this layer is quantized, so that its input is that of the float
            model.
        weights: The same if only its weight is quantized; None for attentions.
        inputs: What quantizing its input adds to that; None if its input stays float.
        estimated: Estimated error of the model's output if only this layer is quantized.
        measured: The same, measured by running the rest of the model.
    """

    name: str
    timesteps: tuple[float, ...]
    local: Cells
    weights: Cells
    inputs: Cells
    estimated: Cells
    measured: Cells

    @property
    def contribution(self) -> Cells:
        """Error of the model's output if only this layer is quantized: measured where it was, else estimated."""
        pairs = zip(self.measured, self.estimated, strict=True)
        return tuple(estimated if measured is None else measured for measured, estimated in pairs)

    @property
    def mean_contribution(self) -> float | None:
        """Mean of the contributions over the timesteps; None if none is known."""
        return _mean(self.contribution)

    @property
    def worst_timestep(self) -> float | None:
        """The timestep of the largest contribution, or of the largest local error if no contribution is known."""
        for cells in (self.contribution, self.local):
            known = [(value, step) for value, step in zip(cells, self.timesteps, strict=True) if value is not None]
            if known:
                return max(known)[1]
        return None

    @property
    def local_db(self) -> float | None:
        """SQNR of the layer's output in dB, of the mean error over timesteps."""
        return to_db(_mean(self.local))

    @property
    def contribution_db(self) -> float | None:
        """SQNR in dB of the model's output if only this layer is quantized, of the mean error over timesteps."""
        return to_db(self.mean_contribution)


@dataclass(frozen=True)
class Attribution:
    """Errors of a quantized model by layer and timestep; prints as a table.

    Attributes:
        method: How the contributions were found, in words, with their accuracy.
        timesteps: The measured timesteps, the noisiest first.
        output: Error of the whole quantized model's output at each timestep, relative to the float output's energy.
        layers: Errors of each layer, in the order of the graph.
        samples: Samples per timestep.
        probes: Random probes per timestep for the estimates.
        seconds: How long it took.
        left_out: What was not measured, and why.
    """

    method: str
    timesteps: tuple[float, ...]
    output: Cells
    layers: Mapping[str, LayerErrors]
    samples: int
    probes: int
    seconds: float
    left_out: Mapping[str, str] = field(default_factory=dict)

    def of(self, layer: str) -> LayerErrors:
        """The errors of one layer.

        Raises:
            UnknownNameError: If nothing was measured for it, for example because it stayed float.
        """
        if layer not in self.layers:
            raise UnknownNameError("layer with measured errors", layer, list(self.layers)[:10])
        return self.layers[layer]

    def worst(self, most: int | None = None) -> list[LayerErrors]:
        """The layers by their contribution to the output error, the largest first; without any, by the local error."""
        found = sorted(
            self.layers.values(), key=lambda one: (-(one.mean_contribution or 0.0), -(_mean(one.local) or 0.0))
        )
        return found[:most]

    def share(self, layer: str) -> float | None:
        """A layer's part of the sum of all contributions, 0 to 1; None if its contribution is not known."""
        own = self.of(layer).mean_contribution
        total = sum(entry.mean_contribution or 0.0 for entry in self.layers.values())
        return None if own is None or total <= 0 else own / total

    def worst_cell(self) -> tuple[str, float] | None:
        """The layer and timestep with the largest contribution."""
        cells = [
            (value, layer.name, step)
            for layer in self.layers.values()
            for value, step in zip(layer.contribution, self.timesteps, strict=True)
            if value is not None
        ]
        if not cells:
            return None
        _, name, step = max(cells, key=lambda cell: cell[0])
        return name, step

    def explained(self) -> float | None:
        """Sum of all contributions divided by the error of the whole model, over the timesteps where both are known.

        1 if the errors of the layers are independent and small; below 1 if they add up, above 1 if they compensate.
        """
        sums, outputs = 0.0, 0.0
        for number, output in enumerate(self.output):
            cells = [layer.contribution[number] for layer in self.layers.values()]
            known = [value for value in cells if value is not None]
            if output and len(known) == len(cells):
                sums, outputs = sums + sum(known), outputs + output
        return sums / outputs if outputs else None

    def rows(self, most: int | None = None) -> list[dict[str, Any]]:
        """The worst layers as JSON values: name, share, SQNR in dB, the timestep with the largest contribution."""
        found = []
        for layer in self.worst(most):
            ran = sum(value is not None for value in layer.measured)
            row = {
                "layer": layer.name,
                "share": self.share(layer.name),
                "contribution_db": layer.contribution_db,
                "worst_timestep": layer.worst_timestep,
                "local_db": layer.local_db,
                "weights_db": to_db(_mean(layer.weights)),
                "inputs_db": to_db(_mean(layer.inputs)),
                "measured_timesteps": ran,
            }
            found.append({name: json_values(value) for name, value in row.items()})
        return found

    def table(self, most: int = _WORST) -> str:
        """The worst layers as text of at most 140 columns."""
        cells = []
        for layer in self.worst(most):
            share, ran = self.share(layer.name), sum(value is not None for value in layer.measured)
            cells.append(
                [
                    layer.name,
                    "" if share is None else f"{100 * share:.1f} %",
                    _db(layer.contribution_db),
                    "" if layer.worst_timestep is None else f"{layer.worst_timestep:g}",
                    *map(_db, (layer.local_db, to_db(_mean(layer.weights)), to_db(_mean(layer.inputs)))),
                    "measured"
                    if ran == len(self.timesteps)
                    else f"{ran} of {len(self.timesteps)} measured"
                    if ran
                    else "estimated",
                ]
            )
        header = ["layer", "share", "output dB", "worst t", "local dB", "W dB", "x dB", "contribution"]
        lines = [self.summary()]
        if cells:
            lines += ["", fitted(header, cells, {0: 60}, range(1, 7))]
        lines += [line for what, why in self.left_out.items() for line in _filled(f"not measured: {what}: {why}")]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def summary(self) -> str:
        """The answer in a few lines: the worst layer and timestep, what the errors sum to, and how they were found."""
        cell, worst, explained = self.worst_cell(), self.worst(1), self.explained()
        lines = [f"output SQNR {_db(to_db(_mean(self.output))) or '?'} dB over {len(self.timesteps)} timesteps"]
        if explained is not None:
            lines[0] += f"; the errors of the layers sum to {explained:.2f} times that of the whole model"
        if cell is not None:
            share = self.share(worst[0].name)
            part = "" if share is None else f", {100 * share:.0f} % of the error"
            lines += [f"worst layer: {worst[0].name}{part}", f"worst layer and timestep: {cell[0]} at {cell[1]:g}"]
        return "\n".join([*(line for text in lines for line in _filled(text)), *_filled(self.method)])

    def matrix(self, what: str = "contribution") -> list[list[float | None]]:
        """One row per layer, one column per timestep.

        Args:
            what: ``contribution``, or another attribute of :class:`LayerErrors` with one number per timestep.
        """
        return [list(getattr(layer, what)) for layer in self.layers.values()]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values: the layers, the timesteps, and matrices of layers by timesteps."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}
        matrices = {name: self.matrix(name) for name in _MATRICES}
        values = json_values({**own, "layers": list(self.layers), **matrices})
        assert isinstance(values, dict)
        return values

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Attribution:
        """Read back what :meth:`to_json` wrote; the values were compared with the schema."""
        steps = tuple(data["timesteps"])
        layers = {
            name: LayerErrors(name, steps, **{matrix: tuple(data[matrix][number]) for matrix in _MATRICES})
            for number, name in enumerate(data["layers"])
        }
        plain = {name: data[name] for name in ("method", "samples", "probes", "seconds", "left_out")}
        return cls(timesteps=steps, output=tuple(data["output"]), layers=layers, **plain)

    def save(self, folder: str | Path, plan: str) -> None:
        """Write ``errors.json`` into a folder, completely or not at all.

        Args:
            folder: The folder, which holds the plan.
            plan: Fingerprint of the plan (:meth:`fxquant.planning.plan.Plan.fingerprint`).

        Raises:
            WriteError: If the file cannot be written.
        """
        data = {"format": _FORMAT, "plan": plan, **self.to_json()}
        data["digest"] = digest_of(data)
        check(AttributionFile, data, "what would be saved")
        with whole_file(Path(folder) / ATTRIBUTION_FILE) as path:
            path.write_text(json.dumps(data) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, plan: str) -> Attribution | None:
        """Read ``errors.json``; None if there is no such file, or if it belongs to another plan.

        Raises:
            CheckpointError: If the file is damaged.
        """
        path = Path(folder) / ATTRIBUTION_FILE
        if not os.path.lexists(path):
            return None
        if not path.is_file():  # A device or a pipe might never end.
            raise CheckpointError(f"{path} is not a file")
        _, data = read_json(path, "checkpoint")
        with blaming(path):
            number = data.get("format") if isinstance(data, Mapping) else None
            if isinstance(number, int) and number > _FORMAT:
                return None  # A newer fxquant measured it; the model itself can be read.
            check(AttributionFile, data, "the file")
            if data["digest"] != digest_of(data):
                raise CheckpointError("it does not match its digest; remove it, or copy the checkpoint again")
            return cls.from_json(data) if data["plan"] == plan else None


def kept_attribution(folder: str | Path, plan: str) -> Attribution | None:
    """The same as :meth:`Attribution.load`, but a damaged file gives a warning and None: nothing depends on the file.

    Args:
        folder: The folder of a checkpoint or plan.
        plan: Fingerprint of the plan.
    """
    try:
        return Attribution.load(folder, plan)
    except CheckpointError as error:
        warnings.warn(
            f"the errors by layer are left out, because their file cannot be read: {error}. Everything else is read "
            f"as usual. Remove {Path(folder) / ATTRIBUTION_FILE}, and measure again with fxquant.attribute, or copy "
            "the file again",
            DamagedFileWarning,
            stacklevel=1,  # One place, so that commands that read the plan several times show it once.
        )
        return None


_MATRICES = ("local", "weights", "inputs", "estimated", "measured")


def to_db(ratio: float | None) -> float | None:
    """SQNR in dB of an error relative to its signal; infinite for no error, minus infinite for an infinite one."""
    if ratio is None:
        return None
    return math.inf if ratio <= 0 else -10 * math.log10(ratio)


def _mean(cells: Sequence[float | None]) -> float | None:
    known = [value for value in cells if value is not None]
    return sum(known) / len(known) if known else None


def _filled(text: str) -> list[str]:
    return textwrap.wrap(printable(text), 140, subsequent_indent="  ") or [""]


def _db(value: float | None) -> str:
    return "" if value is None else decimal(value)
