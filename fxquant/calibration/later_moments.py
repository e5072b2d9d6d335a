"""Second moments that are recorded after calibration, block by block, when passes ask for them.

Those of all layers together are larger than the weights. While memory is bounded, calibration keeps the inputs of its
calls instead. The observed graphs then run again one segment after the other, and the values between segments lie in
files. Each layer sees the same rows in the same order, so its moments are the same bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxquant.ir.arguments import args
from fxquant.ir.ops import recording
from fxquant.memory.bound import kept
from fxquant.reconstruction.cache import Values, drop_unused
from fxquant.reconstruction.segments import Segment, segments, whole
from fxquant.reconstruction.simulate import Lookup, run_segment
from fxquant.statistics.collection import Statistics
from fxquant.statistics.moments import SecondMoments

log = logging.getLogger(__name__)

_OBSERVE = torch.ops.fxquant.observe.default


class LaterMoments:
    """Runs observed graphs again, as far as it is asked for.

    Args:
        statistics: What calibration recorded; moments are recorded with its seed.

    Attributes:
        keys: The keys whose moments are wanted.
    """

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics
        self.keys: frozenset[str] = frozenset()
        self.calls: list[tuple[int, list[Tensor]]] = []
        """The calls in order: the number of the graph, and the inputs."""
        self._graphs: list[fx.GraphModule] = []
        self._parts: list[list[Segment]] = []
        self._needed: list[Mapping[fx.Node, int]] = []
        self._where: dict[str, int] = {}
        self._values: list[Values] = []
        self._done = 0
        self._found: dict[str, SecondMoments] = {}

    def keep(self, number: int, inputs: Sequence[Tensor]) -> None:
        """Keep a call. Inputs that are equal to those of the call before, such as prompts, are kept once."""
        before = self.calls[-1][1] if self.calls and self.calls[-1][0] == number else None
        own = []
        for place, tensor in enumerate(inputs):
            last = None if before is None else before[place]
            same = last is not None and last.shape == tensor.shape and torch.equal(last, tensor)
            own.append(last if same and last is not None else kept(tensor.detach().clone()))
        self.calls.append((number, own))

    def begin(self, graphs: Sequence[fx.GraphModule]) -> None:
        """Take the observed graphs, after the last call."""
        self._graphs = list(graphs)
        self._parts = [segments(module.graph) for module in graphs]
        places = [self._places(parts) for parts in self._parts]
        # Graphs that observe a layer in different segments run as a whole, and so do those of combined statistics.
        if self.statistics.combined or any(other != places[0] for other in places):
            self._parts = [[whole(module.graph)] for module in graphs]
            places = [self._places(parts) for parts in self._parts]
        self._where = {key: number for found in places for key, number in found.items()}
        self._where |= {name: 0 for name in self.statistics.combined}
        self._needed = [{node: n for n, part in enumerate(parts) for node in part.inputs} for parts in self._parts]
        self._restart()

    def moments(self, key: str) -> SecondMoments | None:
        """The moments of a key; those of keys of earlier segments are dropped. None if they are not wanted."""
        number = self._where.get(key)
        if number is None:
            return None
        if number < self._done and key not in self._found:
            self._restart()
        while self._done <= number:
            self._step()
        return self._found.get(key)

    def forget(self, key: str) -> None:
        """Drop the moments of a key that is not needed any more."""
        self._found.pop(key, None)

    def _places(self, parts: Sequence[Segment]) -> dict[str, int]:
        """The number of the segment in which each wanted key is observed."""
        observers = ((n, node) for n, part in enumerate(parts) for node in part.nodes if node.target is _OBSERVE)
        pairs = ((str(args(node).key), n) for n, node in observers)
        return {key: number for key, number in pairs if key in self.keys}

    def _restart(self) -> None:
        self._done = 0
        self._found.clear()
        self._values = []
        for number, inputs in self.calls:
            nodes = [node for node in self._graphs[number].graph.nodes if node.op == "placeholder"]
            self._values.append(dict(zip(nodes, inputs, strict=True)))

    def _step(self) -> None:
        """Run the next segment on all calls."""
        number, fresh = self._done, Statistics(num_rows=self.statistics.num_rows, seed=self.statistics.seed)
        fresh.wants_moments = self.keys.__contains__
        self._found.clear()
        for (graph, _), values in zip(self.calls, self._values, strict=True):
            part = self._parts[graph][number]
            given = {node: values[node] for node in part.inputs}
            with recording(fresh.record), torch.no_grad():
                made = run_segment(self._graphs[graph], part, given, _as_recorded)
            values.update({node: pytree.tree_map_only(Tensor, kept, value) for node, value in made.items()})
            drop_unused(values, self._needed[graph], number + 1)
        for name, keys in self.statistics.combined.items():
            fresh.combine(keys, name)
        for key, found in fresh.items():
            if found.moments is not None:
                if self.statistics.transient:
                    found.moments.seal()
                self._found[key] = found.moments
        self._done += 1
        log.info("second moments: segment %d, %d values", self._done, len(self._found))


def _as_recorded(node: fx.Node, given: tuple[Any, ...], named: dict[str, Any], value: Lookup) -> Any:
    """Run a node as the whole graph does."""
    function: Any = node.target
    return function(*given, **named)
