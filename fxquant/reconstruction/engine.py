"""Reconstruct block after block: float and quantized values side by side, and what was learned for each block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, fx

from fxquant.ir.digest import digest_of_code
from fxquant.ir.meta import LAYER
from fxquant.ir.tensors import get_tensor
from fxquant.numerics.rounding.soft import SoftWeight
from fxquant.numerics.sqnr import snr_db
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import ActivationRange
from fxquant.reconstruction.cache import Values, drop_unused, share_alike
from fxquant.reconstruction.learn import Settings, Simulation, as_codes, can_be_shared, learn
from fxquant.reconstruction.segments import Segment, segments
from fxquant.reconstruction.simulate import LearnedSteps, TokenSteps, as_it_is, run_segment
from fxquant.reconstruction.store import Learned, Store, digest

log = logging.getLogger(__name__)


def reconstruct(
    module: fx.GraphModule,
    context: PassContext,
    layers: Mapping[fx.Node, Callable[[], SoftWeight]],
    settings: Settings,
    text: str,
) -> None:
    """Learn the codes and input ranges of linears, and write them into the plan.

    Args:
        module: A float graph; it does not change.
        context: Holds the calls to learn from in ``inputs``, and in its plan the ranges that learning begins with.
            Receives the codes. If it shows no progress, a bar on the terminal does.
        layers: For each linear to learn, a function that makes its soft weight.
        settings: How a segment is learned.
        text: Identifies the settings of the results that are kept in ``context.workspace``.
    """
    engine = _Engine(module, context, layers, settings, text)
    learned = [part for part in engine.parts if any(node in layers for node in part.nodes)]
    iterations = settings.hardening.iterations
    total = iterations * len(learned)
    with _bar() if context.progress is None else nullcontext(context.progress) as show:
        for number, part in enumerate(engine.parts):
            before = iterations * sum(done in learned for done in engine.parts[:number])
            engine.step(number, lambda iteration, part=part, before=before: show(part.name, before + iteration, total))  # type: ignore[misc]


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], object]]:
    columns = (TextColumn("reconstruct {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


class _Engine:
    def __init__(
        self,
        module: fx.GraphModule,
        context: PassContext,
        layers: Mapping[fx.Node, Callable[[], SoftWeight]],
        settings: Settings,
        text: str,
    ) -> None:
        self.module, self.context, self.layers, self.settings = module, context, layers, settings
        self.plan = context.plan
        self.parts = segments(module.graph)
        self.needed = {node: number for number, part in enumerate(self.parts) for node in part.inputs}
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        calls = [dict(zip(inputs, tensors, strict=True)) for tensors in context.inputs]
        time = next(node for node in inputs if node.target == self.plan.timestep)
        self.timesteps = [_by_sample(call[time], call[inputs[0]]) for call in calls]
        self.store = Store(context.workspace)
        self.fingerprint = ""
        inputs_digest = digest("", (tensor for call in calls for tensor in call.values()))
        self.made_from = {
            "options of the pass": text,
            "calibration calls": inputs_digest,
            "operations": digest_of_code(module),
        }
        # Segments of further graphs of the model have the same names, and files of their own.
        self.suffix = f"~{inputs_digest[:8]}" if context.codes else ""
        share_alike(calls, inputs)
        self.exact: list[Values] = calls
        self.coded: list[Values] = [dict(call) for call in calls]

    def step(self, number: int, advance: Callable[[int], object]) -> None:
        """Learn one segment if there is anything to learn, and compute the values after it."""
        part = self.parts[number]
        inputs = [{node: chunk[node] for node in part.inputs} for chunk in self.coded]
        with torch.no_grad():
            exact = self._each_call(
                lambda call: run_segment(self.module, part, _only(self.exact[call], part.inputs), as_it_is), part
            )
        share_alike(exact, part.outputs)
        simulation = self._simulation(part)
        if simulation.weights:
            with torch.inference_mode(False), torch.enable_grad():
                self._learn(simulation, inputs, exact, advance)
        with torch.no_grad():
            coded = self._each_call(lambda call: simulation.run(inputs[call], self.timesteps[call], as_codes), part)
        share_alike(coded, part.outputs)
        for held, made in zip([*self.exact, *self.coded], [*exact, *coded], strict=True):
            held.update(made)
            drop_unused(held, self.needed, number + 1)

    def _each_call(self, run: Callable[[int], Values], part: Segment) -> list[Values]:
        """The outputs of a segment for each call, by its number; ranks run a part of the calls each."""
        team, calls = self.context.team, len(self.exact)
        if team is None:
            return [run(call) for call in range(calls)]
        mine = [run(call) for call in team.share(calls)]
        found = team.gather([[values[node] for node in part.outputs] for values in mine])
        return [dict(zip(part.outputs, values, strict=True)) for values in (one for rank in found for one in rank)]

    def _simulation(self, part: Segment) -> Simulation:
        found = Simulation(self.module, part)
        soft: dict[fx.Node, SoftWeight] = {}
        grids: dict[tuple[object, ...], LearnedSteps | TokenSteps] = {}
        for node in (node for node in part.nodes if node in self.layers):
            name = str(node.meta[LAYER])
            layer, (value, weight) = self.plan.layer(name), node.all_input_nodes[:2]
            if name in self.context.codes:  # Learned in an earlier segment, or for another graph.
                found.weights[node] = self.context.codes[name].dequantize(torch.float32)
            else:
                if weight not in soft:
                    soft[weight] = self.layers[node]()
                found.weights[node] = soft[weight]
            if layer.activation_bits is None or layer.activation is None:
                continue
            key = (value, layer.activation_bits, layer.boundaries, str(layer.activation))
            if key not in grids:
                grids[key] = _grid(layer.activation, layer.activation_bits, get_tensor(self.module, str(weight.target)))
            found.steps[node] = grids[key]
            found.bins[node] = layer.bins if layer.boundaries else None
        return found

    def _learn(
        self,
        simulation: Simulation,
        inputs: Sequence[Values],
        targets: Sequence[Values],
        advance: Callable[[int], object],
    ) -> None:
        part = simulation.segment
        named = {node: str(node.meta[LAYER]) for node in simulation.weights}
        said = ";".join(f"{name}={self.plan.layer(name)}" for name in named.values())
        weights = [get_tensor(self.module, str(node.all_input_nodes[1].target)) for node in named]
        self.fingerprint = digest(f"{self.fingerprint};{part.name};{said}", weights)
        made_from = {**self.made_from, "weights or plan": self.fingerprint}
        file, team = part.name + self.suffix, self.context.team
        first = team is None or team.rank == 0
        learned = self.store.load(file, made_from, weights[0].device) if first else None
        if team is not None:
            learned = team.broadcast(learned, 0)
        if learned is None:
            together = team if can_be_shared(part, inputs, targets) else None
            if first or together is not None:
                errors = learn(simulation, inputs, targets, self.timesteps, self.settings, advance, together)
                learned = _result(simulation, named, errors)
                if first:
                    self.store.save(file, made_from, learned)
            if team is not None:
                learned = team.broadcast(learned, 0)  # The next segment needs it.
        assert learned is not None
        before, after = (snr_db(1.0, error) for error in learned.errors)
        log.info("%s: %.2f dB rounded to nearest, %.2f dB learned", part.name, before, after)
        self.plan.reconstruction[part.name] = [before, after]
        self._adopt(simulation, named, learned)

    def _adopt(self, simulation: Simulation, named: Mapping[fx.Node, str], learned: Learned) -> None:
        self.context.codes.update(learned.codes)
        for node, name in named.items():
            if name in learned.codes:
                simulation.weights[node] = learned.codes[name].dequantize(torch.float32)
            if name in learned.ranges:
                layer = self.plan.layer(name)
                assert layer.activation is not None and layer.activation_bits is not None
                low, high = learned.ranges[name]
                many = isinstance(layer.activation.low, list)
                layer.activation = ActivationRange(low if many else low[0], high if many else high[0], "learned")
                weight = get_tensor(self.module, str(node.all_input_nodes[1].target))
                simulation.steps[node] = _grid(layer.activation, layer.activation_bits, weight)


def _result(simulation: Simulation, named: Mapping[fx.Node, str], errors: tuple[float, float]) -> Learned:
    codes, ranges = {}, {}
    for node, name in named.items():
        weight, grid = simulation.weights[node], simulation.steps.get(node)
        if isinstance(weight, SoftWeight):
            codes[name] = weight.hard()
        if isinstance(grid, LearnedSteps):
            ranges[name] = grid.range()
    return Learned(codes, ranges, errors)


def _grid(found: ActivationRange, bits: int, like: Tensor) -> LearnedSteps | TokenSteps:
    if found.method == "dynamic":
        return TokenSteps(bits)
    low, high = (torch.tensor(end, dtype=torch.float64, device=like.device) for end in (found.low, found.high))
    grid = LearnedSteps(low.reshape(-1), high.reshape(-1), bits)
    # A range that was learned for one graph of a model stays the same for its other graphs.
    grid.growth.requires_grad_(found.method != "learned")
    return grid


def _by_sample(timestep: Tensor, sample: Tensor) -> Tensor:
    """The timestep of each sample of a call, ``[n]``; if each token has one, the largest, which has the most noise."""
    if timestep.dim() > 1:
        timestep = timestep.flatten(1).amax(1)
    return timestep.reshape(-1).expand(len(sample)) if timestep.numel() == 1 else timestep


def _only(values: Values, nodes: Sequence[fx.Node]) -> Values:
    return {node: values[node] for node in nodes}
