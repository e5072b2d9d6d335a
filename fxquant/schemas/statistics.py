"""Schema of the header of a file of statistics (:mod:`fxquant.statistics.file`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from fxquant.schemas.calls import Call
from fxquant.schemas.common import Count, Entry, Finite, Name, Schema, Size

_MOST_KINDS = 256
_MOST_CALLS = 100_000


class Run(Entry):
    """A :class:`fxquant.statistics.kept_calls.Run`."""

    model_class: Name
    weights: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    timestep: Name | None
    step: Count | None = None
    later: Count = 0
    prepared: list[str] = Field(default_factory=list)  # Not in files of earlier versions.


class KeptCall(Entry):
    """A :class:`fxquant.statistics.kept_calls.KeptCall`; the inputs are names of tensors."""

    kind: Size
    timestep: Finite
    number: Count
    priority: Annotated[float, Field(ge=0, le=1)]
    inputs: Annotated[list[Name], Field(max_length=2000)]


class StatisticsFile(Schema):
    """The header."""

    version: Size
    num_rows: Annotated[int, Field(ge=1, lt=2**31)] | None
    seed: int
    keys: dict[Name, Annotated[list[int], Field(fail_fast=True)]]
    keep_calls: Size = 0
    seen_calls: Count | None = None  # Not in files of earlier versions.
    run: Run | None = None
    kinds: Annotated[list[Call], Field(max_length=_MOST_KINDS)] = Field(default_factory=list)
    calls: Annotated[list[KeptCall], Field(fail_fast=True, max_length=_MOST_CALLS)] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fits(self) -> StatisticsFile:
        for call in self.calls:
            if call.kind >= len(self.kinds):
                raise ValueError(f"a kept call is of kind {call.kind}, but there are {len(self.kinds)} kinds")
            if self.seen_calls is not None and call.number >= self.seen_calls:
                raise ValueError(f"kept call number {call.number} is not among the {self.seen_calls} calls that came")
            tensors = sum(leaf.shape is not None for leaf in self.kinds[call.kind].leaves)
            if len(call.inputs) != tensors:
                raise ValueError(f"a kept call has {len(call.inputs)} inputs, and its kind has {tensors}")
        return self
