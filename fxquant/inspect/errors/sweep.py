"""One call: a float run forward, then block by block backward, with the errors of all layers.

Let e be the error of a layer's output if this layer alone is quantized, and J the derivative of the model's output with
respect to that value. To first order the layer changes the output by J e. For a random vector v of signs, the
expectation of ``(v^T J e)^2`` is ``|J e|^2`` (M. F. Hutchinson, "A stochastic estimator of the trace", 1990). One
backward pass gives ``v^T J`` for all layers at once, so a few passes estimate the contribution of every layer. The
estimate has a relative standard deviation of at most ``sqrt(2 / n)`` for n vectors and samples.

Only the values between blocks are kept. A block is computed again, with gradients, when the backward pass comes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxquant.errors import ConfigurationError, NonFiniteError
from fxquant.inspect.errors.graphs import Pair
from fxquant.inspect.errors.units import LocalError, Unit, float_value, units_of
from fxquant.reconstruction.cache import Values
from fxquant.reconstruction.segments import Segment, segments
from fxquant.reconstruction.simulate import Lookup, as_it_is, run_segment

Hook = Callable[[Unit, tuple[Any, ...], Tensor, Lookup], Tensor]
"""Gets a unit, the arguments of its output node, its float value and a lookup; returns the value to go on with."""


class Watcher(Protocol):
    """Sees the units of a float run, and the gradients of their values."""

    def saw(self, unit: Unit, args: tuple[Any, ...], y: Tensor, value: Lookup) -> None:
        """A unit ran: the arguments of its output node, its float value, and a lookup of other values."""

    def pulled(self, unit: Unit, gradient: Tensor | None) -> None:
        """The gradient of one random vector's product with the model's output; None if the output ignores the unit."""

    def finished(self) -> None:
        """The units that were seen since the last time are done; their gradients have been given."""


@dataclass
class Energies:
    """Sums over samples of squares: of the float output of a layer, of its errors, and of the model's output.

    Attributes:
        signal: Of the float value.
        both: Of the error with a quantized weight and input.
        weights: With a quantized weight only; None if there is none.
        inputs: What a quantized input adds to that; None if it stays float.
        estimated: Of the error of the model's output, estimated; None without probes.
        measured: The same, measured; None if it was not.
    """

    signal: float = 0.0
    both: float = 0.0
    weights: float | None = None
    inputs: float | None = None
    estimated: float | None = None
    measured: float | None = None


@dataclass(eq=False)
class Sweep:
    """Measures calls of one kind.

    Args:
        pair: The graphs.
    """

    pair: Pair
    units: dict[fx.Node, Unit] = field(init=False)
    _parts: list[Segment] = field(init=False)
    _saved: list[Values] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.units = units_of(self.pair)
        graph = self.pair.quantized.graph
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        returned = next(node for node in graph.nodes if node.op == "output")
        self._output = next(
            leaf for leaf in pytree.tree_leaves(returned.args[0])
            if isinstance(leaf, fx.Node) and isinstance(leaf.meta.get("val"), Tensor)
        )  # fmt: skip
        self._parts = segments(graph, self._reads)
        self.names = {unit.name: unit for unit in self.units.values()}
        self._part_of = {node: number for number, part in enumerate(self._parts) for node in part.nodes}

    def forward(self, inputs: list[Tensor]) -> None:
        """Run the float model, and keep the values between blocks for the other methods.

        Raises:
            NonFiniteError: If the float output holds NaN or infinity.
        """
        held: Values = dict(zip(self._inputs, inputs, strict=True))
        self._saved = []
        with torch.no_grad():
            for part in self._parts:
                self._saved.append({node: held[node] for node in part.inputs})
                held.update(self._run(part, self._saved[-1], None))
            self.exact = held[self._output].detach()
            self.samples = inputs[0].shape[0] if inputs and inputs[0].dim() else 0
        if not self.exact.isfinite().all():
            raise NonFiniteError(
                "the float model's output holds NaN or infinity in a kept call; calibrate in a dtype in which the "
                "model is finite (bfloat16 or float32)"
            )

    @property
    def signal(self) -> float:
        """Energy of the float output."""
        return energy(self.exact)

    def whole_error(self, inputs: list[Tensor]) -> float:
        """Energy of the error of the whole quantized model's output."""
        with torch.no_grad():
            outputs = pytree.tree_leaves(self.pair.quantized(*inputs))
        found = next(leaf for leaf in outputs if isinstance(leaf, Tensor))
        return energy(found - self.exact)

    def backward(self, probes: int, seed: int) -> dict[str, Energies]:
        """Local errors of all units, and with ``probes`` random vectors estimates of their contributions.

        Raises:
            ConfigurationError: If an op of the graph has no derivative.
        """
        errors = _LocalErrors(self, probes)
        self.pull(probes, seed, errors)
        return errors.found

    def pull(self, probes: int, seed: int, watcher: Watcher) -> None:
        """Run the graph block by block backwards, and show a watcher all units with ``probes`` gradients each.

        Raises:
            ConfigurationError: If an op of the graph has no derivative.
        """
        generator = torch.Generator().manual_seed(seed)
        signs = [torch.randint(0, 2, self.exact.shape, generator=generator) * 2 - 1 for _ in range(probes)]
        gradients = {self._output: [sign.to(self.exact) for sign in signs]} if probes else {}
        for part, saved in zip(reversed(self._parts), reversed(self._saved), strict=True):
            values: dict[Unit, Tensor] = {}
            hook = _showing(watcher, values)
            ends = [node for node in part.outputs if node in gradients]
            if not ends:
                with torch.no_grad():
                    self._run(part, saved, hook)
            else:
                with torch.inference_mode(False), torch.enable_grad():
                    self._pull(part, saved, ends, gradients, hook, values, watcher)
            watcher.finished()

    def measure(self, name: str, error: Callable[[tuple[Any, ...], Lookup], Tensor] | None = None) -> float:
        """Energy of the error of the model's output if only this unit is quantized.

        Args:
            name: The unit.
            error: Its error from the arguments of its output node; None for its error in this graph.
        """
        unit = self.names[name]

        def hook(other: Unit, args: tuple[Any, ...], y: Tensor, value: Lookup) -> Tensor:
            if other is not unit:
                return y
            return y + (unit.error(args, value).both if error is None else error(args, value)).to(y.dtype)

        number = self._part_of[unit.output]
        with torch.no_grad():
            changed = self._run(self._parts[number], self._saved[number], hook)
            for part, saved in zip(self._parts[number + 1 :], self._saved[number + 1 :], strict=True):
                if any(node in changed for node in part.inputs):
                    changed |= self._run(part, {node: changed.get(node, old) for node, old in saved.items()}, None)
        if self._output not in changed:
            return 0.0
        return energy(changed[self._output] - self.exact)

    def _pull(
        self, part: Segment, saved: Values, ends: list[fx.Node], gradients: dict[fx.Node, list[Tensor]], hook: Hook,
        values: Mapping[Unit, Tensor], watcher: Watcher,
    ) -> None:  # fmt: skip
        """Run a part with gradients, and turn the gradients of its outputs into those of its inputs."""
        given = {node: _leaf(value) for node, value in saved.items()}
        made = self._run(part, given, hook)
        ends = [node for node in ends if isinstance(made[node], Tensor) and made[node].requires_grad]
        sources = [node for node, value in given.items() if isinstance(value, Tensor) and value.requires_grad]
        units, probes = list(values), len(next(iter(gradients.values())))
        sums: dict[fx.Node, list[Tensor]] = {}
        for probe in range(probes if ends else 0):
            try:
                pulled = torch.autograd.grad(
                    [made[node] for node in ends],
                    [*(given[node] for node in sources), *(values[unit] for unit in units)],
                    [gradients[node][probe] for node in ends],
                    retain_graph=probe + 1 < probes,
                    allow_unused=True,
                )
            except RuntimeError as error:
                if not _lacks_derivative(error):
                    raise
                raise ConfigurationError(
                    f"an op of the graph has no derivative ({str(error).splitlines()[0]}), so contributions cannot be "
                    "estimated; measure them instead: probes=0, measure=None"
                ) from error
            for node, gradient in zip(sources, pulled, strict=False):  # Those of units follow.
                kept = sums.setdefault(node, [])
                kept.append(torch.zeros_like(given[node]) if gradient is None else gradient)
            for unit, gradient in zip(units, pulled[len(sources) :], strict=True):
                watcher.pulled(unit, gradient)
        for node in part.outputs:
            gradients.pop(node, None)
        for node, own in sums.items():
            old = gradients.get(node)
            gradients[node] = own if old is None else [a + b for a, b in zip(old, own, strict=True)]

    def products(self, gradient: Tensor | None, error: Tensor) -> Tensor:
        """Products of gradient and error: float64 ``[samples]``; one sum if the value does not belong to samples."""
        if gradient is None:
            return torch.zeros(1, dtype=torch.float64)
        together = gradient * error.to(gradient.dtype)
        apart = together.dim() > 1 and together.shape[0] == self.samples == self.exact.shape[0]
        rows = together.flatten(1) if apart else together.reshape(1, -1)
        return rows.sum(1, dtype=torch.float64)

    def _run(self, part: Segment, values: Mapping[fx.Node, Any], hook: Hook | None) -> Values:
        """Run the nodes of a part as the float model; returns the values that later parts read."""

        def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], value: Lookup) -> Any:
            found = float_value(node, args, self.pair, value)
            if found is NotImplemented:
                found = as_it_is(node, args, kwargs, value)
            return found if hook is None or node not in self.units else hook(self.units[node], args, found, value)

        return run_segment(self.pair.quantized, part, values, compute)

    def _reads(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return self.units[node].reads if node in self.units else ()


def _showing(watcher: Watcher, values: dict[Unit, Tensor]) -> Hook:
    """A hook that shows each unit to a watcher, and makes its value one that gradients can be asked for."""

    def hook(unit: Unit, args: tuple[Any, ...], y: Tensor, value: Lookup) -> Tensor:
        with torch.no_grad():
            watcher.saw(unit, pytree.tree_map(_detached, args), y.detach(), lambda node: _detached(value(node)))
        values[unit] = y if y.requires_grad or not torch.is_grad_enabled() else y.detach().requires_grad_()
        return values[unit]

    return hook


@dataclass(eq=False)
class _LocalErrors:
    """Records the local error of each unit, and estimates its contribution."""

    sweep: Sweep
    probes: int
    found: dict[str, Energies] = field(default_factory=dict)
    _errors: dict[Unit, LocalError] = field(default_factory=dict)

    def saw(self, unit: Unit, args: tuple[Any, ...], y: Tensor, value: Lookup) -> None:
        self._errors[unit] = unit.error(args, value)
        self.found[unit.name] = _local(y, self._errors[unit])
        self.found[unit.name].estimated = 0.0 if self.probes else None

    def pulled(self, unit: Unit, gradient: Tensor | None) -> None:
        entry, products = self.found[unit.name], self.sweep.products(gradient, self._errors[unit].both)
        entry.estimated = (entry.estimated or 0.0) + float(products.square().sum()) / self.probes

    def finished(self) -> None:
        self._errors.clear()


def _local(y: Tensor, error: LocalError) -> Energies:
    return Energies(
        energy(y),
        energy(error.both),
        None if error.weights is None else energy(error.weights),
        None if error.inputs is None else energy(error.inputs),
    )


def energy(x: Tensor) -> float:
    """Sum of squares, in at least float32."""
    wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
    return float(wide.square().sum(dtype=torch.float64))


def _lacks_derivative(error: RuntimeError) -> bool:
    """Whether an error of a backward pass is about an op without a derivative, of torch or of another library."""
    return isinstance(error, NotImplementedError) or "no autograd formula was registered" in str(error)


def _leaf(value: Any) -> Any:
    """A value that gradients can be asked for, if it is a float tensor."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.is_floating_point())
    return value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
