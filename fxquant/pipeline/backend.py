"""What a backend is: a specification of what it runs, and a lowering to it."""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor, fx

from fxquant.errors import BackendError
from fxquant.ir.stages import StageSpec, verify
from fxquant.ir.tensors import read_tensors
from fxquant.pipeline.options import read_named
from fxquant.pipeline.registry import Registry
from fxquant.planning.decisions import AttentionPlan, LayerPlan
from fxquant.planning.plan import Plan

REFERENCE = "(reference"
"""Stands in the name of a kernel that is a fallback: right, but made for its meaning and not for speed."""


_KERNELS = ("CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd")


class Backend(ABC):
    """Runs quantized graphs.

    Attributes:
        name: Name in the registry.
        spec: The ops that a lowered graph may hold.
        devices: The types of devices that it runs on, such as ``cpu``; None for all.
        moves: Whether a lowered graph runs on all of them; else one for each type.
    """

    name: ClassVar[str]
    spec: ClassVar[StageSpec]
    devices: ClassVar[frozenset[str] | None] = None
    moves: ClassVar[bool] = True

    @abstractmethod
    def refuse(self, layer: LayerPlan) -> str | None:
        """Why this backend cannot run a layer as planned, and what would serve; None if it can."""

    @abstractmethod
    def lower(self, module: fx.GraphModule, plan: Plan, held: Mapping[str, Tensor]) -> None:
        """Rewrite a quantized graph in place to the ops of :attr:`spec`.

        A backend may keep tensors in another form than the quantized graph has them, under other names; :meth:`stored`
        is the way back.

        Args:
            module: A quantized graph, with its tensors; a graph that a later call asked for has fake ones.
            plan: What was decided.
            held: The tensors that the model's other graphs read already, by name. What is among them is shared, not
                made again, and for a graph of fake tensors it is all there is.
        """

    def stored(self, module: fx.GraphModule) -> dict[str, Tensor]:
        """The tensors of a lowered graph as the quantized graph named and held them, which is how a checkpoint does."""
        return read_tensors(module)

    def to_plain(self, tensor: Tensor) -> Tensor:
        """What a tensor of a lowered graph holds, as one that can be written to a file; strided ones are that already.

        A backend that holds tensors in layouts of kernels overrides this, and :meth:`from_plain`, the way back.

        Raises:
            BackendError: If it cannot be written.
        """
        if tensor.layout is not torch.strided:
            raise BackendError(f"backend {self.name!r} does not say how its {tensor.layout} tensors are written")
        return tensor

    def from_plain(self, tensor: Tensor) -> Tensor:
        """Undo :meth:`to_plain`, as is best for this machine."""
        return tensor

    def make_ready(self, ops: Collection[str]) -> None:
        """See to it that ops of compiled graphs, named ``namespace::name``, have kernels on this machine.

        Raises:
            BackendError: If one has none.
        """
        for op in ops:
            namespace, _, name = op.partition("::")
            known = hasattr(getattr(torch.ops, namespace), name)
            if not known or not any(torch._C._dispatch_has_kernel_for_dispatch_key(op, key) for key in _KERNELS):
                raise BackendError(f"{op} has no kernel here; the package was made by another version of fxquant")

    @abstractmethod
    def kernel(self, layer: LayerPlan) -> str:
        """Name of the kernel that runs a layer, for the report; that of a fallback holds :data:`REFERENCE`."""

    def refuse_attention(self, attention: AttentionPlan) -> str | None:
        """The same for the matrix products of an attention; unless a backend says otherwise, its spec decides."""
        if attention.bits is None or "matmul" in self.spec.ops:
            return None
        return "it multiplies no two quantized activations; keep attention float (assign-precision{attention=float})"

    def attention_kernel(self, attention: AttentionPlan) -> str:
        """Name of the kernel that runs the matrix products of an attention, for the report."""
        return "aten float" if attention.bits is None else "fxquant::matmul (reference)"

    def falls_back(self, kernel: str) -> bool:
        """Whether a kernel that :meth:`kernel` or :meth:`attention_kernel` named is a fallback, of which to warn."""
        return REFERENCE in kernel

    def on(self, device: torch.device) -> Backend:
        """What runs models on a device: this backend, or one like it with the kernels of that device."""
        return self

    def check_device(self, device: torch.device) -> None:
        """Refuse a device before a model goes there.

        Raises:
            BackendError: Says which devices would serve.
        """
        if self.devices is not None and device.type not in self.devices:
            raise BackendError(
                f"backend {self.name!r} runs on {', '.join(sorted(self.devices))}, not on {device.type}; leave the "
                "model there, or use backend 'fake-quant', which runs on any device"
            )

    def check_move(self, start: torch.device, goal: torch.device) -> None:
        """The same for a lowered model that stands on a device and is to go to another."""
        self.check_device(goal)
        if not self.moves and start.type != goal.type:
            raise BackendError(
                f"backend {self.name!r} lowered this model for {start.type}, and what {goal.type} runs is another "
                f"graph; save it and load it there: fxquant.load(folder, device={str(goal)!r})"
            )

    def compiling(self) -> None:  # noqa: B027  (most have nothing to say)
        """Called while ``torch.compile`` traces a model, for what its user must be told."""

    def settings(self) -> contextlib.AbstractContextManager[object]:
        """What a model that :meth:`torch.nn.Module.compile` compiled is called within: settings of the compiler."""
        return contextlib.nullcontext()

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

    def finish(self, module: fx.GraphModule, plan: Plan, held: Mapping[str, Tensor] | None = None) -> None:
        """Check the plan and the device, lower the graph, and verify the result; ``held`` as for :meth:`lower`."""
        self.check(plan)
        for device in {tensor.device for tensor in read_tensors(module).values()}:
            self.check_device(device)
        self.lower(module, plan, held or {})
        module.recompile()
        verify(module, self.spec)


BACKENDS: Registry[type[Backend]] = Registry("backend", "fxquant.backends")
"""All known backends by name."""


def resolve_backend(backend: str | Backend) -> Backend:
    """A backend from its name, with options behind it as in ``native{products=fp8}``, or the backend itself.

    Raises:
        UnknownNameError: If there is none of that name.
        ConfigurationError: If the text or an option cannot be read.
        BackendError: If an option has a value that it does not take.
    """
    if not isinstance(backend, str):
        return backend
    name, options = read_named(backend, "backend", options_of)
    return BACKENDS[name](**options)


def options_of(name: str) -> dict[str, Any]:
    """What the text of a backend may set, with its type; the device is that of the model.

    Raises:
        UnknownNameError: If there is no such backend.
    """
    cls = BACKENDS[name]
    types = get_type_hints(cls.__init__)
    return {option: types.get(option, str) for option in inspect.signature(cls).parameters if option != "device"}
