"""How much the model's output suffers from each layer, in each precision that it could have, at each timestep."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fxquant.disk.files import digest_of
from fxquant.disk.whole_file import whole_file
from fxquant.errors import CheckpointError, UnknownNameError
from fxquant.planning.attribution import Cells, to_db
from fxquant.planning.measured_files import reading
from fxquant.schemas.common import check
from fxquant.schemas.sensitivities import SensitivitiesFile
from fxquant.text import decimal, fitted, json_values, printable

_FORMAT = 1
FLOAT_BITS = "float"
"""Name of the precision in which a layer adds no error."""


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer. Errors are energies relative to that of the float output: 0.01 is an SQNR of 20 dB.

    An error is infinite if the output is not finite.

    Attributes:
        name: Its name in the plan.
        weights: Number of weights.
        macs: Multiplications and additions for one sample.
        reads: Key of the value that it reads; layers with the same key read the same value.
        precisions: Those that it can have, such as ``w4a8``.
        bytes: Storage of its weight in each of them, with scales, zero points and a low-rank branch. A weight that
            several layers share counts for the first one.
        estimated: Estimated error of the output if this layer alone is quantized, one row per precision, one number per
            timestep.
        measured: The same, measured by running the model; None where it was not.
        all_but: Estimated error of the output if all layers but this one have the precision.
        shares: Name of the layer whose stored weight it reads; empty if the weight counts as its own.
    """

    name: str
    weights: int
    macs: int
    reads: str
    precisions: tuple[str, ...]
    bytes: tuple[int, ...]
    estimated: tuple[Cells, ...]
    measured: tuple[Cells, ...]
    all_but: tuple[Cells, ...]
    shares: str = ""

    def alone(self, precision: str) -> Cells:
        """Error of the output if this layer alone has a precision, by timestep: measured where it was, else estimated.

        Raises:
            UnknownNameError: If the layer cannot have the precision.
        """
        number = self._number(precision)
        pairs = zip(self.measured[number], self.estimated[number], strict=True)
        return tuple(estimated if measured is None else measured for measured, estimated in pairs)

    def without(self, precision: str) -> Cells:
        """Error of the output if all layers but this one have a precision, by timestep, estimated.

        Raises:
            UnknownNameError: If the layer cannot have the precision.
        """
        return self.all_but[self._number(precision)]

    def size(self, precision: str) -> int:
        """Bytes of its weight in a precision, with scales, zero points and a low-rank branch.

        Raises:
            UnknownNameError: If the layer cannot have the precision.
        """
        return self.bytes[self._number(precision)]

    def only(self, precisions: Collection[str]) -> LayerSensitivity:
        """The same without its other precisions."""
        kept = [number for number, precision in enumerate(self.precisions) if precision in precisions]
        rows = ("precisions", "bytes", "estimated", "measured", "all_but")
        found: dict[str, Any] = {row: tuple(getattr(self, row)[number] for number in kept) for row in rows}
        return replace(self, **found)

    def _number(self, precision: str) -> int:
        if precision not in self.precisions:
            raise UnknownNameError(f"precision of layer {self.name}", precision, self.precisions)
        return self.precisions.index(precision)


@dataclass(frozen=True)
class Sensitivities:
    """Errors by layer, precision and timestep; prints as a table.

    Attributes:
        recipe: The recipe that folded factors into weights, as text. All precisions were compared on its graph.
        model_class: Import path of the model's class.
        base: The precision that the recipe begins from; layers that cannot have another one keep it.
        precisions: All precisions that were compared.
        timesteps: The measured timesteps, the noisiest first.
        layers: The layers whose precision can be chosen, in the order of the graph.
        output: For each precision, the measured error of the output if all layers have it, by timestep.
        bytes_before: Size of the float model's tensors.
        bytes_fixed: Size of the quantized model's tensors without the weights of these layers.
        samples: Samples per timestep.
        probes: Random gradients per timestep.
        seconds: How long the measurement took.
        made_for: Digest of the model's weights and of everything else that the numbers depend on.
        weights: Digest of the model's weights.
        left_out: What was not measured, and why.
    """

    recipe: str
    model_class: str
    base: str
    precisions: tuple[str, ...]
    timesteps: tuple[float, ...]
    layers: Mapping[str, LayerSensitivity]
    output: Mapping[str, Cells]
    bytes_before: int
    bytes_fixed: int
    samples: int
    probes: int
    seconds: float
    made_for: str
    weights: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)

    def of(self, layer: str) -> LayerSensitivity:
        """The numbers of one layer.

        Raises:
            UnknownNameError: If its precision was not varied.
        """
        if layer not in self.layers:
            raise UnknownNameError("layer with sensitivities", layer, list(self.layers)[:10])
        return self.layers[layer]

    @property
    def weights_of_layers(self) -> int:
        """Number of weights of all layers; a weight that several share counts once."""
        return sum(layer.weights for layer in self.layers.values() if not layer.shares)

    def uniform(self, precision: str) -> dict[str, str] | None:
        """The choice of one precision for all layers; None if a layer cannot have it."""
        has = all(precision in layer.precisions for layer in self.layers.values())
        return dict.fromkeys(self.layers, precision) if has else None

    def uniform_bytes(self, precision: str) -> int:
        """Size of the model's tensors if every layer has a precision; layers that cannot have it keep the recipe's."""
        return self.bytes_fixed + sum(self._size(layer, precision) for layer in self.layers.values())

    def _size(self, layer: LayerSensitivity, precision: str) -> int:
        named = next((text for text in (precision, self.base) if text in layer.precisions), None)
        return max(layer.bytes) if named is None else layer.size(named)

    def uniform_db(self, precision: str) -> float | None:
        """Mean over timesteps of the SQNR in dB if every layer has a precision, as measured.

        Timesteps without any error are left out.
        """
        cells = [to_db(cell) for cell in self.output.get(precision, ())]
        known = [cell for cell in cells if cell is not None and cell != math.inf]
        return sum(known) / len(known) if known else None

    def rows(self) -> list[dict[str, Any]]:
        """One entry per layer and precision as JSON values: bytes, SQNR in dB alone, and of all but it."""
        found = []
        for layer in self.layers.values():
            for number, precision in enumerate(layer.precisions):
                alone, others = layer.alone(precision), layer.all_but[number]
                worst = max(
                    ((cell, step) for cell, step in zip(alone, self.timesteps, strict=True) if cell is not None),
                    default=(None, None),
                )
                row = {
                    "layer": layer.name,
                    "precision": precision,
                    "bytes": layer.bytes[number],
                    "alone_db": mean_db(alone),
                    "worst_timestep": worst[1],
                    "worst_db": to_db(worst[0]),
                    "all_but_db": mean_db(others),
                    "measured_timesteps": sum(cell is not None for cell in layer.measured[number]),
                }
                found.append({name: json_values(value) for name, value in row.items()})
        return found

    def table(self, most: int | None = None) -> str:
        """The layers, the most sensitive first, with the mean SQNR in dB of the output in each precision alone."""
        shown = [precision for precision in self.precisions if precision != FLOAT_BITS]
        ranked = sorted(self.layers.values(), key=lambda layer: _rank(layer, shown))
        cells = []
        for layer in ranked[:most]:
            alone = [_db(mean_db(layer.alone(p))) if p in layer.precisions else "" for p in shown]
            cells.append([layer.name, f"{layer.weights:,}", *alone])
        uniform = ["all layers", f"{self.weights_of_layers:,}"]
        cells.append([*uniform, *(_db(self.uniform_db(precision)) for precision in shown)])
        size = ["size", "", *(f"{self.uniform_bytes(p) / max(self.bytes_before, 1):.1%}" for p in shown)]
        cells.append(size)
        lines = [
            f"output SQNR in dB, mean over {len(self.timesteps)} timesteps, if one layer alone has a precision",
            "",
            fitted(["layer", "weights", *shown], cells, {0: 60}, range(1, len(shown) + 2)),
        ]
        for what, why in self.left_out.items():
            lines += textwrap.wrap(printable(f"not measured: {what}: {why}"), 140, subsequent_indent="  ")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}
        layers = {name: asdict(layer) for name, layer in self.layers.items()}
        for layer in layers.values():
            del layer["name"]
            if not layer["shares"]:  # Most layers; their entries stay as earlier versions read them.
                del layer["shares"]
        values = json_values({**data, "layers": layers})
        assert isinstance(values, dict)
        return values

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sensitivities:
        """Read back what :meth:`to_json` wrote; the values were compared with the schema."""
        layers = dict[str, LayerSensitivity]()
        for name, entry in data["layers"].items():
            own: dict[str, Any] = {key: tuple(entry[key]) for key in ("precisions", "bytes")}
            own |= {key: tuple(map(_cells, entry[key])) for key in ("estimated", "measured", "all_but")}
            own |= {key: entry[key] for key in ("weights", "macs", "reads")}
            layers[name] = LayerSensitivity(name, **own, shares=entry.get("shares", ""))
        given: dict[str, Any] = {f.name: data[f.name] for f in fields(cls) if f.name not in ("layers", "output")}
        given |= {key: tuple(data[key]) for key in ("precisions", "timesteps")}
        return cls(layers=layers, output={name: _cells(row) for name, row in data["output"].items()}, **given)

    def save(self, path: str | Path) -> None:
        """Write a JSON file, completely or not at all.

        Raises:
            WriteError: If the file cannot be written.
        """
        data = {"format": _FORMAT, **self.to_json()}
        data["digest"] = digest_of(data)
        check(SensitivitiesFile, data, "what would be saved")
        with whole_file(Path(path)) as file:
            file.write_text(json.dumps(data) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Sensitivities:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: If there is no such file, it is damaged, or a newer fxquant wrote it.
        """
        made_by = "fxquant sensitivity writes such a file with --out"
        what = "file of sensitivities"
        with reading(Path(path), SensitivitiesFile, format=_FORMAT, what=what, made_by=made_by) as data:
            if data["digest"] != digest_of(data):
                raise CheckpointError("it does not match its digest; remove it, and measure again")
            return cls.from_json(data)


def _cells(row: Sequence[Any]) -> Cells:
    """A row of a file; JSON has no infinity."""
    return tuple(math.inf if cell == "inf" else cell for cell in row)


def mean_db(cells: Cells) -> float | None:
    """Mean over timesteps of an SQNR in dB; timesteps without an error are left out."""
    found = [to_db(cell) for cell in cells if cell]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def _rank(layer: LayerSensitivity, precisions: list[str]) -> float:
    """The lowest mean SQNR over the precisions that a layer can have."""
    found = [mean_db(layer.alone(p)) for p in precisions if p in layer.precisions]
    return min((value for value in found if value is not None), default=math.inf)


def _db(value: float | None) -> str:
    return "" if value is None else decimal(value)
