"""Schema of ``errors.json`` (:class:`fxquant.planning.attribution.Attribution`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from fxquant.schemas.common import Digest, Entry, Finite, Name, Size, Text

Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Row = Annotated[list[Ratio | None], Field(fail_fast=True, max_length=10_000)]
Matrix = Annotated[list[Row], Field(fail_fast=True, max_length=100_000)]


class AttributionFile(Entry):
    """The file. Each matrix has one row per layer and one column per timestep; null where nothing was measured."""

    format: Size
    plan: Digest
    digest: Digest
    method: Text
    samples: Size
    probes: Size
    seconds: Ratio
    timesteps: Annotated[list[Finite], Field(max_length=10_000)]
    layers: Annotated[list[Name], Field(max_length=100_000)]
    output: Row
    local: Matrix
    weights: Matrix
    inputs: Matrix
    estimated: Matrix
    measured: Matrix
    left_out: dict[Name, Text]

    @model_validator(mode="after")
    def _shaped(self) -> AttributionFile:
        if len(self.output) != len(self.timesteps):
            raise ValueError("there should be one output error per timestep")
        for name in ("local", "weights", "inputs", "estimated", "measured"):
            matrix = getattr(self, name)
            if len(matrix) != len(self.layers) or any(len(row) != len(self.timesteps) for row in matrix):
                raise ValueError(f"{name} should have one row per layer and one column per timestep")
        if len(set(self.layers)) != len(self.layers) or len(set(self.timesteps)) != len(self.timesteps):
            raise ValueError("a layer or timestep occurs twice")
        return self
