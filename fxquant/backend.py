"""What a backend is: a specification of what it runs, and a lowering to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import fx

from fxquant.errors import BackendError
from fxquant.ir.stages import StageSpec, verify
from fxquant.plan import AttentionPlan, LayerPlan, Plan
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

    def refuse_attention(self, attention: AttentionPlan) -> str | None:
        """The same for the matrix products of an attention; unless a backend says otherwise, its spec decides."""
        if attention.bits is None or "matmul" in self.spec.ops:
            return None
        return "it multiplies no two quantized activations; keep attention float (assign-precision{attention=float})"

    def attention_kernel(self, attention: AttentionPlan) -> str:
        """Name of the kernel that runs the matrix products of an attention, for the report."""
        return "aten float" if attention.bits is None else "fxquant::matmul (reference)"

    def check(self, plan: Plan) -> None:
        """Refuse a plan before anything is converted.

        Raises:
            BackendError: Lists the layers that it cannot run, why, and what would serve.
        """
        refused: dict[str, list[str]] = {}
        reasons = [(name, self.refuse(layer)) for name, layer in plan.layers.items()]
        reasons += [(name, self.refuse_attention(attention)) for name, attention in plan.attentions.items()]
        for name, reason in reasons:
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
        self.check(plan)
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
