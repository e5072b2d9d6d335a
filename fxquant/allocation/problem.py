"""Which precision each layer gets: a knapsack with ties, solved as an integer program.

Let x[l, p] be 1 if layer l gets precision p. To first order the errors of layers add up, so at timestep t the model's
error is about ``E_t(x) = sum over l, p of error[l, p, t] x[l, p]``. The program minimizes ``sum over t of w_t E_t(x)``
with one precision per layer and a bound on a cost that is a sum over layers, such as bytes.

The mean SQNR in dB is minus the mean of ``10 log10 E_t``, which is concave in x. So it is maximized by a few programs
in turn, each with ``w_t = 1 / E_t`` at the last solution: the tangent of the logarithm is above it, so no step makes
the objective worse. The sum of errors is dominated by the worst timestep; the logarithm counts every timestep alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp

from fxquant.allocation.candidates import Candidate
from fxquant.errors import ConfigurationError
from fxquant.planning.sensitivities import Sensitivities

Floats = npt.NDArray[np.float64]

_TINY = 1e-30
_ROUNDS = 6
_GAP = 1e-4
"""Relative distance from the best solution at which the solver stops; a time limit would depend on the machine."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What can be chosen, and what it costs.

    Attributes:
        options: By layer, the names of its options.
        errors: By layer, ``[options, timesteps]``: error of the output from this layer alone, relative. Options with
            infinite errors are not chosen.
        costs: By layer, ``[options]``, for example bytes.
        fixed: Cost of everything else.
        ties: Sets of layers that read the same value: each maps a layer to what the options have to agree in, one value
            per option, such as the activation's format.
    """

    options: Mapping[str, Sequence[str]]
    errors: Mapping[str, Floats]
    costs: Mapping[str, Floats]
    fixed: float
    ties: Sequence[Mapping[str, Sequence[str]]] = ()

    def cost(self, chosen: Mapping[str, str]) -> float:
        """The cost of a choice."""
        return self.fixed + float(sum(self.costs[name][self._place(name, chosen)] for name in self.options))

    def error(self, chosen: Mapping[str, str]) -> Floats:
        """Estimated error of the output at each timestep: ``[timesteps]``."""
        return np.sum([self.errors[name][self._place(name, chosen)] for name in self.options], axis=0)

    def mean_db(self, chosen: Mapping[str, str]) -> float:
        """Estimated SQNR in dB, mean over timesteps."""
        return float(-10 * np.log10(np.maximum(self.error(chosen), _TINY)).mean())

    def _place(self, name: str, chosen: Mapping[str, str]) -> int:
        return list(self.options[name]).index(chosen[name])

    def cheapest(self) -> dict[str, str]:
        """The choice of the smallest cost.

        Raises:
            ConfigurationError: If no choice satisfies the ties.
        """
        found = self._solve(dict(self.costs), None)
        if found is None:
            raise ConfigurationError("layers that read the same value have no activation precision in common")
        return found

    def best(self, limit: float | None = None) -> dict[str, str] | None:
        """The choice with the best mean SQNR whose cost is at most ``limit``; None if there is none.

        Args:
            limit: The highest cost; None for no limit.
        """
        steps = next(iter(self.errors.values())).shape[1]
        starts = [np.ones(steps)]
        if steps > 1:  # The tangents lead to a solution near where they start.
            starts += [1 / np.maximum(self.error(end), _TINY) for end in (self.cheapest(), self._richest())]
        found = [one for weights in starts if (one := self._descended(weights, limit)) is not None]
        return max(found, key=self.mean_db, default=None)

    def _richest(self) -> dict[str, str]:
        """The option with the smallest error in every layer, whatever it costs and whether ties are met."""
        return {name: self.options[name][int(np.argmin(own.sum(axis=1)))] for name, own in self.errors.items()}

    def _descended(self, weights: Floats, limit: float | None) -> dict[str, str] | None:
        """The last of the programs in turn, beginning with some weights of timesteps."""
        best, quality = None, -np.inf
        for _ in range(_ROUNDS):
            found = self._solve({name: error @ weights for name, error in self.errors.items()}, limit)
            if found is None or self.mean_db(found) <= quality + 1e-9:
                break
            best, quality = found, self.mean_db(found)
            weights = 1 / np.maximum(self.error(found), _TINY)
        return best

    def _solve(self, objective: Mapping[str, Floats], limit: float | None) -> dict[str, str] | None:
        names = list(self.options)
        starts = np.cumsum([0, *(len(self.options[name]) for name in names)])
        count = int(starts[-1])
        place = dict(zip(names, starts[:-1].tolist(), strict=True))
        # Options with infinite errors are never chosen; the solver takes finite numbers only.
        usable = np.concatenate([np.isfinite(self.errors[name]).all(axis=1) for name in names])
        c = np.where(usable, np.concatenate([objective[name] for name in names]), 0.0)
        c = c / max(float(np.abs(c).max()), _TINY)
        rows, low, high = [], list[float](), list[float]()
        for name in names:
            row = np.zeros(count)
            row[place[name] : place[name] + len(self.options[name])] = 1
            rows.append(row)
            low.append(1.0)
            high.append(1.0)
        if limit is not None:
            # In units of the limit: the solver's tolerance is absolute.
            costs = np.concatenate([self.costs[name] for name in names])
            scale = max(abs(limit - self.fixed), float(costs.max()), 1.0)
            rows.append(costs / scale)
            low.append(-np.inf)
            high.append((limit - self.fixed) / scale)
        for row in self._agreements(place, count):
            rows.append(row)
            low.append(0.0)
            high.append(0.0)
        constraint = LinearConstraint(np.array(rows), np.array(low), np.array(high))
        found = milp(
            c,
            integrality=np.ones(count),
            bounds=Bounds(0, usable.astype(float)),
            constraints=constraint,
            options={"mip_rel_gap": _GAP},
        )
        if found.x is None:
            return None
        return {name: self.options[name][int(np.argmax(found.x[place[name] :][: len(self.options[name])]))]
                for name in names}  # fmt: skip

    def _agreements(self, place: Mapping[str, int], count: int) -> list[Floats]:
        """Rows that are 0 if the layers of each tie agree."""
        rows = []
        for tie in self.ties:
            first, *others = tie
            for other in others:
                for value in sorted({*tie[first], *tie[other]}):
                    row = np.zeros(count)
                    for name, sign in ((first, 1.0), (other, -1.0)):
                        for number, own in enumerate(tie[name]):
                            if own == value:
                                row[place[name] + number] = sign
                    rows.append(row)
        return rows


def problem_of(found: Sensitivities, costs: dict[str, Any], fixed: float | None = None) -> Problem:
    """The choice of precisions as a problem.

    Args:
        found: The sensitivities.
        costs: By layer, the cost of each of its precisions.
        fixed: The cost of everything else; None for the bytes of everything else.

    Raises:
        ConfigurationError: If the output is not finite with any precision of a layer; names the layer.
    """
    errors = {
        name: np.array([[cell or 0.0 for cell in one.alone(text)] for text in one.precisions])
        for name, one in found.layers.items()
    }
    for name, rows in errors.items():
        if not np.isfinite(rows).all(axis=1).any():
            tried = ", ".join(found.layers[name].precisions)
            raise ConfigurationError(
                f"layer {name!r} makes the output infinite or NaN in each of {tried}; add candidates with more bits, "
                "or float"
            )
    readers: dict[str, list[str]] = {}
    for name, one in found.layers.items():
        readers.setdefault(one.reads, []).append(name)
    ties = [
        {name: [_activation(text) for text in found.layers[name].precisions] for name in names}
        for names in readers.values()
        if len(names) > 1
    ]
    ties += [
        {other: list(found.layers[other].precisions) for other in (one.shares, name)}
        for name, one in found.layers.items()
        if one.shares in found.layers
    ]
    options = {name: one.precisions for name, one in found.layers.items()}
    return Problem(options, errors, costs, found.bytes_fixed if fixed is None else fixed, ties)


def _activation(text: str) -> str:
    """What two precisions have to agree in to share the codes of an input."""
    precision = Candidate.parse(text).precision
    return f"{getattr(precision, 'activation_format', None) or ''}{precision.activation_bits}"
