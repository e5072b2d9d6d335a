"""Schema of files of sensitivities (:class:`fxquant.planning.sensitivities.Sensitivities`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fxquant.schemas.attribution import Ratio
from fxquant.schemas.common import Digest, Entry, Finite, Name, Size, Text

Count = Annotated[int, Field(ge=0, lt=2**53)]
Row = Annotated[list[Ratio | Literal["inf"] | None], Field(fail_fast=True, max_length=10_000)]
Matrix = Annotated[list[Row], Field(fail_fast=True, max_length=100_000)]


class LayerEntry(Entry):
    """One layer; the matrices have one row per precision and one column per timestep."""

    weights: Count
    macs: Count
    reads: Name
    precisions: Annotated[list[Name], Field(max_length=1_000)]
    bytes: Annotated[list[Count], Field(max_length=1_000)]
    estimated: Matrix
    measured: Matrix
    all_but: Matrix
    shares: Name | None = None

    @model_validator(mode="after")
    def _shaped(self) -> LayerEntry:
        for name in ("bytes", "estimated", "measured", "all_but"):
            if len(getattr(self, name)) != len(self.precisions):
                raise ValueError(f"{name} should have one row per precision")
        if len(set(self.precisions)) != len(self.precisions):
            raise ValueError("a precision occurs twice")
        return self


class SensitivitiesFile(Entry):
    """The file."""

    format: Size
    made_for: Digest
    digest: Digest
    recipe: Text
    weights: Text
    base: Name
    model_class: Text
    precisions: Annotated[list[Name], Field(max_length=1_000)]
    timesteps: Annotated[list[Finite], Field(max_length=10_000)]
    layers: Annotated[dict[Name, LayerEntry], Field(max_length=100_000)]
    output: dict[Name, Row]
    bytes_before: Count
    bytes_fixed: Count
    samples: Size
    probes: Size
    seconds: Ratio
    left_out: dict[Name, Text]

    @model_validator(mode="after")
    def _shaped(self) -> SensitivitiesFile:
        count = len(self.timesteps)
        rows = [row for one in self.layers.values() for m in (one.estimated, one.measured, one.all_but) for row in m]
        if any(len(row) != count for row in (*rows, *self.output.values())):
            raise ValueError("each row should have one number per timestep")
        if len(set(self.timesteps)) != count:
            raise ValueError("a timestep occurs twice")
        return self
