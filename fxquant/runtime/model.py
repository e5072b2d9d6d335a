"""The drop-in model: graphs behind the signature, config and output class of the original."""

from __future__ import annotations

import copy
import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.capture.describe import warn_of_many
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.threads import is_traced_elsewhere, tracing_alone, without_autocast
from fxquant.capture.trace import Architecture
from fxquant.errors import CaptureError, CheckpointError, ConfigurationError, QualityWarning
from fxquant.ir.tensors import bind, read_tensors, set_tensor, weights_and_buffers
from fxquant.pipeline.backend import Backend
from fxquant.planning.plan import Plan
from fxquant.runtime import torch_compile as compiling
from fxquant.runtime.devices import retarget
from fxquant.runtime.drop_in import DropIn, changes, hand_on, refusal
from fxquant.runtime.nans import showing_nans

_MANY_HELD = 8  # Graphs for values of inputs, at which somebody should be told.
_WATCHED_CALLS = 64  # On a GPU, calls whose timesteps are looked at.

MakeGraph = Callable[["GraphModel", tuple[str, ...], Sequence[Any], Any], CapturedGraph]


class GraphModel(DropIn):
    """A diffusion transformer as one FX graph for each kind of call.

    Pipelines take it in place of the original: it has its ``config``, ``dtype``, ``device``, ``forward`` signature and
    output class, and hands on other attributes that tell something and change nothing
    (:mod:`fxquant.runtime.drop_in`). A call whose shapes or optional inputs fit none of the graphs captures a further
    one; the graphs share their tensors.

    ``state_dict`` has the tensors by their names in the model, whatever graphs were captured. For files there is
    :func:`fxquant.save`: the model itself cannot be pickled.

    Attributes:
        graphs: The FX graph modules, one a kind of call; placeholders are the tensor inputs.
        captured: The same with the calls that they serve.
        plan: What was decided; None for a model that was only traced.
        backend: What runs the graphs; None for a model that was only traced.
        weights: For a model that was only traced the original's, which graphs of later calls read; otherwise empty.
    """

    graphs: nn.ModuleList
    plan: Plan | None

    def __init__(
        self,
        architecture: Architecture,
        dtype: torch.dtype,
        plan: Plan | None,
        make_graph: MakeGraph,
        backend: Backend | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.graphs = _Graphs()
        self.plan = plan
        self.backend = backend
        self.captured: list[CapturedGraph] = []
        self._make_graph = make_graph
        self.weights = {} if weights is None else weights
        self._dtype = dtype
        self._watched = 0
        # Not a submodule: its fake parameters are nobody's business. From here on, its attributes cannot be set.
        object.__setattr__(self, "architecture", architecture)
        self.forward = functools.partial(_forward, self)
        functools.update_wrapper(self.forward, architecture.skeleton.forward)
        self.forward.__signature__ = architecture.signature  # type: ignore[attr-defined]
        self.eval()
        let_pipelines_save(type(self))

    @property
    def config(self) -> Any:
        """The original model's config."""
        return self.architecture.skeleton.config

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point dtype of the original model, which inputs and outputs keep."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        held = itertools.chain(self.parameters(), self.buffers(), self.architecture.skeleton.parameters())
        return next((tensor.device for tensor in held), torch.device("cpu"))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            architecture = self.__dict__.get("architecture")
            if architecture is None or name.startswith("__"):
                raise
            return hand_on(architecture.skeleton, name, self)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in self.__dict__ or name in ("graphs", "training") or hasattr(GraphModel, name)
        if not own and "architecture" in self.__dict__:
            _refuse_streaming(name, value)
            if changes(self.architecture.skeleton, name):
                raise refusal(name, "it would not change what was captured. Set it in the float model and compile that")
        super().__setattr__(name, value)

    def add(self, captured: CapturedGraph) -> None:
        """Add a graph; tensors that a graph here holds under the same name are shared."""
        self._share([*self.captured, captured])  # First, for another thread may call it once it is listed.
        self.graphs.append(captured.module)
        self.captured.append(captured)

    @property
    def lasting(self) -> list[CapturedGraph]:
        """The graphs of calibration. Those of later calls are captured again wherever they are needed."""
        return self.captured if self.plan is None else self.captured[: len(self.plan.calls)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that any graph reads, by name."""
        found: dict[str, torch.Tensor] = {}
        for captured in self.captured:
            for target, tensor in read_tensors(captured.module).items():
                found.setdefault(target, tensor)
        return found

    def find(self, names: tuple[str, ...], leaves: Sequence[Any], structure: Any) -> CapturedGraph | None:
        """The graph that serves a call with these leaves, if one was captured."""
        return next((captured for captured in self.captured if captured.call.fits(names, leaves, structure)), None)

    def find_compiling(self, names: tuple[str, ...], leaves: Sequence[Any], structure: Any) -> CapturedGraph | None:
        """The same within ``torch.compile``, where values are not known: the compiled graph checks them as it runs."""
        if self.backend is not None:
            self.backend.compiling()
        fitting = [captured for captured in self.captured if captured.call.fits(names, leaves, structure, values=False)]
        if len(fitting) != 1:
            return self.find(names, leaves, structure)
        fitting[0].call.assert_held(leaves)
        return fitting[0]

    def watch(self, names: tuple[str, ...], leaves: Sequence[Any]) -> None:
        """Warn, once, of a timestep far from all that were calibrated. It is treated as the nearest that was."""
        known = self.plan.timesteps if self.plan else []
        name = self.plan.timestep if self.plan else None
        if len(known) < 2 or self._watched >= _WATCHED_CALLS or name not in names:
            return
        step = leaves[names.index(name)]
        if not isinstance(step, torch.Tensor) or isinstance(step, FakeTensor) or not step.numel():
            return
        # Looking at a tensor on a GPU waits for it, so the first calls have to do there.
        self._watched += step.device.type != "cpu"
        low, high = (float(end) for end in torch.aminmax(step.detach().float()))
        slack = max(right - left for left, right in itertools.pairwise(known))
        outside = [end for end in (high, low) if not known[0] - slack <= end <= known[-1] + slack]
        if outside:
            self._watched = _WATCHED_CALLS
            warnings.warn(
                f"timestep {outside[0]:g} is outside of those that were calibrated, {known[0]:g} to {known[-1]:g}, and "
                "is treated as the nearest of these; calibrate with the schedule that you use. "
                "Further timesteps are not reported.",
                QualityWarning,
                stacklevel=4,
            )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile in place, as :meth:`torch.nn.Module.compile` does, with the settings that the backend needs."""
        super().compile(*args, **kwargs)
        compiled, backend = self._compiled_call_impl, self.backend
        assert compiled is not None
        if backend is not None:

            def call(*args: Any, **kwargs: Any) -> Any:
                with backend.settings():
                    return compiled(*args, **kwargs)

            self._compiled_call_impl = call

    def save_pretrained(self, save_directory: str | Path, *, push_to_hub: bool = False, **_: Any) -> None:
        """Write a checkpoint, as pipelines ask their components to; see :func:`fxquant.save`.

        Raises:
            DropInError: If it is to be pushed to the hub.
        """
        from fxquant.storage.checkpoint import save

        if push_to_hub:
            raise refusal("push_to_hub")

        save(self, save_directory, overwrite=True)

    def train(self, mode: bool = True) -> GraphModel:
        """Refuse the training mode: what was captured is the model in evaluation mode.

        Raises:
            ConfigurationError: If ``mode`` is true.
        """
        if mode:
            raise ConfigurationError(
                "a captured model has no training mode: its graphs are those of evaluation, without dropout. Train the "
                "float model and compile that"
            )
        super().train(False)
        return self

    def to_empty(self, **_: Any) -> GraphModel:
        """Refuse to lose the tensors.

        Raises:
            ConfigurationError: Says how to move them.
        """
        raise ConfigurationError("to_empty would lose the model's tensors; move them with to(device)")

    def _held(self) -> dict[str, torch.Tensor]:
        """What a state dict holds."""
        found: dict[str, torch.Tensor] = {}
        for captured in self.lasting:
            for target, tensor in read_tensors(captured.module).items():
                found.setdefault(target, tensor)
        return {name: found.get(name, weight) for name, weight in self.weights.items()} if self.weights else found

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in self._held().items():
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
        given: dict[str, Any] = {}
        for name, tensor in self._held().items():
            value = state_dict.pop(f"{prefix}{name}", None)
            if value is None and strict:
                missing_keys.append(f"{prefix}{name}")
            elif value is not None and value.shape != tensor.shape:
                error_msgs.append(f"{prefix}{name} has shape {tuple(value.shape)}, not {tuple(tensor.shape)}")
            elif value is not None:
                given[name] = value
        if self.plan is not None:  # Later graphs may hold what was made of the tensors that are replaced.
            self.captured = self.lasting
            self.graphs = _Graphs(captured.module for captured in self.captured)
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
        how = (
            "write it with fxquant.save(model, folder) and read it with fxquant.load(folder)"
            if self.plan is not None
            else "it is made again by fxquant.trace"
        )
        raise ConfigurationError(
            f"a captured model cannot be pickled, by torch.save neither: {how}. Its tensors alone are in state_dict()"
        )

    def __copy__(self) -> GraphModel:
        clone = GraphModel(self.architecture, self._dtype, self.plan, self._make_graph, self.backend, self.weights)
        for captured in self.captured:
            clone.add(captured)
        return clone

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, torch_dtype: torch.dtype | None = None, **options: Any
    ) -> GraphModel:
        """Read a checkpoint, as pipelines ask their components to; see :func:`fxquant.load`.

        Raises:
            ConfigurationError: If another dtype is asked for than the model was quantized in.
        """
        from fxquant.storage.checkpoint import load

        model = load(folder, **options)
        if torch_dtype not in (None, model.dtype):
            raise ConfigurationError(
                f"{folder} was quantized in {model.dtype} and keeps it; read it without torch_dtype={torch_dtype}"
            )
        return model

    def _share(self, graphs: Sequence[CapturedGraph]) -> None:
        held: dict[str, torch.Tensor] = {}
        for captured in graphs:
            for target, tensor in read_tensors(captured.module).items():
                first = held.setdefault(target, tensor)
                if first is not tensor and first.shape == tensor.shape and first.dtype == tensor.dtype:
                    set_tensor(captured.module, target, first)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GraphModel:
        probe = fn(torch.empty(0, dtype=self._dtype, device=self.device))
        if probe.dtype != self._dtype:
            raise ConfigurationError(
                f"a captured model keeps the dtype it was captured with ({self._dtype}); "
                f"convert the original to {probe.dtype} first and compile that"
            )
        if probe.device.type == "meta":
            raise ConfigurationError(
                "on the device meta a model loses its tensors; delete it, and fxquant.load it again when it is needed"
            )
        moved = probe.device != self.device
        if moved and self.backend is not None:
            self.backend.check_move(self.device, probe.device)

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            changed = fn(tensor)  # A cast to the model's dtype is none: scales and factors have dtypes of their own.
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        super()._apply(keep_dtype, recurse)
        self._share(self.captured)
        if moved:
            for captured in self.captured:
                retarget(captured.module, probe.device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModel:
        plan, weights = copy.deepcopy(self.plan, memo), copy.deepcopy(self.weights, memo)
        clone = GraphModel(self.architecture, self._dtype, plan, self._make_graph, self.backend, weights)
        clones: dict[str, torch.Tensor] = {}
        for captured in self.captured:
            for name, tensor in read_tensors(captured.module).items():
                if tensor.layout is not torch.strided:  # Tensors of kernels' own layouts know no deepcopy.
                    clones[name] = memo[id(tensor)] = clones[name] if name in clones else tensor.clone()
            module = copy.deepcopy(captured.module, memo)
            clone.add(replace(captured, module=module))
        return clone


class _Graphs(nn.ModuleList):
    """The graphs, whose tensors a state dict names by the model, not by graph."""

    def state_dict(self, *args: Any, destination: Any = None, **_: Any) -> Any:
        """Nothing: the model itself writes the tensors."""
        return args[0] if args else destination


def _refuse_streaming(name: str, value: Any) -> None:
    """Refuse hooks of accelerate that bring weights to a module when it is called.

    A graph calls no modules, so their weights would never come. accelerate puts such a hook on the model itself before
    any weight moves, so nothing has happened yet.

    Raises:
        ConfigurationError: Says how to offload instead.
    """
    if name == "_diffusers_hook":
        raise refusal(name)
    hooks = getattr(value, "hooks", (value,)) if name == "_hf_hook" else ()
    for hook in hooks:
        if getattr(hook, "io_same_device", False) and getattr(hook, "execution_device", None) is None:
            raise ConfigurationError(
                "the weights of a captured model are read by a graph and cannot be brought to the device module by "
                "module, as sequential offload and device maps do. Use pipe.enable_model_cpu_offload(), which moves "
                "the model as a whole, or .to(device)"
            )


def quantized_model(model: Any, taker: str) -> tuple[GraphModel, Plan]:
    """A quantized model that was given to a function, without ``torch.compile`` around it, and its plan.

    Args:
        model: What was given.
        taker: The function, for the message.

    Raises:
        ConfigurationError: If it is none.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, GraphModel):
        raise ConfigurationError(f"{taker} takes a model that fxquant.compile made, not a {type(model).__name__}")
    if model.plan is None:
        raise ConfigurationError(
            f"{taker} takes a model that fxquant.compile made; this one was traced by fxquant.trace, and is not "
            "quantized"
        )
    return model, model.plan


def let_pipelines_save(kind: type[nn.Module]) -> None:
    """Enter a class in the table by which diffusers finds how the components of a pipeline are saved and loaded.

    ``DiffusionPipeline.save_pretrained`` leaves out, with a line in the log, what the table does not have.
    """
    if "diffusers" not in sys.modules:  # Nor is there a pipeline; importing diffusers takes seconds.
        return
    from diffusers.pipelines import pipeline_loading_utils as tables

    methods = ["save_pretrained", "from_pretrained"]
    tables.LOADABLE_CLASSES.setdefault(kind.__module__, {})[kind.__name__] = methods
    tables.ALL_IMPORTABLE_CLASSES[kind.__name__] = methods


def _forward(self: GraphModel, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_dynamo_compiling() or (torch.compiler.is_compiling() and not is_traced_elsewhere()):
        # Within something larger that is compiled.
        names, leaves, structure = self.architecture.canonical(args, kwargs)
        captured = self.find_compiling(names, leaves, structure)
        if captured is None:
            captured = _capture(self, names, leaves, structure)
        inputs = captured.inputs(leaves)
        return captured.output(showing_nans(captured, inputs, captured.module(*inputs)))
    if (compiler := compiling.callback()) not in (None, False):  # At the beginning of what is compiled.
        call = _begin(self, args, kwargs)
        try:
            leaves = call.code(call.module, *call.inputs)
        except TorchDynamoException as error:
            call = _begin_again(call, error)
            compiling.set_callback(compiler)
            leaves = call.code(call.module, *call.inputs)
        finally:
            _unwatch(self)
        return _end(call, leaves)
    captured, inputs = _choose(self, args, kwargs)
    return captured.output(showing_nans(captured, inputs, captured.module(*inputs)))


compiling.leave_alone(_forward.__code__)


def _choose(self: GraphModel, args: Any, kwargs: Mapping[str, Any]) -> tuple[CapturedGraph, list[torch.Tensor]]:
    """The graph that serves a call, captured if there is none yet, and its inputs."""
    names, leaves, structure = self.architecture.canonical(args, kwargs)
    captured = self.find(names, leaves, structure)
    self.watch(names, leaves)
    if captured is None:
        captured = _capture(self, names, leaves, structure)
    return captured, captured.inputs(leaves)


@torch.compiler.disable
def _begin(self: GraphModel, args: Any, kwargs: Mapping[str, Any]) -> compiling.Call:
    captured, inputs = _choose(self, args, kwargs)
    compiling.watch(self.backend)
    return compiling.begin(captured, inputs)


@torch.compiler.disable
def _begin_again(call: compiling.Call, error: Exception) -> compiling.Call:
    return compiling.begin_again(call, error)


@torch.compiler.disable
def _unwatch(self: GraphModel) -> None:
    compiling.unwatch(self.backend)


@torch.compiler.disable
def _end(call: compiling.Call, leaves: Sequence[Any]) -> Any:
    return call.captured.output(showing_nans(call.captured, call.inputs, leaves))


@torch.compiler.disable
def _capture(self: GraphModel, names: tuple[str, ...], leaves: Sequence[Any], structure: Any) -> CapturedGraph:
    with tracing_alone(), without_autocast(self.device.type):
        if (made := self.find(names, leaves, structure)) is not None:  # By another thread, meanwhile.
            return made
        captured = self._make_graph(self, names, leaves, structure)
        self.add(captured)
    warn_of_many(names, leaves, [graph.call for graph in self.captured])
    held = [graph for graph in self.captured if graph.call.held]
    if captured.call.held and len(held) == _MANY_HELD:
        warnings.warn(
            f"{len(held)} graphs were captured, one for each new value: {captured.static_batch}. Each takes the time "
            "of a capture; let calls share values where you can, say by padding prompts to a few lengths.",
            stacklevel=4,
        )
    return captured


def bound_graph(captured: CapturedGraph, tensors: Mapping[str, torch.Tensor]) -> CapturedGraph:
    """Bind tensors to a graph that a call asked for after the float model was gone.

    Raises:
        CaptureError: If the graph reads a tensor that no captured graph read.
    """
    try:
        bind(captured.module, tensors)
    except CheckpointError as error:
        read = read_tensors(captured.module)
        unread = (name for name in sorted(read.keys() - tensors.keys()) if isinstance(read[name], FakeTensor))
        what = next((f"it reads {name!r}, which none of those did" for name in unread), str(error))
        raise CaptureError(
            f"a call {captured.call} runs a part of the model that no calibration call ran: {what}; calibrate with a "
            "call like this one as well"
        ) from error
    return captured
