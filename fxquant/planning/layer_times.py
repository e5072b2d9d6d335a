"""How long layers take in each precision, as it was measured on one machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fxquant.disk.whole_file import whole_file
from fxquant.errors import ConfigurationError
from fxquant.planning.measured_files import reading
from fxquant.schemas.common import check
from fxquant.schemas.layer_times import LayerTimesFile

_FORMAT = 1


@dataclass(frozen=True)
class LayerTimes:
    """Times in milliseconds, from which :func:`fxquant.search` chooses for a speed.

    A call is estimated to take :attr:`rest` and the times of its layers. The file that :meth:`save` writes is plain
    JSON and can be written by hand, for example with times of another machine.

    Attributes:
        machine: What the times were measured on, in words.
        backend: The backend that ran the layers, with its options.
        batch: Samples per call.
        float_call: A call of the float model.
        rest: What a call of a quantized model takes beside these layers: attention, norms, other layers. Measured as
            the difference between a call and the times of its layers, each by itself; negative if the backend saves
            more by fusing layers with other ops than these ops take.
        layers: By layer, the time of each of its precisions; with a range of the input, its quantization is included.
            Layers that read the same value have equal parts of the quantization.
    """

    machine: str
    backend: str
    batch: int
    float_call: float
    rest: float
    layers: Mapping[str, Mapping[str, float]]

    def of(self, layer: str, precision: str) -> float:
        """The time of a layer in a precision.

        Raises:
            ConfigurationError: If the table does not hold it.
        """
        found = self.layers.get(layer, {}).get(precision)
        if found is None:
            raise ConfigurationError(
                f"the times of layers do not hold layer {layer!r} in {precision}; they were measured for other "
                "candidates, another model or another backend. Leave times out, or give another file, to measure them"
            )
        return found

    def estimate(self, chosen: Mapping[str, str]) -> float:
        """The time of a call in which layers have these precisions.

        Raises:
            ConfigurationError: If the table lacks one of them.
        """
        return self.rest + sum(self.of(layer, precision) for layer, precision in chosen.items())

    def save(self, path: str | Path) -> None:
        """Write a JSON file, completely or not at all.

        Raises:
            WriteError: If the file cannot be written.
        """
        data = {"format": _FORMAT, **asdict(self)}
        check(LayerTimesFile, data, "what would be saved")
        with whole_file(Path(path)) as file:
            file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LayerTimes:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: If there is no such file, it is damaged, or a newer fxquant wrote it.
        """
        made_by = "fxquant search writes such a file with --times"
        what = "file of layer times"
        with reading(Path(path), LayerTimesFile, format=_FORMAT, what=what, made_by=made_by) as data:
            return cls(**{name: value for name, value in data.items() if name != "format"})
