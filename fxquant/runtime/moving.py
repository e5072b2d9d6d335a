"""How a model moves between devices, and how much memory it takes.

Backends lower a graph for one type of device. A model that moves to another type is lowered again there, from the codes
that its tensors hold. A model that leaves a GPU for the CPU is only parked: its tensors move, and its graphs stay
lowered for the GPU, because offloading brings it back for the next call. A call of a parked model lowers it for the
device where it is.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxquant.capture.graph import CapturedGraph
from fxquant.capture.trace import Architecture
from fxquant.capture.whole import whole_of
from fxquant.errors import ConfigurationError, FxquantError
from fxquant.ir.shared import SharedTensors
from fxquant.ir.tensors import read_tensors, set_tensor
from fxquant.pipeline.backend import Backend
from fxquant.planning.plan import Plan, tensor_bytes
from fxquant.runtime.devices import check_dtype, retarget, usable_device
from fxquant.runtime.lora import adapters_of, copy_adapters
from fxquant.runtime.offloading import SLOT, Group, Slot, Streaming
from fxquant.runtime.views import Walked

if TYPE_CHECKING:
    from fxquant.runtime.model import GraphModel


@dataclass
class Place:
    """Where a model is, beside the device of its tensors. Shallow copies of a model share it, as they share tensors.

    Attributes:
        home: The device that the graphs run on, while the tensors are parked elsewhere; None if they are there.
        streaming: Set while the model is offloaded, and its tensors move to the device of its graphs one by one.
    """

    home: torch.device | None = None
    streaming: Streaming | None = None

    def copy(self) -> Place:
        """The same place, for a model with its own tensors."""
        streaming = self.streaming and Streaming(self.streaming.device, self.streaming.options)
        return Place(self.home, streaming)


class Movable(Walked):
    """The part of a captured model that moves it and measures its memory."""

    graphs: nn.ModuleList
    captured: list[CapturedGraph]
    architecture: Architecture
    backend: Backend | None
    plan: Plan | None
    shared: SharedTensors
    weights: Mapping[str, Tensor]
    parallel: Any
    tensors: Callable[[], dict[str, Tensor]]
    _make_graph: Callable[..., CapturedGraph]
    _dtype: torch.dtype

    _place: Place

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        held = itertools.chain(self.parameters(), self.buffers(), self.architecture.skeleton.parameters())
        return next((tensor.device for tensor in held), torch.device("cpu"))

    @property
    def every(self) -> list[CapturedGraph]:
        """All graphs, those with branches of LoRAs included."""
        found = adapters_of(self)  # type: ignore[arg-type]
        return self.captured if found is None else [*self.captured, *found.captured]

    @property
    def runs_on(self) -> torch.device:
        """The device that computes: that of the tensors, or while they are offloaded the one they are moved to."""
        return self._place.home or self.device

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the tensors that the graphs read, as they are held for the backend, LoRAs included.

        Shared storage counts once.

        Args:
            return_buffers: Whether the buffers of the original model count. Codes and scales always count.
        """
        buffers = {name for name, _ in self.architecture.skeleton.named_buffers(remove_duplicate=False)}
        held = {name: tensor for captured in self.every for name, tensor in read_tensors(captured.module).items()}
        return tensor_bytes({name: held[name] for name in held if return_buffers or name not in buffers})

    def share_memory(self) -> Any:
        """Move the tensors to shared memory, for other processes, as :meth:`torch.nn.Module.share_memory` does.

        Raises:
            ConfigurationError: If a tensor is in a layout of a kernel, which has no memory that can be shared. Nothing
                was moved.
        """
        opaque = next((name for name, tensor in self.tensors().items() if tensor.layout is not torch.strided), None)
        if opaque is not None:
            raise ConfigurationError(
                f"tensor {opaque!r} is in the layout of a kernel and cannot be in shared memory. Load the model in "
                "each process with fxquant.load, or compile it for a backend with plain tensors, such as 'fake-quant'"
            )
        return super().share_memory()

    def enable_group_offload(
        self,
        onload_device: str | torch.device,
        offload_device: str | torch.device = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | None = None,
        block_modules: Any = None,
        exclude_kwargs: Any = None,
    ) -> None:
        """Keep the tensors on the CPU, and move each to the device for the ops that read it, as diffusers does.

        Tensors move one by one, whatever ``offload_type`` and ``num_blocks_per_group`` say: a graph has no blocks. So
        the device holds the largest tensor and the activations. :meth:`disable_group_offload` ends it.

        Args:
            onload_device: The device that computes. Inputs are moved there, and the output stays there.
            offload_device: Where the tensors stay: the CPU.
            offload_type: ``"block_level"`` or ``"leaf_level"``; both move the tensors one by one.
            num_blocks_per_group: Accepted, because pipelines pass it.
            non_blocking: Copy without waiting, where the memory is pinned.
            use_stream: Not supported.
            record_stream: Goes with ``use_stream``.
            low_cpu_mem_usage: Goes with ``use_stream``.
            offload_to_disk_path: Not supported.
            block_modules: Accepted for pipelines; there are no blocks.
            exclude_kwargs: Not supported.

        Raises:
            ConfigurationError: If an option is not supported; nothing was moved.
            BackendError: If the backend does not run on the device.
        """
        for name, value in (
            ("use_stream", use_stream),
            ("record_stream", record_stream),
            ("offload_to_disk_path", offload_to_disk_path),
            ("exclude_kwargs", exclude_kwargs),
        ):
            if value:
                raise ConfigurationError(
                    f"{name}={value!r} does not work for a captured model: its tensors move from the CPU one by one, "
                    "without a second stream or a file, and its inputs move with them. Leave it out"
                )
        if offload_type not in ("block_level", "leaf_level"):
            raise ConfigurationError(f"offload_type={offload_type!r} is not known; use 'block_level' or 'leaf_level'")
        if torch.device(offload_device).type != "cpu":
            raise ConfigurationError(f"a captured model is offloaded to the CPU, not to {offload_device}")
        self._offload(usable_device(onload_device), Group(non_blocking))

    def disable_group_offload(self) -> None:
        """End :meth:`enable_group_offload`. The tensors stay on the CPU until the model is moved or called."""
        self._place.streaming = None

    def _offload(self, device: torch.device, options: Group) -> None:
        """Keep the tensors on the CPU, and stream them to a device in each call."""
        if self.backend is not None:
            self.backend.check_device(device)
        self._place.streaming = None
        target = self.runs_on
        if target.type != device.type and not self._lowers_anywhere():
            self.to(device)
        else:
            self._retarget(target, device)
        self._place.home = device
        self._move(lambda tensor: tensor.to("cpu"))
        self._place.streaming = Streaming(device, options)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules of the original; while accelerate offloads the model, what its hooks are attached to.

        A part of a model, such as the decoder of a VAE, has both: accelerate offloads the model around it, and the part
        sees nothing but its children being listed.
        """
        slot = self._modules.get(SLOT)
        if slot is not None:
            yield SLOT, slot
        if slot is None or self._is_part():
            yield from super().named_children()

    def _is_part(self) -> bool:
        return whole_of(self.architecture.skeleton) is not None

    def _expect_offload(self) -> None:
        """Offer accelerate a stand-in for the graphs, from which the model learns to which device it is offloaded."""
        self._modules[SLOT] = Slot(self._offload_by_accelerate, self.disable_group_offload)

    def _offload_by_accelerate(self, device: torch.device) -> None:
        try:
            self._offload(device, Group())
        except FxquantError:
            if not self._is_part():
                sys.modules["accelerate.hooks"].remove_hook_from_module(self)  # Its hook is being attached.
            raise

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name == "_hf_hook" and self._modules.pop(SLOT, None) is not None:
            self._place.streaming = None
            if self._is_part():
                self._expect_offload()

    def _lowers_anywhere(self) -> bool:
        """Whether the graphs run on every type of device that the backend supports."""
        return self.backend is None or self.backend.moves

    def _arrive(self) -> None:
        """Lower a parked model for the device where its tensors are, before a call runs there."""
        if self._place.home is not None and self._place.streaming is None:
            if self._place.home == self.device or self._lowers_anywhere():
                self._retarget(self._place.home, self.device)
            else:
                self._lower_again(self.device)

    @contextlib.contextmanager
    def _at_home(self) -> Iterator[None]:
        """Bring parked tensors to the device of the graphs meanwhile: kernels can only read their own forms there."""
        parked = self.device
        if self._place.home is None or self._place.home == parked:
            yield
            return
        self._move(lambda tensor: tensor.to(self._place.home))
        try:
            yield
        finally:
            self._move(lambda tensor: tensor.to(parked))

    def _retarget(self, before: torch.device, device: torch.device) -> None:
        """Let the ops of the graphs name this device in place of the one before."""
        if device != before:
            for captured in self.every:
                retarget(captured.module, device)
        self._place.home = None

    def _lower_again(self, device: torch.device) -> None:
        from fxquant.runtime.replay import lowered_for  # It builds models, so it imports this class.

        made = lowered_for(self, device)  # type: ignore[arg-type]
        self._place.home = None  # First, because branches of LoRAs are made where the graphs run.
        self._become(made)

    def _become(self, made: GraphModel) -> None:
        """Take the graphs of a model that was made of this one."""
        self.graphs, self.captured = made.graphs, made.captured
        self.backend, self.shared, self._make_graph = made.backend, made.shared, made._make_graph
        copy_adapters(self, self)  # type: ignore[arg-type]  # Their branches are made anew for the new graphs.

    def _converted(self, dtype: torch.dtype, device: torch.device) -> GraphModel:
        """What :meth:`_adopt` takes to compute in another dtype. This model stays as it is."""
        from fxquant.runtime.converting import converted  # These build models, so they import this class.
        from fxquant.runtime.tracing import retraced

        made = retraced if self.plan is None else converted
        return made(self, dtype, self.runs_on if self._place.streaming else device)  # type: ignore[arg-type]

    def _adopt(self, made: GraphModel) -> None:
        """Be another form of this model from now on, on its device or offloaded as before."""
        streaming = self._place.streaming
        self.plan, self._dtype, self.weights, self._place = made.plan, made.dtype, made.weights, Place()
        object.__setattr__(self, "architecture", made.architecture)
        self._become(made)
        if streaming is not None:
            self._offload(streaming.device, streaming.options)

    def check_to(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Refuse a dtype or a device before anything changes.

        Raises:
            ConfigurationError: If no captured model computes in the dtype, or the device holds no values.
            BackendError: If the backend does not run on the device.
        """
        if dtype is not None:
            check_dtype(dtype)
        if device is None:
            return
        if self.parallel is not None and device.type != self.parallel.mesh.device_type:
            raise ConfigurationError(
                f"this model is tensor-parallel on a mesh of {self.parallel.mesh.device_type}; move the model that "
                f"fxquant.parallelize was given to {device.type}, and divide it on a mesh of that device"
            )
        if device.type == "meta":
            raise ConfigurationError(
                "on the meta device a model would lose its tensors; delete the model, and read it again with "
                "fxquant.load when it is needed"
            )
        stays = self._place.streaming is not None or device.type == "cpu"  # On the CPU a model may be parked.
        if self.backend is not None and not stays:
            self.backend.check_device(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GraphModel:
        here = self.device
        probe = fn(torch.empty(0, dtype=self._dtype, device=here))
        self.check_to(probe.device, probe.dtype)
        if probe.dtype != self._dtype:
            self._adopt(self._converted(probe.dtype, probe.device))
            return self  # type: ignore[return-value]
        goal, target = probe.device, self._place.home or here
        if goal != here and self._place.streaming is not None:
            warnings.warn(
                f"this model is offloaded, and stays on the CPU instead of moving to {goal}; disable_group_offload(), "
                "or pipe.remove_all_hooks() after pipe.enable_sequential_cpu_offload(), ends that",
                stacklevel=4,
            )
        elif goal == here:
            self._move(fn)
        elif goal == target:
            self._move(fn)
            self._place.home = None
        elif self._lowers_anywhere() or goal.type == target.type:
            if self.backend is not None:
                self.backend.check_device(goal)
            self._move(fn)
            self._retarget(target, goal)
        elif goal.type == "cpu" and all(tensor.layout is torch.strided for tensor in self.tensors().values()):
            self._move(fn)
            self._place.home = target
        else:
            self._lower_again(goal)
        return self  # type: ignore[return-value]

    def _move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to every tensor that the graphs read. Casts are undone: scales have dtypes of their own."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        adapters = adapters_of(self)  # type: ignore[arg-type]
        branching = [] if adapters is None else [captured.module for captured in adapters.captured]
        for module in (*self._modules.values(), *branching):
            if module is not None:
                module._apply(keep_dtype)
        self._share(self.every)
        if adapters is not None:
            adapters.moved()

    def _share(self, graphs: list[CapturedGraph]) -> None:
        """Let all graphs hold the same tensor under each name."""
        held: dict[str, Tensor] = {}
        for captured in graphs:
            for target, tensor in read_tensors(captured.module).items():
                first = held.setdefault(target, tensor)
                if first is not tensor and first.shape == tensor.shape and first.dtype == tensor.dtype:
                    set_tensor(captured.module, target, first)
