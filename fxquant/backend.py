"""What a backend is: a specification of what it runs, and a lowering to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import fx

from fxquant.errors import BackendError
from fxquant.ir.stages import StageSpec, verify
from fxquant.plan import LayerPlan, Plan
from fxquant.registry import Registry


class Backend(ABC):
    """Runs quantized graphs.

    Attributes:
        name: Name in the registry.
        spec: The ops that a lowered graph may hold.
    """

    name: ClassVar[str]
    spec: ClassVar[StageSpec]

    @abstractmethod
    def refuse(self, layer: LayerPlan) -> str | None:
        """Why this backend cannot run a layer as planned, and what would serve; None if it can."""

    @abstractmethod
    def lower(self, module: fx.GraphModule, plan: Plan) -> None:
        """Rewrite a quantized graph in place to the ops of :attr:`spec`."""

    @abstractmethod
    def kernel(self, layer: LayerPlan) -> str:
        """Name of the kernel that runs a layer, for the report."""

    def check(self, layers: Mapping[str, LayerPlan]) -> None:
        """Refuse a plan before anything is converted.

        Raises:
            BackendError: Lists the layers that it cannot run, why, and what would serve.
        """
        refused: dict[str, list[str]] = {}
        for name, layer in layers.items():
            reason = self.refuse(layer)
            if reason is not None:
                refused.setdefault(reason, []).append(name)
        if refused:
            lines = [
                f"  {len(names)} layers ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): {reason}"
                for reason, names in refused.items()
            ]
            raise BackendError(f"backend {self.name!r} cannot run this plan:\n" + "\n".join(lines))

    def finish(self, module: fx.GraphModule, plan: Plan) -> None:
        """Check the plan, lower the graph, and verify the result."""
        self.check(plan.layers)
        self.lower(module, plan)
        module.recompile()
        verify(module, self.spec)


BACKENDS: Registry[type[Backend]] = Registry("backend", "fxquant.backends")
"""All known backends by name."""


def resolve_backend(backend: str | Backend) -> Backend:
    """A backend from its name, or the backend itself.

    Raises:
        UnknownNameError: If there is none of that name.
    """
    return BACKENDS[backend]() if isinstance(backend, str) else backend
