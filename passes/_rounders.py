"""How a weight is rounded: to nearest, or by what calibration saw of the layer's input."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fxquant.errors import CalibrationError, ConfigurationError, NonFiniteError
from fxquant.numerics.formats import is_integer
from fxquant.numerics.rounding.adaround import adaround
from fxquant.numerics.rounding.feedback import FEW, ErrorFeedback, is_few
from fxquant.numerics.rounding.gptq import gptq
from fxquant.numerics.weights import QuantizedWeight
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.layer_inputs import moment_rows, moments


class RangeSearch(enum.Enum):
    """How the range of a scale is found; see :mod:`fxquant.numerics.ranges`."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"


class Rounding(enum.Enum):
    """How a weight is rounded to one of its two neighbouring codes."""

    NEAREST = "nearest"
    GPTQ = "gptq"
    ADAROUND = "adaround"


class Rounder(Protocol):
    """A rounding method that uses more than the values of the weight itself.

    Its text, the representation of the dataclass, holds all of its options.
    """

    def inputs(self, name: str, context: PassContext) -> Tensor:
        """All that it reads of the inputs of a layer, float64: second moments ``[in, in]``, or few rows ``[n, in]``.

        Raises:
            CalibrationError: If there are none.
        """

    def quantize(
        self, name: str, layer: LayerPlan, values: Tensor, context: PassContext, method: RangeSearch, symmetric: bool
    ) -> QuantizedWeight:
        """Round the weight of a layer to the format of its entry in the plan, or of a copy with another format.

        Raises:
            CalibrationError: If there are no second moments of the layer's input.
        """


@dataclass(frozen=True)
class GPTQ:
    """Rounds weights by the second moments of their inputs; see :mod:`fxquant.numerics.rounding.gptq`."""

    damping: float
    activation_order: bool

    def inputs(self, name: str, context: PassContext) -> Tensor:
        """See :class:`Rounder`."""
        _require_statistics(name, context, "GPTQ")
        rows = moment_rows(context, name, FEW)
        return rows if rows is not None and is_few(rows) else _moments(name, context, "GPTQ")

    def quantize(
        self, name: str, layer: LayerPlan, values: Tensor, context: PassContext, method: RangeSearch, symmetric: bool
    ) -> QuantizedWeight:
        """See :class:`Rounder`."""
        assert layer.format_of_weight is not None
        return gptq(
            values,
            self._feedback(name, context),
            format=layer.format_of_weight.name,
            group_size=layer.group_size,
            group_rows=layer.group_rows,
            symmetric=symmetric,
            method=method.value,
        )

    def _feedback(self, name: str, context: PassContext) -> ErrorFeedback:
        """Error feedback of the layer's input. It is large, so only that of the latest input is kept."""
        key = moments_key(name, context)
        kept, feedback = context.memo.get("feedback", (None, None))
        if kept != key:
            context.memo.pop("feedback", None)
            try:
                feedback = self._factorized(self.inputs(name, context))
            except NonFiniteError as error:
                raise NonFiniteError(f"layer {name}: {error}") from None
            context.memo["feedback"] = key, feedback
        assert isinstance(feedback, ErrorFeedback)
        return feedback

    def _factorized(self, inputs: Tensor) -> ErrorFeedback:
        if is_few(inputs):
            return ErrorFeedback.of_rows(inputs, self.damping, self.activation_order)
        return ErrorFeedback.of(inputs, self.damping, self.activation_order, overwrite=True)


@dataclass(frozen=True)
class AdaRound:
    """Learns how to round weights from second moments of inputs; see :mod:`fxquant.numerics.rounding.adaround`."""

    def inputs(self, name: str, context: PassContext) -> Tensor:
        """See :class:`Rounder`."""
        _require_statistics(name, context, "AdaRound")
        return _moments(name, context, "AdaRound")

    def quantize(
        self, name: str, layer: LayerPlan, values: Tensor, context: PassContext, method: RangeSearch, symmetric: bool
    ) -> QuantizedWeight:
        """See :class:`Rounder`."""
        assert layer.format_of_weight is not None
        refuse_learned_rounding(name, layer)
        try:
            return adaround(
                values,
                self.inputs(name, context),
                format=layer.format_of_weight.name,
                group_size=layer.group_size,
                symmetric=symmetric,
                method=method.value,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"layer {name}: {error}") from None


def refuse_learned_rounding(name: str, layer: LayerPlan) -> None:
    """Refuse to learn the rounding of a weight that does not lie between two integers of one scale per row and group.

    Raises:
        ConfigurationError: Names the layer and says what to choose instead.
    """
    format = layer.format_of_weight
    if format is not None and (not is_integer(format.name) or layer.group_rows != 1):
        what = format.name if layer.group_rows == 1 else "scales of several output channels"
        raise ConfigurationError(
            f"layer {name}: learned rounding chooses between two neighbouring integers of an output channel, and its "
            f"weight has {what}; choose rounding=gptq or rounding=nearest"
        )


def moments_key(name: str, context: PassContext) -> str:
    """Layers with the same key have the same second moments, because they read one value."""
    # Unless each has weights of the timesteps of its own.
    return name if name in context.timestep_weights else context.plan.layer(name).observed or name


def _require_statistics(name: str, context: PassContext, method: str) -> None:
    context.observed(context.plan.layer(name).observed or name, f"layer {name!r} is rounded by {method}")


def _moments(name: str, context: PassContext, method: str) -> Tensor:
    together = moments(context, name)
    if together is None:
        raise CalibrationError(
            f"layer {name!r} is rounded by {method} and there are no second moments of its input; let calibration "
            "record them, or choose rounding=nearest"
        )
    return together
