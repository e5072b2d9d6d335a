"""Schema of ``plan.json`` (:class:`fxquant.planning.plan.Plan`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fxquant.schemas.calls import Call
from fxquant.schemas.common import (
    Ascending,
    Bits,
    Count,
    Digest,
    Entry,
    Finite,
    FloatDtypeName,
    Name,
    Schema,
    Size,
    Text,
)

_MOST_PASSES = 200
_MOST_CALLS = 256
Side = Literal["q", "k", "v"]
DecisionsOfPass = Annotated[dict[Name, dict[Name, Any]], Field(max_length=100_000)]
Bound = Finite | Annotated[list[Finite], Field(fail_fast=True, min_length=1, max_length=10_001)]


class Range(Entry):
    """An :class:`fxquant.planning.decisions.ActivationRange`."""

    low: Bound
    high: Bound
    method: Name

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if isinstance(self.low, list) != isinstance(self.high, list):
            raise ValueError("low and high should both be numbers, or both lists")
        lows, highs = (end if isinstance(end, list) else [end] for end in (self.low, self.high))
        if len(lows) != len(highs):
            raise ValueError("low should have as many numbers as high")
        if any(low > high for low, high in zip(lows, highs, strict=True)):
            raise ValueError("low should not be above high")
        return self


class Balance(Entry):
    """A :class:`fxquant.planning.decisions.Balance`."""

    cost: Name
    into: list[Text] = Field(default_factory=list)
    channels: Size = 0
    group: Name | None = None
    reason: Text | None = None


class Shift(Entry):
    """A :class:`fxquant.planning.decisions.Shift`."""

    cost: Name
    into: list[Text] = Field(default_factory=list)
    channels: Size = 0
    reason: Text | None = None
    balanced: bool = False


class Groups(Entry):
    """An :class:`fxquant.planning.decisions.TimestepGroups`."""

    boundaries: Ascending
    dendrogram: Annotated[
        list[Annotated[list[float], Field(max_length=8)]], Field(fail_fast=True, max_length=10_000)
    ] = Field(default_factory=list)
    reason: Text | None = None
    bits: Annotated[list[Bits], Field(fail_fast=True, max_length=10_001)] | None = None


class Layer(Entry):
    """An :class:`fxquant.planning.decisions.LayerPlan`."""

    kind: Name
    role: Name
    shape: Annotated[list[Size], Field(min_length=2, max_length=2)]
    weight_bits: Bits | None
    activation_bits: Bits | None
    group_size: Size = 0
    observed: Name | None = None
    activation: Range | None = None
    balance: Balance | None = None
    shift: Shift | None = None
    spread: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    weight_sqnr_db: float | None = None
    activation_sqnr_db: float | None = None
    timesteps: Groups | None = None
    reason: Text | None = None
    weight_format: Name | None = None  # Not in plans of integers.
    activation_format: Name | None = None
    group_rows: Size = 1

    @model_validator(mode="after")
    def _a_range_a_bin(self) -> Layer:
        bins = len(self.timesteps.boundaries) + 1 if self.timesteps else 1
        if self.activation is not None and isinstance(self.activation.low, list) and len(self.activation.low) != bins:
            raise ValueError(f"there are {len(self.activation.low)} ranges for {bins} bins of timesteps")
        self._check_bits(bins)
        return self

    def _check_bits(self, bins: int) -> None:
        bits = self.timesteps.bits if self.timesteps else None
        if bits is None:
            return
        if len(bits) != bins:
            raise ValueError(f"there are bits for {len(bits)} of {bins} bins of timesteps")
        if self.activation_bits is None or self.activation_format is not None or max(bits) > self.activation_bits:
            raise ValueError("bits of bins of timesteps should be those of integers, and at most activation_bits")
        if self.activation is not None and not isinstance(self.activation.low, list) and bins > 1:
            raise ValueError("a layer with bits for each bin of timesteps should have a range for each")


class Attention(Entry):
    """An :class:`fxquant.planning.decisions.AttentionPlan`."""

    bits: Bits | None
    softmax_bits: Bits | None = None
    observed: dict[Side, Name] = Field(default_factory=dict)
    ranges: dict[Side, Range] = Field(default_factory=dict)
    sqnr_db: dict[Side, float] = Field(default_factory=dict)
    reason: Text | None = None
    format: Name | None = None

    @model_validator(mode="after")
    def _static(self) -> Attention:
        if any(isinstance(found.low, list) for found in self.ranges.values()):
            raise ValueError("q, k and v of an attention should have one range each, for all timesteps")
        return self


class LogEntry(Schema):
    """What one pass did."""

    seconds: float
    edits: Count
    ops: dict[Name, int]
    changes: dict[Name, Count] = Field(default_factory=dict)  # Not in plans of earlier versions.
    module: Name | None = None  # For a pass of another package: where it is defined.


class PlanFile(Schema):
    """The file: an :class:`fxquant.planning.plan.Plan` without its vectors."""

    recipe: Text
    model_class: Annotated[Name, Field(pattern=r"^[^:]*:[^:]+$")] | Literal[""]
    timestep: Name | None
    calls: Annotated[list[Call], Field(fail_fast=True, max_length=_MOST_CALLS)]
    layers: Annotated[dict[Name, Layer], Field(max_length=20_000)]
    timesteps: Ascending
    output_sqnr_db: Annotated[list[Annotated[list[float], Field(min_length=2, max_length=2)]], Field(fail_fast=True)]
    bytes_before: Count
    bytes_after: Count
    backend: Name
    passes: Annotated[list[LogEntry], Field(fail_fast=True, max_length=_MOST_PASSES)]
    naming: Count = 1
    observed_step: Count | None = None
    later_steps: Count = 0
    reconstruction: Annotated[dict[Name, list[float]], Field(max_length=20_000)] = Field(default_factory=dict)
    attentions: Annotated[dict[Name, Attention], Field(max_length=20_000)] = Field(default_factory=dict)
    products: Annotated[dict[Name, Text], Field(max_length=20_000)] = Field(default_factory=dict)
    pass_decisions: Annotated[dict[Name, DecisionsOfPass], Field(max_length=_MOST_PASSES)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agrees(self) -> PlanFile:
        if self.recipe.count(",") + 1 > _MOST_PASSES:
            raise ValueError(f"the recipe has more than {_MOST_PASSES} passes")
        if len(self.timesteps) > 1 and any(self.timestep not in call.names for call in self.calls):
            raise ValueError(f"the timestep {self.timestep!r} is not an input of the recorded calls")
        for number, call in enumerate(self.calls):
            if any(call == other for other in self.calls[:number]):
                raise ValueError("two of the recorded calls are the same")
        return self


class SavedAdapter(Entry):
    """A LoRA in a checkpoint: its alpha, and its scale with the weight that it was given, by layer."""

    name: Name
    alphas: Annotated[dict[Name, Finite], Field(max_length=100_000)]
    scales: Annotated[dict[Name, Finite], Field(max_length=100_000)]


class SavedAdapters(Entry):
    """The LoRAs in a checkpoint, and which of them are active."""

    adapters: Annotated[list[SavedAdapter], Field(min_length=1, max_length=1_000)]
    active: Annotated[list[Name], Field(max_length=1_000)]
    disabled: bool


class CheckpointFile(PlanFile):
    """The file in a checkpoint, where it also describes the other files."""

    dtype: FloatDtypeName
    dtypes: Annotated[dict[Name, FloatDtypeName], Field(max_length=100_000)]
    needs_model: Text | None = None
    infinite: list[Name] | None = None
    digests: list[Name | None] | None = None
    graphs: list[Name | None] | None = None  # Digests in earlier files; see fxquant.storage.checkpoint.
    made_with: dict[Name, Name] | None = None
    adapters: SavedAdapters | None = None
    files: dict[Name, Digest]
