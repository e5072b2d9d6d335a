"""What balancing a float model did, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate
from torch import Tensor

from fxquant.planning.context import PassContext
from fxquant.planning.layer_inputs import layer_input
from fxquant.planning.plan import Plan
from fxquant.text import decimal, pattern_of, without_numbers


@dataclass(frozen=True)
class BalancedLayer:
    """One linear of a balanced model.

    Attributes:
        name: Path of the module.
        channels: Number of its input channels.
        balanced: Number of input channels with a factor of their own.
        shifted: Number of input channels with a shift.
        ratio_before: Largest activation of a channel against that of the median channel, before balancing.
        ratio_after: The same, after balancing.
        into: Modules, parameters or nodes that absorbed factors and shifts.
        reason: Why some or all channels stayed as they were, or None.
        largest: Largest absolute value of its input after balancing, over all timesteps.
    """

    name: str
    channels: int
    balanced: int
    shifted: int
    ratio_before: float
    ratio_after: float
    into: tuple[str, ...] = ()
    reason: str | None = None
    largest: float = 0.0


@dataclass(frozen=True)
class BalanceReport:
    """What :func:`fxquant.balance` did; the attribute ``balance_report`` of the model that it returns.

    Attributes:
        recipe: The passes that ran.
        layers: The linears that the recipe considered.
        parameters: Names of the parameters that changed.
        error: Largest difference of an output from that of the original model, relative to the largest element, over
            the compared calibration calls.
        calls: Number of calls that were compared.
        unread: Names of parameters that no calibration call read. Calls that read them were not examined.
    """

    recipe: str
    layers: tuple[BalancedLayer, ...]
    parameters: tuple[str, ...]
    error: float
    calls: int
    unread: tuple[str, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)

    def table(self) -> str:
        """The report as text: similar layers of all blocks in one row, then the reasons and the measured error."""
        groups: dict[tuple[object, ...], list[BalancedLayer]] = {}
        for layer in self.layers:
            alike = (pattern_of(layer.name), layer.balanced, layer.shifted, without_numbers(layer.reason))
            groups.setdefault(alike, []).append(layer)
        head = ["layer", "layers", "balanced", "shifted", "ratio before", "ratio after"]
        text = [tabulate([_row(group) for group in groups.values()], head, tablefmt="simple", disable_numparse=True)]
        reasons: dict[str, list[str]] = {}
        for group in groups.values():
            if group[0].reason is not None:
                reasons.setdefault(without_numbers(group[0].reason) or "", []).append(pattern_of(group[0].name))
        text += [f"left as it is: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
        text.append(
            f"{len(self.parameters)} parameters changed; largest relative error of an output {self.error:.1e} on "
            f"{self.calls} calls"
        )
        if self.unread:
            text.append(f"{len(self.unread)} parameters were not read by calibration, such as {self.unread[0]}")
        return "\n".join(text)


def _row(group: Sequence[BalancedLayer]) -> list[str]:
    first = group[0]
    ratios = ([layer.ratio_before for layer in group], [layer.ratio_after for layer in group])
    shown = [decimal(min(own)) if len(group) == 1 else f"{decimal(min(own))} to {decimal(max(own))}" for own in ratios]
    counts = [f"{count} of {first.channels}" if count else "-" for count in (first.balanced, first.shifted)]
    return [pattern_of(first.name), str(len(group)), *counts, *shown]


def balanced_layers(context: PassContext, before: Plan) -> list[BalancedLayer]:
    """One entry for each layer that a plan decided about.

    Args:
        context: The statistics, and the plan with the decisions.
        before: The plan without decisions about factors and shifts.
    """
    found, plain = [], PassContext(before, context.statistics)
    for name, layer in context.plan.layers.items():
        balance, shift = layer.balance, layer.shift
        decided = [one for one in (balance, shift) if one is not None]
        if not decided:
            continue
        reasons = [one.reason for one in decided if one.reason is not None]
        after = layer_input(context, name).absmax
        found.append(
            BalancedLayer(
                name,
                layer.shape[1],
                0 if balance is None else balance.channels,
                0 if shift is None else shift.channels,
                _ratio(layer_input(plain, name).absmax),
                _ratio(after),
                tuple(dict.fromkeys(place for one in decided for place in one.into)),
                reasons[0] if reasons else None,
                float(after.max()),
            )
        )
    return found


def _ratio(absmax: Tensor) -> float:
    """Largest activation of a channel against that of the median channel, over all timesteps."""
    tops = absmax.amax(dim=0)
    return float(tops.max() / tops.median().clamp_min(1e-30))
