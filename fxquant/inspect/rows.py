"""The rows of a report: one per layer, attention and pass, and the totals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COSTS = ("free", "vector", "tokens", "not")
"""What balancing a layer costs at run time, cheapest first; ``not`` means that the layer was not balanced."""


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: Stable name, such as ``transformer_blocks.3.attn1.to_q``.
        kind: ``linear``, ``conv`` or ``embedding``.
        role: Part of the network: ``block``, ``adaln``, ``embedder``, ``patch`` or ``final``.
        kernel: What runs it on the plan's backend.
        precision: Bits as text: ``w4a8``, ``w4a16-g64``, ``float``.
        weight_bits: Bits per weight, None for float.
        activation_bits: Bits per activation, None for float.
        group_size: Input channels per weight group, 0 for one group per row.
        shape: Output and input features.
        cost: ``free``, ``vector``, ``tokens`` or ``not``; None for a layer that was not to be balanced.
        absorbed_into: What absorbed the balance factors.
        balanced_channels: Number of balanced input channels.
        reason: Why some or all channels were not balanced.
        shift_cost: What shifting its input costs at run time, as ``cost``; None if no shift was requested.
        timestep_bins: Number of timestep bins that its shift and its range depend on.
        activation_low: Smallest input that the static range contains.
        activation_high: Largest input that the static range contains.
        spread: Smallest and largest maximum of |input| over the calibrated timesteps.
        weight_sqnr_db: Signal to quantization noise of the weight, in dB.
        activation_sqnr_db: Signal to quantization noise of the sampled inputs, in dB.
        float_because: Why its weight stays float, or None.
        bytes_before: Bytes of its weight in the float model.
        bytes_after: Bytes of its weight as checkpoints store it, with scales and zero points, and of a low-rank branch.
        one_bin_because: Why all timesteps share one bin although they were to be grouped, or None.
    """

    name: str
    kind: str
    role: str
    kernel: str
    precision: str
    weight_bits: int | None
    activation_bits: int | None
    group_size: int
    shape: tuple[int, int]
    cost: str | None
    absorbed_into: tuple[str, ...]
    balanced_channels: int
    reason: str | None
    shift_cost: str | None
    timestep_bins: int
    activation_low: float | None
    activation_high: float | None
    spread: tuple[float, float] | None
    weight_sqnr_db: float | None
    activation_sqnr_db: float | None
    float_because: str | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    one_bin_because: str | None = None


@dataclass(frozen=True)
class AttentionReport:
    """The two matrix products of one attention.

    Attributes:
        name: Path of its module, such as ``transformer_blocks.3.attn1``.
        kernel: What runs them on the plan's backend.
        bits: Bits of q, k and v, None for float.
        softmax_bits: Bits of the softmax output, None for float.
        ranges: Smallest and largest value that the static ranges of ``q``, ``k`` and ``v`` contain.
        sqnr_db: Signal to quantization noise of the sampled values of each, in dB.
        reason: Why the products stay float, or None.
    """

    name: str
    kernel: str
    bits: int | None
    softmax_bits: int | None
    ranges: Mapping[str, tuple[float, float]]
    sqnr_db: Mapping[str, float]
    reason: str | None


@dataclass(frozen=True)
class DecisionReport:
    """One decision of a pass for which the plan has no field of its own.

    Attributes:
        of: Name of the pass.
        name: What the decision is about, such as a layer.
        values: What was decided, by field; of a tensor its dtype and shape, such as ``float32[64, 64]``.
    """

    of: str
    name: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Totals:
    """The model as a whole.

    Attributes:
        bytes_before: Size of the float model's tensors.
        bytes_after: Size of the quantized model's tensors.
        ratio: How many times smaller the model became; None if a size is not known.
        mean_sqnr_db: Mean over timesteps of the output SQNR, in dB; None if it was not measured.
        worst_sqnr_db: The lowest output SQNR of a timestep, in dB.
        worst_timestep: The timestep with the lowest output SQNR; None for a model without a timestep.
        layers_by_precision: Number of layers by precision, most frequent first.
        balance_by_cost: Number of layers that were to be balanced, by the cost of absorbing the balance factors.
    """

    bytes_before: int
    bytes_after: int
    ratio: float | None
    mean_sqnr_db: float | None
    worst_sqnr_db: float | None
    worst_timestep: float | None
    layers_by_precision: Mapping[str, int]
    balance_by_cost: Mapping[str, int]


@dataclass(frozen=True)
class PassReport:
    """What one pass did: its text, wall time in seconds, number of edits and change in the number of nodes by op."""

    text: str
    seconds: float
    edits: int
    ops: Mapping[str, int]
