"""One measurement of sensitivities: timestep by timestep, within a budget, continued where it was interrupted."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxquant.allocation.candidates import precision_of_recipe, stored_weights
from fxquant.allocation.prepared import Prepared
from fxquant.calibration.kept_calls import some_inputs
from fxquant.calibration.recorded import inputs_on
from fxquant.capture.calls import CallSpec
from fxquant.errors import CalibrationError, CheckpointError, ConfigurationError
from fxquant.inspect.errors.alternatives import Alternative, Candidates
from fxquant.inspect.errors.graphs import Pair, make_pairs, other_pairs
from fxquant.inspect.errors.schedule import calls_at, chosen_timesteps, spread_order
from fxquant.inspect.errors.sweep import Sweep, energy
from fxquant.inspect.sizes import weight_bytes
from fxquant.ir.digest import digest_of_code
from fxquant.planning.branches import branch_bytes
from fxquant.planning.plan import Plan
from fxquant.planning.sensitivities import FLOAT_BITS, LayerSensitivity, Sensitivities
from fxquant.runtime.float_model import dtype_of, weights_digest, whole_digest
from fxquant.statistics.kept_calls import KeptCalls

FILE = "sensitivities.json"

Progress = Callable[[str, int, int], object]
Cell = tuple[float, float | None, float | None]
"""Estimated, measured, and all but it: energies relative to the float output."""


@dataclass(eq=False)
class Job:
    """What is measured, and what was found so far."""

    prepared: Prepared
    wanted: int | Sequence[float]
    samples: int
    probes: int
    measure: int
    budget: float | None
    seed: int
    found: dict[float, dict[str, dict[str, Cell]]] = field(default_factory=dict)
    output: dict[float, dict[str, float]] = field(default_factory=dict)
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    shares: dict[str, str] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    earlier: float = 0.0

    def __post_init__(self) -> None:
        self.kept: KeptCalls = self.prepared.statistics.calls
        self.timesteps = chosen_timesteps(self.kept, self.wanted)
        self.began = time.monotonic()

    def run(self, folder: Path | None, progress: Progress) -> Sensitivities:
        """Measure timestep by timestep, as long as the budget lasts."""
        key = self._key()
        if folder is not None:
            self._adopt(folder, key)
        steps = [step for step in spread_order(self.timesteps) if step not in self.found]
        if not steps:
            return self.result(key)
        progress("precisions", 0, len(self.timesteps))
        used = sorted({call.kind for step in steps for call in calls_at(self.kept, step)})
        specs = [CallSpec.from_json(self.kept.kinds[kind]) for kind in used]
        base = make_pairs(self.prepared.base, self.prepared.model, specs)
        others = {name: self._pairs(name, base) for name in self.prepared.precisions}
        self._weigh(base, others)
        sweeps = {
            kind: (Sweep(pair), {name: Alternative(pairs[number]) for name, pairs in others.items()})
            for number, (kind, pair) in enumerate(zip(used, base, strict=True))
        }
        began, durations = time.monotonic(), list[float]()
        for step in steps:
            spent = time.monotonic() - began
            if self.budget is not None and durations and spent + max(durations) > self.budget:
                break
            progress(f"timestep {step:g}", len(self.found), len(self.timesteps))
            self._one(step, sweeps)
            durations.append(time.monotonic() - began - spent)
            if folder is not None:
                self.result(key).save(folder / FILE)
        progress("done", len(self.found), len(self.timesteps))
        return self.result(key)

    def _pairs(self, name: str, base: list[Pair]) -> list[Pair]:
        quantized = self.prepared.quantized(name)
        assert quantized.plan is not None
        self.plans[name] = quantized.plan
        first = self.prepared.base.plan
        assert first is not None
        same = quantized is self.prepared.base
        return base if same else other_pairs(quantized, base, first, self.prepared.model)

    def _weigh(self, base: list[Pair], others: dict[str, list[Pair]]) -> None:
        """Bytes of every layer in every precision; a weight that several layers share counts for the first one."""
        names, dtype = self.prepared.layers, dtype_of(self.prepared.model)
        held = {name: pair.weights[name] for pair in base for name in names if name in pair.weights}
        self.weights = {name: weight.numel() for name, weight in held.items()}
        for text, pairs in others.items():
            found, owners = stored_weights(pairs, names), dict[str, str]()
            for name, own in names.items():
                if text in own and name in found:
                    owner = owners.setdefault(found[name].codes, name)
                    if owner != name:
                        self.shares[name] = owner
                    size = 0 if owner != name else found[name].bytes
                    self.sizes.setdefault(name, {})[text] = size + branch_bytes(self.plans[text], name, dtype)
        for name, own in names.items():
            if FLOAT_BITS in own and name in held:
                self.sizes.setdefault(name, {})[FLOAT_BITS] = 0 if name in self.shares else held[name].nbytes

    def _one(self, step: float, sweeps: dict[int, tuple[Sweep, dict[str, Alternative]]]) -> None:
        """Measure one timestep; the energies of calls of several kinds are added."""
        signal, sums = 0.0, dict[tuple[str, str], list[float | None]]()
        outputs = dict.fromkeys(self.prepared.precisions, 0.0)
        for call in calls_at(self.kept, step):
            sweep, alternatives = sweeps[call.kind]
            spec = sweep.pair.call
            assert spec is not None
            inputs = some_inputs(spec, inputs_on(call, spec, self.prepared.base.device), self.samples)
            sweep.forward(inputs)
            signal += sweep.signal
            watcher = Candidates(sweep, alternatives, inputs)
            sweep.pull(self.probes, self.seed + self.timesteps.index(step), watcher)
            for name, other in alternatives.items():
                outputs[name] += _whole_error(other, inputs, sweep.exact)
            self.macs |= watcher.macs
            for cell, numbers in self._cells(watcher).items():
                old = sums.setdefault(cell, [0.0, 0.0, 0.0])
                sums[cell] = [None if a is None or b is None else a + b for a, b in zip(old, numbers, strict=True)]
        if not 0 < signal < math.inf:
            what = "0 everywhere" if signal == 0 else "not finite"
            raise CalibrationError(
                f"the output of the float model at timestep {step:g} is {what}, so there are no errors relative to it; "
                "calibrate with calls whose output is neither, or leave this timestep out (timesteps=[...])"
            )
        self.output[step] = {name: _bounded(value / signal) for name, value in outputs.items()}
        found: dict[str, dict[str, Cell]] = {}
        for (layer, precision), numbers in sums.items():
            estimated, measured, rest = (None if one is None else _bounded(one / signal) for one in numbers)
            assert estimated is not None
            found.setdefault(layer, {})[precision] = (estimated, measured, rest)
        self.found[step] = found

    def _cells(self, watcher: Candidates) -> dict[tuple[str, str], list[float | None]]:
        """Energies of one call by layer and precision: estimated, measured, of all but it."""
        found: dict[tuple[str, str], list[float | None]] = {}
        for precision in self.prepared.precisions:
            rest = watcher.all_but(precision)
            for layer in watcher.products[precision]:
                if precision in self.prepared.layers.get(layer, ()):
                    found[layer, precision] = [_bounded(watcher.alone(precision, layer)), None, rest[layer]]
        largest = sorted(found, key=lambda cell: -(found[cell][0] or 0.0))
        for layer, precision in largest[: self.measure]:
            found[layer, precision][1] = watcher.measure(precision, layer)
        return found

    def result(self, key: str) -> Sensitivities:
        """What was found so far."""
        steps = tuple(step for step in self.timesteps if step in self.found)
        plan = self.prepared.base.plan
        assert plan is not None
        layers = {}
        for name, own in self.prepared.layers.items():
            texts = tuple(text for text in own if text in self.sizes.get(name, {}))
            if not texts or not all(name in self.found[step] for step in steps):
                continue
            cells = [[self._cell(step, name, text) for step in steps] for text in texts]
            sizes = tuple(self.sizes[name][text] for text in texts)
            reads = plan.layers[name].observed or name
            estimated, measured, rest = (tuple(tuple(cell[part] for cell in row) for row in cells) for part in range(3))
            layers[name] = LayerSensitivity(
                name,
                self.weights[name],
                self.macs[name],
                reads,
                texts,
                sizes,
                estimated,
                measured,
                rest,
                self.shares.get(name, ""),
            )
        base = str(precision_of_recipe(self.prepared.recipe))
        dtype = dtype_of(self.prepared.model)
        varied = sum(branch_bytes(plan, name, dtype) for name in layers)
        varied += sum(weight_bytes(plan.layers[name], dtype)[1] for name in layers if name not in self.shares)
        output = {name: tuple(self.output[step][name] for step in steps) for name in self.prepared.precisions}
        floats = {FLOAT_BITS} & {text for own in self.prepared.layers.values() for text in own}
        return Sensitivities(
            recipe=str(self.prepared.recipe),
            model_class=plan.model_class,
            base=base,
            precisions=(*self.prepared.precisions, *floats),
            timesteps=steps,
            layers=layers,
            output=output,
            bytes_before=plan.bytes_before,
            bytes_fixed=plan.bytes_after - varied,
            samples=self.samples,
            probes=self.probes,
            seconds=round(self.earlier + time.monotonic() - self.began, 3),
            made_for=key,
            weights=weights_digest(self.prepared.model),
            left_out=self._left_out(),
        )

    def _cell(self, step: float, name: str, text: str) -> Cell:
        return (0.0, None, None) if text == FLOAT_BITS else self.found[step][name][text]

    def _left_out(self) -> dict[str, str]:
        out = dict(self.prepared.left_out)
        missing = [f"{step:g}" for step in self.timesteps if step not in self.found]
        if missing and self.budget is not None:
            out[f"timesteps {', '.join(missing)}"] = f"the budget of {self.budget:g} s was spent"
        unseen = [name for name in self.prepared.layers if not any(name in found for found in self.found.values())]
        if unseen and self.found:
            out[f"{len(unseen)} layers, such as {unseen[0]}"] = "no measured call runs them"
        return out

    def _adopt(self, folder: Path, key: str) -> None:
        """Continue from what an interrupted run found.

        Raises:
            ConfigurationError: The folder holds a measurement of something else, which would be lost.
            CheckpointError: What it holds is damaged.
        """
        if not (folder / FILE).exists():
            return
        try:
            earlier = Sensitivities.load(folder / FILE)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; or remove it, and its timesteps are measured again") from error
        if earlier.made_for != key:
            raise ConfigurationError(
                f"{folder / FILE} holds sensitivities of {len(earlier.timesteps)} timesteps that were measured with "
                "other options, another model or another calibration, so they cannot be continued; give another "
                "folder as resume, or remove that file"
            )
        self.earlier = earlier.seconds
        self.sizes = {name: dict(zip(one.precisions, one.bytes, strict=True)) for name, one in earlier.layers.items()}
        self.macs = {name: one.macs for name, one in earlier.layers.items()}
        self.weights = {name: one.weights for name, one in earlier.layers.items()}
        self.shares = {name: one.shares for name, one in earlier.layers.items() if one.shares}
        for number, step in enumerate(earlier.timesteps):
            self.output[step] = {name: float(row[number] or 0.0) for name, row in earlier.output.items()}
            self.found[step] = {}
            for name, one in earlier.layers.items():
                rows = zip(one.precisions, one.estimated, one.measured, one.all_but, strict=True)
                self.found[step][name] = {
                    text: (float(estimated[number] or 0.0), measured[number], rest[number])
                    for text, estimated, measured, rest in rows
                    if text != FLOAT_BITS
                }

    def _key(self) -> str:
        """A digest of everything that the numbers depend on."""
        names = {name: tuple(own) for name, own in self.prepared.layers.items()}
        options = (str(self.prepared.recipe), names, self.timesteps, self.samples, self.probes, self.measure, self.seed)
        found = hashlib.sha256(f"{whole_digest(self.prepared.model)}{options}".encode())
        base = self.prepared.base
        assert base.plan is not None
        found.update(base.plan.fingerprint().encode())
        for graph in base.graphs:
            found.update(digest_of_code(graph).encode())
        for step in self.timesteps:
            for call in calls_at(self.kept, step):
                for tensor in call.inputs:
                    found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def _bounded(error: float) -> float:
    """An error; infinite if it is not a number, as where an output is not finite."""
    return math.inf if math.isnan(error) else error


def _whole_error(other: Alternative, inputs: Sequence[Tensor], exact: Tensor) -> float:
    with torch.no_grad():
        outputs = pytree.tree_leaves(other.pair.quantized(*inputs))
    found = next(leaf for leaf in outputs if isinstance(leaf, Tensor))
    return energy(found - exact)
