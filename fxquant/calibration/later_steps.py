"""Calls of denoising steps that the sampler makes on the output of one step, of which a few are observed afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fxquant.capture.calls import Call


@dataclass
class LaterSteps:
    """Keeps the calls behind the observed step until the sampler has made its last step.

    Only then is it known which step was the last. Tensors are copied, because samplers may write into them; those that
    stay the same from call to call, such as embeddings of prompts, are held once.

    Attributes:
        wanted: Number of steps that are to be observed; with 0 nothing is kept.
    """

    wanted: int
    _calls: dict[int, list[tuple[int, Call]]] = field(default_factory=dict)  # By step: number of the graph, and call.
    _held: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # By numbers of graph and input: latest copy.

    def keep(self, step: int, graph: int, call: Call) -> None:
        """Keep one call.

        Args:
            step: Number of its denoising step.
            graph: Number of the graph that serves it.
            call: The call.
        """
        if self.wanted:
            leaves = [self._copied(leaf, (graph, number)) for number, leaf in enumerate(call.leaves)]
            self._calls.setdefault(step, []).append((graph, call.with_leaves(leaves)))

    def ended_before(self, step: int) -> bool:
        """Whether a call of this step belongs to another run of the sampler than the calls that are kept."""
        return bool(self._calls) and step < max(self._calls)

    def take(self) -> list[tuple[int, Call]]:
        """The calls of the wanted steps, each with the number of its graph. Nothing is kept any more.

        The steps have the same distance from each other, up to rounding, and the last step is one of them.
        """
        steps = sorted(self._calls)
        count = min(self.wanted, len(steps))
        ends = [len(steps) * number // count for number in range(1, count + 1)]
        chosen = [kept for end in ends for kept in self._calls[steps[end - 1]]]
        self._calls.clear()
        self._held.clear()
        return chosen

    def _copied(self, leaf: object, place: tuple[int, int]) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        held = self._held.get(place)
        if held is None or held.shape != leaf.shape or held.dtype != leaf.dtype or not bool((held == leaf).all()):
            held = self._held[place] = leaf.detach().clone()
        return held
