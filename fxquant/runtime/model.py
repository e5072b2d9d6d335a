"""The drop-in model: graphs behind the signature, config and output class of the original."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.adapters.branches import Branching
from fxquant.capture.calls import Call, CallSpec
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.hooks import copy_hooks, hand_on_hooks
from fxquant.capture.threads import tracing_alone, without_autocast
from fxquant.capture.trace import Architecture
from fxquant.errors import ConfigurationError, QualityWarning
from fxquant.ir.shared import SharedTensors
from fxquant.ir.sources import forget_sources
from fxquant.ir.tensors import forget_inferred, read_tensors, weights_and_buffers
from fxquant.pipeline.backend import Backend
from fxquant.planning.plan import Plan
from fxquant.runtime.caches.cacheable import Cacheable
from fxquant.runtime.caches.state import Context
from fxquant.runtime.compiling import Compilable
from fxquant.runtime.drop_in import changes, hand_on, refusal
from fxquant.runtime.forward import forward_for
from fxquant.runtime.lora import (
    NORMS,
    adapters_of,
    check_norms,
    copy_adapters,
    is_of_lora,
    lora_attribute,
    lora_tensors,
)
from fxquant.runtime.moving import Movable, Place
from fxquant.runtime.offloading import is_offloading
from fxquant.runtime.pretrained import Pretrained, refuse_part

_WATCHED_CALLS = 64  # Number of calls whose timesteps are checked on a GPU.

MakeGraph = Callable[..., CapturedGraph]
"""Makes a graph for a model and a call, and for quantized models with branches, if given."""


class GraphModel(Cacheable, Compilable, Pretrained, Movable):
    """A diffusion transformer as one FX graph for each kind of call.

    Pipelines accept it in place of the original: it has the original's ``config``, ``dtype``, ``device``, ``forward``
    signature and output class. It hands on those other attributes that give facts and change nothing
    (:mod:`fxquant.runtime.drop_in`). A call whose shapes or optional inputs fit no graph captures a further graph. The
    graphs share their tensors.

    ``state_dict`` has the tensors by their names in the model, whatever graphs were captured, and those of LoRAs by the
    names of peft, so that ``peft.get_peft_model_state_dict`` finds them. To write files, use
    :func:`fxquant.save`. A pickle of a quantized model holds such a checkpoint.

    Attributes:
        graphs: The FX graph modules, one per kind of call; placeholders are the tensor inputs.
        captured: The same graphs with the calls that they serve.
        plan: What was decided; None for a model that was only traced.
        backend: What runs the graphs; None for a model that was only traced.
        shared: What the graphs decided about the tensors that they share.
        parallel: For a model of which this rank holds a part: the ranks (:class:`fxquant.parallel.state.Parallel`).
        weights: For a model that was only traced: the original's, which graphs of later calls read. Otherwise empty.
    """

    graphs: nn.ModuleList
    plan: Plan | None
    parallel: Any = None

    def __init__(
        self,
        architecture: Architecture,
        dtype: torch.dtype,
        plan: Plan | None,
        make_graph: MakeGraph,
        backend: Backend | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
        shared: SharedTensors | None = None,
    ) -> None:
        super().__init__()
        self.graphs = _Graphs()
        self.plan = plan
        self.backend = backend
        self.captured: list[CapturedGraph] = []
        self._make_graph = make_graph
        self.weights = {} if weights is None else weights
        self.shared = SharedTensors() if shared is None else shared
        self._dtype = dtype
        self._place = Place()
        self._watched = 0
        self._pieces = None
        self._context = Context()
        # Not a submodule, to hide its fake parameters. From here on, attributes of the original cannot be set.
        object.__setattr__(self, "architecture", architecture)
        self.forward = forward_for(self, architecture)
        self.eval()
        if self._is_part():
            self._expect_offload()

    @property
    def config(self) -> Any:
        """The original model's config."""
        return self.architecture.skeleton.config

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point dtype of the original model; inputs and outputs keep it."""
        return self._dtype

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            architecture = self.__dict__.get("architecture")
            if architecture is None or name.startswith("__"):
                raise
            if is_of_lora(self, name):
                return lora_attribute(self, name)
            return hand_on(architecture.skeleton, name, self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == NORMS:
            check_norms(self, value)
        own = name in self.__dict__ or name in ("graphs", "training") or hasattr(GraphModel, name)
        if not own and "architecture" in self.__dict__:
            if name == "_diffusers_hook":
                raise refusal(name)
            if name == "_hf_hook" and is_offloading(value):
                self._expect_offload()
            if changes(self.architecture.skeleton, name):
                raise refusal(name, "it would not change what was captured. Set it in the float model and compile that")
        super().__setattr__(name, value)

    def add(self, captured: CapturedGraph) -> None:
        """Add a graph. It shares the tensors that an existing graph holds under the same name."""
        self._share([*self.every, captured])  # First, because another thread may call a listed graph at once.
        self.graphs.append(captured.module)
        self.captured.append(captured)
        forget_inferred(captured.module.graph)
        forget_sources()

    @property
    def serving(self) -> list[CapturedGraph]:
        """The graphs that serve calls now: those with the branches of LoRAs while LoRAs are active."""
        found = adapters_of(self)
        return self.captured if found is None or found.serving is None else found.serving

    def make_graph(self, call: Call | CallSpec, branching: Branching | None = None) -> CapturedGraph:
        """Make a graph for a call, with branches if given; it is not added to the graphs."""
        with tracing_alone(), without_autocast(self.runs_on.type), self._at_home():
            captured = self._make_graph(self, call, *(() if branching is None else (branching,)))
        if self._place.home is not None:
            captured.module.to(self.device)
        return captured

    def capture(self, call: Call) -> CapturedGraph:
        """Make the graph that serves a call, and add it."""
        found = adapters_of(self)
        if found is None or found.serving is None:
            captured = self.make_graph(call)
            self.add(captured)
        else:
            captured = found.make_graph(call)
            self._share([*self.every, captured])
            found.captured.append(captured)
        return captured

    @property
    def lasting(self) -> list[CapturedGraph]:
        """The graphs captured in calibration. Graphs of later calls are captured again wherever they are needed."""
        return self.captured if self.plan is None else self.captured[: len(self.plan.calls)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that any graph reads, by name."""
        found: dict[str, torch.Tensor] = {}
        for captured in self.captured:
            for target, tensor in read_tensors(captured.module).items():
                found.setdefault(target, tensor)
        return found

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the graphs captured in calibration, by name, as checkpoints store it.

        Raises:
            ConfigurationError: If this rank holds only a part of the model.
        """
        refuse_part(self.parallel)
        found: dict[str, torch.Tensor] = {}
        with self._at_home():
            for captured in self.lasting:
                held = read_tensors(captured.module) if self.backend is None else self.backend.stored(captured.module)
                for name, tensor in held.items():
                    found.setdefault(name, tensor)
        return found

    def find(self, call: Call) -> CapturedGraph | None:
        """The graph that serves a call, if one was captured."""
        return next((captured for captured in self.serving if captured.call.fits(call)), None)

    def find_compiling(self, call: Call) -> CapturedGraph | None:
        """Like ``find``, within ``torch.compile``: values are unknown there, so the compiled graph checks them."""
        if self.backend is not None:
            self.backend.compiling()
        fitting = [captured for captured in self.serving if captured.call.fits(call, values=False)]
        if len(fitting) != 1:
            return self.find(call)
        fitting[0].call.assert_known(call.leaves)
        return fitting[0]

    def watch(self, call: Call) -> None:
        """Warn once of a timestep far from all calibrated ones. It is treated as the nearest calibrated timestep."""
        known = self.plan.timesteps if self.plan else []
        name = self.plan.timestep if self.plan else None
        if len(known) < 2 or self._watched >= _WATCHED_CALLS or name not in call.names:
            return
        step = call.leaf(name)
        if not isinstance(step, torch.Tensor) or isinstance(step, FakeTensor) or not step.numel():
            return
        # Reading a tensor on a GPU waits for its computation, so on a GPU only the first calls are checked.
        self._watched += step.device.type != "cpu"
        low, high = (float(end) for end in torch.aminmax(step.detach().float()))
        slack = max(right - left for left, right in itertools.pairwise(known))
        outside = [end for end in (high, low) if not known[0] - slack <= end <= known[-1] + slack]
        if outside:
            self._watched = _WATCHED_CALLS
            warnings.warn(
                f"timestep {outside[0]:g} is outside of the calibrated timesteps, {known[0]:g} to {known[-1]:g}, and "
                "is treated as the nearest of them; calibrate with the schedule that you use. "
                "Further timesteps are not reported.",
                QualityWarning,
                stacklevel=4,
            )

    def train(self, mode: bool = True) -> GraphModel:
        """Refuse training mode: the graphs were captured from the model in evaluation mode.

        Raises:
            ConfigurationError: If ``mode`` is true.
        """
        if mode:
            raise ConfigurationError(
                "a captured model has no training mode: its graphs were captured in evaluation mode, without dropout. "
                "Train the float model and compile that"
            )
        super().train(False)
        return self

    def to_empty(self, **_: Any) -> GraphModel:
        """Refuse, because the tensors would be lost.

        Raises:
            ConfigurationError: Always; says how to move the tensors.
        """
        raise ConfigurationError("to_empty would lose the model's tensors; move them with to(device)")

    def _held(self) -> dict[str, torch.Tensor]:
        """The tensors that a state dict holds, by name, without those of LoRAs."""
        found: dict[str, torch.Tensor] = {}
        for captured in self.lasting:
            for target, tensor in read_tensors(captured.module).items():
                found.setdefault(target, tensor)
        return {name: found.get(name, weight) for name, weight in self.weights.items()} if self.weights else found

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in {**self._held(), **lora_tensors(self)}.items():
            destination[f"{prefix}{name}"] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        adapters = adapters_of(self)
        of_loras = lora_tensors(self)
        given: dict[str, Any] = {}
        for name, tensor in {**self._held(), **of_loras}.items():
            value = state_dict.pop(f"{prefix}{name}", None)
            if value is None and strict and name not in of_loras:
                missing_keys.append(f"{prefix}{name}")
            elif value is not None and value.shape != tensor.shape:
                error_msgs.append(f"{prefix}{name} has shape {tuple(value.shape)}, not {tuple(tensor.shape)}")
            elif value is not None:
                given[name] = value
        if adapters is not None and (own := {name: given[name] for name in of_loras if name in given}):
            adapters.load_tensors(own)
        if self.plan is not None:  # Later graphs may hold results computed from the tensors that are replaced.
            self.captured = self.lasting
            self.graphs = _Graphs(captured.module for captured in self.captured)
            if adapters is not None:
                adapters.forget_graphs()
        for number, captured in enumerate(self.captured):
            for name, tensor in weights_and_buffers(captured.module):
                state_dict[f"{prefix}graphs.{number}.{name}"] = given.get(name, tensor)
        read = self.tensors()
        with torch.no_grad():
            for name in self.weights.keys() & given.keys() - read.keys():
                self.weights[name].copy_(given[name])
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.plan is None:
            raise ConfigurationError(
                "a traced model cannot be pickled or written by torch.save: pickle the float model, and make it again "
                "with fxquant.trace"
            )
        from fxquant.storage.pickling import reduced

        return reduced(self)

    def __copy__(self) -> GraphModel:
        clone = GraphModel.__new__(GraphModel)
        self._fill(clone)
        return clone

    def _fill(self, clone: GraphModel) -> None:
        """Initialize another model so that it shares everything with this one."""
        GraphModel.__init__(
            clone, self.architecture, self._dtype, self.plan, self._make_graph, self.backend, self.weights, self.shared
        )
        clone._place, clone._pieces, clone.parallel = self._place, self._pieces, self.parallel
        for captured in self.captured:
            clone.add(captured)
        copy_adapters(self, clone)
        self._copy_cache_to(clone)
        hand_on_hooks(self, clone)

    def take_place_of(self, model: nn.Module) -> None:
        """Turn an object into a quantized model that shares everything with this one.

        ``from_pretrained`` of diffusers returns the object that it made, so this object has to become quantized. Other
        threads may use the object meanwhile: its old ``forward`` goes last, and attributes are there at every moment.
        """
        own, old = vars(copy.copy(self)), vars(model)
        gone = old.keys() - own.keys()
        old.update({name: value for name, value in own.items() if name != "forward"})
        model.__class__ = GraphModel
        old["forward"] = forward_for(model, self.architecture)
        for name in gone:
            del old[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModel:
        plan, weights = copy.deepcopy(self.plan, memo), copy.deepcopy(self.weights, memo)
        shared = copy.deepcopy(self.shared, memo)
        clone = GraphModel(self.architecture, self._dtype, plan, self._make_graph, self.backend, weights, shared)
        clone._place, clone._pieces = self._place.copy(), self._pieces and self._pieces.copy(self.backend)
        clone.parallel = self.parallel
        clones: dict[str, torch.Tensor] = {}
        for captured in self.captured:
            for name, tensor in read_tensors(captured.module).items():
                if tensor.layout is not torch.strided:  # Tensors in layouts of kernels do not support deepcopy.
                    clones[name] = memo[id(tensor)] = clones[name] if name in clones else tensor.clone()
            module = copy.deepcopy(captured.module, memo)
            clone.add(replace(captured, module=module))
        copy_adapters(self, clone)
        self._copy_cache_to(clone)
        copy_hooks(self, clone, memo)
        return clone


class _Graphs(nn.ModuleList):
    """The list of graphs. A state dict names their tensors by the model, not by graph."""

    def state_dict(self, *args: Any, destination: Any = None, **_: Any) -> Any:
        """Add nothing: the model itself writes the tensors."""
        return args[0] if args else destination
