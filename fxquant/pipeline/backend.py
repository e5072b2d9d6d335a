"""The base class of backends: a specification of the ops that a backend runs, and a lowering to these ops."""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor, fx

from fxquant.errors import BackendError
from fxquant.ir.layers import layer_of, provenance_of
from fxquant.ir.roles import assign_roles
from fxquant.ir.stages import StageSpec, is_registered, verify
from fxquant.ir.tensors import read_tensors
from fxquant.numerics.formats import INTEGERS
from fxquant.pipeline.options import read_named
from fxquant.planning.context import BackendLimits
from fxquant.planning.decisions import AttentionPlan, LayerPlan
from fxquant.planning.plan import Plan
from fxquant.registry import Registry

REFERENCE = "(reference"
"""Part of the name of a fallback kernel, which is a correct reference and not made for speed."""


_ANY = "fake-quant"  # The backend that runs everything.
_KERNELS = ("CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd")


class Backend(ABC):
    """Runs quantized graphs.

    Attributes:
        name: Name in the registry.
        spec: The ops that a lowered graph may hold.
        devices: The types of devices that it runs on, such as ``cpu``; None for all.
        moves: Whether one lowered graph runs on all these types; if not, a model is lowered again on another type.
        formats: Names of the number formats whose products it runs, by default integers; None for all. Layers with
            float activations may have other formats if the spec holds ``dequantize_weight``, which decodes all.
    """

    name: ClassVar[str]
    spec: ClassVar[StageSpec]
    devices: ClassVar[frozenset[str] | None] = None
    moves: ClassVar[bool] = True
    formats: ClassVar[frozenset[str] | None] = INTEGERS

    @abstractmethod
    def refuse(self, layer: LayerPlan) -> str | None:
        """Why this backend cannot run a layer as planned, and what works instead; None if it can."""

    @abstractmethod
    def lower(self, module: fx.GraphModule, plan: Plan, others: Mapping[str, Tensor]) -> None:
        """Rewrite a quantized graph in place to the ops of :attr:`spec`.

        A backend may keep tensors in another form and under other names than the quantized graph; :meth:`stored`
        converts them back.

        Args:
            module: A quantized graph with its tensors. A graph that was made for a later call has fake tensors.
            plan: What was decided.
            others: The tensors that the model's other graphs already read, by name. The graph shares these tensors
                instead of making them again. A graph of fake tensors has no other real tensors.
        """

    def stored(self, module: fx.GraphModule) -> dict[str, Tensor]:
        """The tensors of a lowered graph in the form and under the names of the quantized graph, as in a checkpoint."""
        return read_tensors(module)

    def to_plain(self, tensor: Tensor) -> Tensor:
        """Convert a tensor of a lowered graph to one that can be written to a file; strided tensors stay as they are.

        A backend that holds tensors in the layouts of its kernels overrides this, and its inverse :meth:`from_plain`.

        Raises:
            BackendError: If the tensor cannot be written.
        """
        if tensor.layout is not torch.strided:
            raise BackendError(
                f"backend {self.name!r} does not define how its {tensor.layout} tensors are written to a file; "
                "override to_plain and from_plain in the backend"
            )
        return tensor

    def from_plain(self, tensor: Tensor) -> Tensor:
        """Undo :meth:`to_plain`, in the form that is best for this machine."""
        return tensor

    def make_ready(self, ops: Collection[str]) -> None:
        """Ensure that ops of compiled graphs, named ``namespace::name``, have kernels on this machine.

        Raises:
            BackendError: If an op has no kernel.
        """
        for op in ops:
            namespace, _, name = op.partition("::")
            known = hasattr(getattr(torch.ops, namespace), name)
            if not known or not any(torch._C._dispatch_has_kernel_for_dispatch_key(op, key) for key in _KERNELS):
                raise BackendError(
                    f"{op} has no kernel here; the package was made by another version of fxquant, so export it again"
                )

    @abstractmethod
    def kernel(self, layer: LayerPlan) -> str:
        """Name of the kernel that runs a layer, for the report; the name of a fallback contains :data:`REFERENCE`."""

    def product_formats(self) -> frozenset[str] | None:
        """Names of the number formats whose products it runs on its device; by default :attr:`formats`."""
        return self.formats

    def refuse_format(self, layer: LayerPlan) -> str | None:
        """Why the backend cannot run a layer in its number formats, or None; see :meth:`product_formats`."""
        weights, inputs = layer.format_of_weight, layer.format_of_input
        formats = self.product_formats()
        if formats is None or weights is None or (inputs is None and "dequantize_weight" in self.spec.ops):
            return None
        known = ", ".join(sorted(formats))
        for what, format in (("weight", weights), ("input", inputs)):
            if format is not None and format.name not in formats:
                return (
                    f"its {what} has the format {format.name}, and the products of this backend take {known}; choose "
                    f"one of these, keep the activations float (a16), or use backend {_ANY!r}"
                )
        if layer.group_rows != 1:
            return (
                "output channels of its weight share scales, and the products of this backend have a scale for each; "
                f"keep the activations float (a16), or use backend {_ANY!r}"
            )
        return None

    def refuse_attention(self, attention: AttentionPlan) -> str | None:
        """Like :meth:`refuse`, for the matrix products of an attention; by default the backend's spec decides."""
        if attention.format is not None and self.formats is not None and attention.format not in self.formats:
            return f"it multiplies attention in integers, not in {attention.format}; use backend {_ANY!r}"
        if attention.bits is None or "matmul" in self.spec.ops:
            return None
        return "it cannot multiply two quantized activations; keep attention float (assign-precision{attention=float})"

    def attention_kernel(self, attention: AttentionPlan) -> str:
        """Name of the kernel that runs the matrix products of an attention, for the report."""
        return "aten float" if attention.bits is None else "fxquant::matmul (reference)"

    def falls_back(self, kernel: str) -> bool:
        """Whether a kernel that :meth:`kernel` or :meth:`attention_kernel` named is a fallback and needs a warning."""
        return REFERENCE in kernel

    def on(self, device: torch.device) -> Backend:
        """The backend that runs models on a device: this one, or one like it with the kernels of that device."""
        return self

    def check_device(self, device: torch.device) -> None:
        """Refuse a device before a model goes there.

        Raises:
            BackendError: If this backend does not run on the device; the message says which devices work.
        """
        if self.devices is not None and device.type not in self.devices:
            raise BackendError(
                f"backend {self.name!r} runs on {', '.join(sorted(self.devices))}, not on {device.type}; keep the "
                "model on such a device, or use backend 'fake-quant', which runs on any device"
            )

    def describe(self, device: torch.device) -> str:
        """What runs models on a device of this machine, for ``fxquant doctor``.

        Raises:
            BackendError: If nothing does; the message says why.
        """
        self.on(device).check_device(device)
        return "runs"

    def compiling(self) -> None:  # noqa: B027  (most have no message)
        """Called while ``torch.compile`` traces a model, for messages to its user."""

    def compiling_blocks(self) -> None:  # noqa: B027
        """Called when a model is to be compiled block by block, for messages to its user."""

    def with_tensors(self) -> Mapping[Any, tuple[Any, tuple[int, ...]]]:
        """Ops that hold numbers of the plan, as the op that takes 0-d tensors and the positions of these arguments.

        Blocks that are compiled once for all of them get such numbers as inputs.
        """
        return {}

    def settings(self) -> contextlib.AbstractContextManager[object]:
        """The context of calls of a model that :meth:`torch.nn.Module.compile` compiled: settings of the compiler."""
        return contextlib.nullcontext()

    def limits(self) -> BackendLimits:
        """What passes are given to know of the backend (:attr:`fxquant.planning.context.PassContext.backend`)."""
        return BackendLimits(
            self.name, self.product_formats(), lambda layer: self.refuse_format(layer) or self.refuse(layer)
        )

    def check(self, plan: Plan) -> None:
        """Refuse a plan before anything is converted.

        Raises:
            BackendError: If the backend cannot run some layers; the message lists them, why, and what works instead.
        """
        refused: dict[str, list[str]] = {}
        refuse = self.limits().refuse
        reasons = [(name, refuse(layer)) for name, layer in plan.layers.items()]
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

    def finish(self, module: fx.GraphModule, plan: Plan, others: Mapping[str, Tensor] | None = None) -> None:
        """Check the plan and the device, lower the graph, and verify the result; ``others`` as for :meth:`lower`."""
        self.check(plan)
        for device in {tensor.device for tensor in read_tensors(module).values()}:
            self.check_device(device)
        self.lower(module, plan, others or {})
        module.recompile()
        assign_roles(module.graph)
        self._refuse_ops_of_others(module)
        verify(module, self.spec)

    def _refuse_ops_of_others(self, module: fx.GraphModule) -> None:
        """Refuse ops that other packages registered and this backend does not run.

        Raises:
            BackendError: Names the op, the layers and the pass that made it, and what works instead.
        """
        found: dict[str, list[fx.Node]] = {}
        for node in module.graph.nodes:
            if node.op == "call_function" and is_registered(node.target) and not self.spec.allows(node):
                found.setdefault(str(node.target._schema.name), []).append(node)
        for op, nodes in found.items():
            names = [*dict.fromkeys(name for node in nodes for name in _layers_served(node))]
            makers = dict.fromkeys(origin.pass_name for node in nodes for origin in provenance_of(node)[-1:])
            made = f", made by {', '.join(makers)}" if makers else ""
            shown = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            raise BackendError(
                f"backend {self.name!r} cannot run the op {op} of {len(names)} layers ({shown}){made}; use backend "
                "'fake-quant', which runs every registered op, or leave these layers to the recipe's own passes, or "
                "write a backend that declares the op"
            )


def _layers_served(node: fx.Node) -> list[str]:
    """The layer that a node works for, or those of the nodes that read it, or else its own name."""
    readers = [name for reader in node.users if (name := layer_of(reader)) is not None]
    own = layer_of(node)
    return [own] if own is not None else readers or [node.name]


BACKENDS: Registry[type[Backend]] = Registry("backend", "fxquant.backends")
"""All known backends by name."""


def resolve_backend(backend: str | Backend) -> Backend:
    """A backend from its name, optionally with options as in ``native{kernels=onednn}``, or the backend itself.

    Raises:
        UnknownNameError: If there is no backend of this name.
        ConfigurationError: If the text or an option cannot be read.
        BackendError: If the backend does not accept the value of an option.
    """
    if not isinstance(backend, str):
        return backend
    name, options = read_named(backend, "backend", options_of)
    return BACKENDS[name](**options)


def options_of(name: str) -> dict[str, Any]:
    """The options that the text of a backend may set, with their types; the model determines the device.

    Raises:
        UnknownNameError: If there is no such backend.
    """
    cls = BACKENDS[name]
    types = get_type_hints(cls.__init__)
    return {option: types.get(option, str) for option in inspect.signature(cls).parameters if option != "device"}
