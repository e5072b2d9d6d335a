"""The entries of a plan: what passes decide about one layer or one attention."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fxquant.errors import ConfigurationError
from fxquant.ir.time_tables import bin_of
from fxquant.numerics.formats import FORMATS, Format, format_of
from fxquant.planning.precision import Precision


@dataclass
class Balance:
    """How the input channels of a layer were balanced against its weight.

    Attributes:
        cost: ``free``, ``vector`` or ``tokens``; ``not`` when nothing was balanced.
        into: What absorbed the factors.
        channels: Number of balanced input channels.
        group: First layer of the group whose factors were decided together.
        reason: Why some or all channels were left alone.
    """

    cost: str
    into: list[str] = field(default_factory=list)
    channels: int = 0
    group: str | None = None
    reason: str | None = None


@dataclass
class ActivationRange:
    """Static range of a layer's input: real values ``low`` to ``high``, found by ``method``; a list has one per bin."""

    low: float | list[float]
    high: float | list[float]
    method: str

    @property
    def ends(self) -> tuple[list[float], list[float]]:
        """The low and the high ends as lists, with one number for each bin that has a range of its own."""
        low, high = (end if isinstance(end, list) else [end] for end in (self.low, self.high))
        return low, high


@dataclass
class Shift:
    """How the input channels of a layer were shifted; the attributes not listed here are those of :class:`Balance`.

    Attributes:
        balanced: Whether the input was balanced before; the shift then applies to the balanced input.
    """

    cost: str
    into: list[str] = field(default_factory=list)
    channels: int = 0
    reason: str | None = None
    balanced: bool = False


@dataclass
class TimestepGroups:
    """Which timesteps share the values that depend on the timestep.

    Attributes:
        boundaries: Boundaries between the bins, ascending; empty for one bin.
        dendrogram: How neighbouring groups were merged, the closest first. Each entry holds the first timesteps of the
            two groups and their squared distance. To get other groups, edit the boundaries.
        reason: Why there is only one bin, or None.
        bits: Bits of the input in each bin, one more than boundaries; None for those of the layer in every bin.
    """

    boundaries: list[float]
    dendrogram: list[list[float]] = field(default_factory=list)
    reason: str | None = None
    bits: list[int] | None = None


@dataclass
class LayerPlan:
    """What was decided for one layer.

    Attributes:
        kind: ``linear``, ``conv`` or ``embedding``.
        role: Part of the network: ``block``, ``adaln``, ``embedder``, ``patch`` or ``final``.
        shape: Output and input features; for a convolution input channels times kernel elements.
        weight_bits: 2 to 8, or None for float weights.
        activation_bits: 2 to 8, or None for float activations.
        group_size: Input channels per weight group; 0 for one group per row. For formats with blocks, the block.
        observed: Key of the calibration statistics of its input.
        activation: Range of its input.
        balance: How its input was balanced.
        spread: Smallest and largest maximum of |input| over the calibrated timesteps.
        weight_sqnr_db: Signal to quantization noise of the weight, in dB.
        activation_sqnr_db: Signal to quantization noise of the sampled inputs, in dB.
        timesteps: The bins of timesteps that its shift and its range depend on; None for one bin.
        shift: How its input was shifted.
        reason: Why its weight, or its activations, stay float; None if neither does. Plans of earlier versions give
            reasons for weights only.
        weight_format: Name of the weight's number format; None for integers of ``weight_bits`` bits.
        activation_format: Name of the input's number format; None for integers of ``activation_bits`` bits.
        group_rows: Output channels that share a scale of the weight; 0 for all.
    """

    kind: str
    role: str
    shape: list[int]
    weight_bits: int | None
    activation_bits: int | None
    group_size: int = 0
    observed: str | None = None
    activation: ActivationRange | None = None
    balance: Balance | None = None
    spread: list[float] | None = None
    weight_sqnr_db: float | None = None
    activation_sqnr_db: float | None = None
    timesteps: TimestepGroups | None = None
    shift: Shift | None = None
    reason: str | None = None
    weight_format: str | None = None
    activation_format: str | None = None
    group_rows: int = 1

    @property
    def precision(self) -> Precision:
        """Formats as one value; prints as ``w4a8``."""
        weights = None if self.weight_bits is None else self.weight_format
        activations = None if self.activation_bits is None else self.activation_format
        bits = self.weight_bits, self.activation_bits
        return Precision(*bits, self.group_size, weights, activations, self.group_rows)

    @property
    def format_of_weight(self) -> Format | None:
        """The number format of its weight; None for float."""
        return format_of(self.weight_bits, self.weight_format)

    @property
    def format_of_input(self) -> Format | None:
        """The number format of its input; None for float."""
        return format_of(self.activation_bits, self.activation_format)

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Boundaries between bins of timesteps, ascending."""
        return tuple(self.timesteps.boundaries) if self.timesteps else ()

    @property
    def formats_of_input(self) -> list[Format]:
        """The number format of its input in each bin of timesteps.

        Raises:
            ConfigurationError: If its input is float.
        """
        if self.format_of_input is None:
            raise ConfigurationError("the input of a float layer has no number format")
        bits = self.timesteps.bits if self.timesteps else None
        if bits is None:
            return [self.format_of_input] * (len(self.boundaries) + 1)
        return [FORMATS[f"int{own}"] for own in bits]

    def bins(self, timesteps: Tensor) -> Tensor:
        """Bin of each of these timesteps: int64, of the same shape."""
        return bin_of(self.boundaries, timesteps)


@dataclass
class AttentionPlan:
    """What was decided for the two matrix products of one attention.

    Attributes:
        bits: Bits of q, k and v, 2 to 8; None for float products.
        softmax_bits: Bits of the softmax output; None before they are decided.
        observed: Keys of the calibration statistics of ``q``, ``k`` and ``v``.
        ranges: Range of each of the three; for q, the range of the value that is multiplied with k.
        sqnr_db: Signal to quantization noise of the sampled values of each, in dB.
        reason: Why the products stay float, or None.
        format: Name of the number format of q, k and v; None for integers of ``bits`` bits.
    """

    bits: int | None
    softmax_bits: int | None = None
    observed: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, ActivationRange] = field(default_factory=dict)
    sqnr_db: dict[str, float] = field(default_factory=dict)
    reason: str | None = None
    format: str | None = None
