"""Traces one call of a diffusion transformer to an FX graph of ATen ops, without the weights of the model.

``torch.export`` in non-strict mode traces a *weightless copy* of the model, with fake tensors in place of parameters.
Tracing thus needs no memory for weights. A checkpoint is loaded without ever holding float weights, and a later call
with other shapes can be traced long after the float model is gone. The values of the weights come from a mapping of
names to tensors.
"""

from __future__ import annotations

import copy
import inspect
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim
from torch.utils import _pytree as pytree

from fxquant.capture.batches import is_batch_open, serves_all
from fxquant.capture.borders import marking, settle
from fxquant.capture.calls import BATCH, TRACED_BATCH, Call, CallSpec, TensorSpec
from fxquant.capture.constants import is_plain
from fxquant.capture.describe import canonical_call, changed_leaves, describe_call
from fxquant.capture.explain import explained, quietly
from fxquant.capture.exporting import export
from fxquant.capture.feature_caches import functional
from fxquant.capture.fingerprint import fingerprint
from fxquant.capture.functionalize import without_writes
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.hooks import drop_own_hooks
from fxquant.capture.known_values import Tracing, is_followed
from fxquant.capture.memoized import Memos
from fxquant.capture.naming import fake_mode_of_model, name_constants, name_layers, names_of
from fxquant.capture.normalize import (
    drop_assertions,
    flatten_signature,
    inline_regions,
    loosen_views,
    refuse_inner_graphs,
)
from fxquant.capture.sharing import shared_trace
from fxquant.capture.state import detached, hollow_out, kept
from fxquant.capture.threads import tracing_alone, without_autocast
from fxquant.capture.transformers_models import built
from fxquant.capture.whole import Whole, made_part
from fxquant.errors import CaptureError, CheckpointError, ConfigurationError, FxquantError
from fxquant.ir.meta import NAMES
from fxquant.ir.tensors import read_tensors, weights_and_buffers

log = logging.getLogger(__name__)


_LONGEST_NAME = 400  # Plans hold names of up to 500 characters, and tensors of a layer add to its name.
_SAME_IN_TRAINING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
"""Modules that compute the same in training mode. diffusers leaves the linears that it fuses in training mode."""

_MOST_TRIED = 4  # If not all Python numbers can be inputs of a graph, up to this many are made constant one by one.


class Architecture:
    """A model without its weights. It can be traced again whenever calls have new input shapes.

    Attributes:
        skeleton: The model with fake parameters. Never run on real data.
        signature: Signature of the model's ``forward``.
        timestep: Name of the ``forward`` argument that holds the timestep.
        original: Returns the model that was copied. Returns None if that model was freed, or if none was copied.
    """

    def __init__(self, skeleton: nn.Module, timestep: str | None) -> None:
        self.skeleton = skeleton
        self.timestep = timestep
        self.original: Callable[[], nn.Module | None] = lambda: None
        self.signature = inspect.signature(skeleton.forward)

    @classmethod
    def of(cls, model: nn.Module, timestep: str | None) -> Architecture:
        """The architecture of ``model``. The model is not changed, and its weights are not copied.

        Raises:
            ConfigurationError: If the model, or a module in it, is in training mode.
            CaptureError: If the model cannot be copied, or a module has a name that cannot be printed.
        """
        training = next(
            (
                name
                for name, module in model.named_modules()
                if module.training and type(module) not in _SAME_IN_TRAINING
            ),
            "" if model.training else None,
        )
        if training is not None:
            raise ConfigurationError(
                f"{f'module {training!r}' if training else 'the model'} is in training mode, in which dropout is "
                "random; call model.eval() before fxquant.compile"
            )
        names = (name for name, _ in model.named_modules())
        if odd := next((name for name in names if not name.isprintable() or len(name) > _LONGEST_NAME), None):
            raise CaptureError(
                f"the module {odd[:100]!r} has a name that is very long or holds characters that cannot be printed; "
                "graphs and plans name layers after their modules, so give it another name"
            )
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        weightless: dict[int, Any] = detached(model) | {
            id(p): nn.Parameter(mode.from_tensor(p.detach()), requires_grad=False) for p in model.parameters()
        }
        try:
            skeleton = copy.deepcopy(model, weightless)
        except FxquantError:
            raise
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} cannot be copied without its weights ({error}); "
                "remove hooks and open handles from the module first"
            ) from error
        drop_own_hooks(skeleton)
        architecture = cls(skeleton, timestep)
        # The weak reference is to the module, not to its parameters: torch cannot swap tensors with weak references.
        architecture.original = weakref.ref(model)
        return architecture

    @classmethod
    def from_config(
        cls, model_class: Any, config: Mapping[str, Any], timestep: str | None, part: str = ""
    ) -> Architecture:
        """Build the architecture of a model of diffusers or transformers from its config, without weights.

        Args:
            model_class: Its class.
            config: Its config.
            timestep: Name of the ``forward`` argument that holds the timestep.
            part: Path of the module to take of it; empty for the whole model.

        Raises:
            CheckpointError: If it has no such module.
        """
        with tracing_alone(), FakeTensorMode(allow_non_fake_inputs=True):
            if hasattr(model_class, "from_config"):
                skeleton = model_class.from_config(dict(config))
            else:
                skeleton = built(model_class, config)
        hollow_out(skeleton)
        if part:
            whole = Whole(type(skeleton), dict(config), part)
            found = dict(skeleton.named_modules()).get(part)
            if found is None:
                raise CheckpointError(f"the class {type(skeleton).__name__} makes no module {part!r}")
            skeleton = functional(made_part(found, whole))
        return cls(skeleton.eval().requires_grad_(False), timestep)

    def on(self, device: torch.device) -> Architecture:
        """The same architecture with its weightless parameters on another device."""
        tensors = [tensor for _, tensor in weights_and_buffers(self.skeleton)]
        if all(tensor.device == device for tensor in tensors):
            return self
        with FakeTensorMode(allow_non_fake_inputs=True):
            moved: dict[int, Any] = {
                id(tensor): torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                for tensor in tensors
            }
        for tensor in tensors:
            if isinstance(tensor, nn.Parameter):
                moved[id(tensor)] = nn.Parameter(moved[id(tensor)], requires_grad=False)
        there = Architecture(copy.deepcopy(self.skeleton, moved), self.timestep)
        there.original = self.original
        return there

    def canonical(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """A call in the form that does not depend on how it was written; see :func:`canonical_call`."""
        return canonical_call(self.signature, args, kwargs, self.timestep)

    def capture(self, call: Call, others: Sequence[CallSpec] = ()) -> CapturedGraph:
        """Trace the graph for calls like this one, with the batch size left open wherever the model allows.

        If the model's code branches on values of integer or boolean inputs, such as the lengths of prompts in a mask,
        the graph is valid only for the values of this call, and other values get their own graph. Python floats are
        inputs of the graph. Python integers are inputs if they had another value in another kind of call. If the code
        branches on such a number, the graph is valid only for the number of this call.

        Args:
            call: The call.
            others: Specs of the calls that already have a graph.

        Raises:
            CaptureError: If ``torch.export`` cannot trace the model; the message shows the line of the model.
        """
        with tracing_alone(), without_autocast(call.device.type):
            return self._capture(call, others)

    def _capture(self, call: Call, others: Sequence[CallSpec]) -> CapturedGraph:
        changing = {name for other in others for name in changed_leaves(call, other) or ()}
        spec, leaves, device = describe_call(call, self.timestep, changing), call.leaves, call.device
        try:
            return self._capture_call(spec, leaves, device)
        except CaptureError:
            if not spec.numbers:
                raise
        # Some code accepts only true Python numbers. The numbers of other inputs may still be left open.
        closed = self._capture_call(spec.with_constants(spec.numbers, leaves), leaves, device)
        for name in spec.numbers if 1 < len(spec.numbers) <= _MOST_TRIED else ():
            with suppress(CaptureError):
                return self._capture_call(spec.with_constants([name], leaves), leaves, device)
        return closed

    def _capture_call(self, call: CallSpec, leaves: Sequence[Any], device: torch.device) -> CapturedGraph:
        numbers = {n: leaf for n, leaf in zip(call.names, leaves, strict=True) if n in call.numbers}
        reason = None
        without_lists = call.with_lists_fixed(leaves, self.timestep)
        for spec in [call] if without_lists == call else [call, without_lists]:
            if not spec.batched:
                continue
            try:
                captured = self.capture_spec(spec, device, numbers)
            except CaptureError as error:
                reason = reason or error.reason
                continue
            if captured.static_batch is None:
                return captured
            reason = reason or captured.static_batch
        if reason is not None:
            log.info("the batch cannot be left open: %s", reason)
        # Trace again even if the batch was fixed at the right size. Loading knows from the start that it is fixed, and
        # a trace that starts with open sizes leaves other ops in the graph.
        fixed = call.at_batch(call.batch_size(leaves), reason)
        try:
            return self.capture_spec(fixed, device, numbers)
        except CaptureError as error:
            return self._capture_holding(fixed, leaves, device, error)

    def _capture_holding(
        self, call: CallSpec, leaves: Sequence[Any], device: torch.device, first: CaptureError
    ) -> CapturedGraph:
        """Trace with known values of masks, lengths and positions. The spec then holds those that the code read."""
        known = [
            name
            for name, leaf in zip(call.names, leaves, strict=True)
            if isinstance(leaf, torch.Tensor) and is_followed(leaf) and name != self.timestep
        ]
        if not known:
            raise first
        tracing, here = Tracing(), self.on(device)
        known += call.numbers
        try:
            program = here._export(call.knowing(known, leaves), device, 1, False, tracing)
        except CaptureError as error:
            raise error from first
        read = tracing.read.difference(call.numbers)
        reason = f"the model's own code branches on the values of {', '.join(sorted(read))}"
        narrowed = call.knowing(tracing.read, leaves)
        return here._finish(program, replace(narrowed, fixed=reason if read else call.fixed), 1)

    def capture_spec(
        self, call: CallSpec, device: torch.device, numbers: Mapping[str, float] | None = None
    ) -> CapturedGraph:
        """Trace the graph for calls of this spec, with inputs and weights on ``device``.

        Args:
            call: The spec.
            device: Device of the inputs and weights.
            numbers: Values of the Python numbers among the inputs of one call, by name. If the model's code branches
                on one of them, the graph is valid only for its value. None if the graph must be valid for all values
                of the numbers that the spec leaves open.

        Raises:
            CaptureError: If ``torch.export`` cannot trace the model for calls of this spec.
        """
        key = (repr(call), str(device), repr(numbers or {}), torch.get_default_dtype())
        return shared_trace(self.original(), key, lambda: self._capture_spec(call, device, numbers))

    def _capture_spec(self, call: CallSpec, device: torch.device, numbers: Mapping[str, float] | None) -> CapturedGraph:
        with tracing_alone(), without_autocast(device.type):
            here = self.on(device)
            batch = TRACED_BATCH if call.batched else 1
            tracing = Tracing()
            program = here._export(call, device, batch, call.batched, tracing, numbers)
            read = {name: number for name, number in (numbers or {}).items() if name in tracing.read}
            captured = here._finish(program, call.knowing_numbers(read), batch)

            def again(size: int) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
                other = here._export(call, device, size, True, Tracing(), numbers)
                return other, here._finish(other, call, size).code

            if captured.call.batched and not serves_all(program, captured.code, again):
                fixed = captured.call.at_batch(batch, "the model's own code depends on the batch size")
                return replace(captured, call=fixed)
            return captured

    def _export(
        self,
        call: CallSpec,
        device: torch.device,
        batch: int,
        dynamic: bool,
        tracing: Tracing,
        numbers: Mapping[str, float] | None = None,
    ) -> torch.export.ExportedProgram:
        mode = fake_mode_of_model(self.skeleton)

        def fake(name: str, spec: TensorSpec) -> torch.Tensor:
            with mode:
                where = torch.device("cpu") if spec.number else device
                return torch.empty(spec.concrete(batch), dtype=spec.dtype, device=where)

        # The model gets the inputs that torch.export does not accept from ``tracing``.
        arguments = pytree.tree_map(
            lambda leaf: leaf if isinstance(leaf, torch.Tensor) or is_plain(leaf) else None, call.arguments(fake)
        )
        dynamic_shapes = call.arguments(
            lambda name, spec: {dim: Dim.AUTO for dim, size in enumerate(spec.shape) if size == BATCH} or None
        )
        dynamic_shapes = pytree.tree_map(
            lambda leaf: leaf if isinstance(leaf, dict) else None, dynamic_shapes, is_leaf=_is_shape
        )
        variadic = [p.name for p in self.signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
        if variadic:  # torch.export expects the shapes of **kwargs under the name of that parameter.
            own = {name for name in self.signature.parameters if name not in variadic}
            extra = {name: shapes for name, shapes in dynamic_shapes.items() if name not in own}
            dynamic_shapes = {name: shapes for name, shapes in dynamic_shapes.items() if name in own}
            if extra:
                dynamic_shapes[variadic[0]] = extra

        def exported() -> torch.export.ExportedProgram:
            knowing = tracing.knowing(self.skeleton, call, numbers or {})
            with torch.no_grad(), quietly(), kept(self.skeleton), knowing, marking(self.skeleton):
                return export(self.skeleton, (), arguments, dynamic_shapes if dynamic else None)

        memos = Memos()
        try:
            program, read = exported(), set(tracing.read)
            if tables := memos.read():
                for memo in tables:
                    memo.cache_clear()
                try:
                    program = exported()
                except Exception as error:  # The code computes them from values: they must be constants.
                    log.info("tables in caches of functions are constants of the graph: %s", error)
                    tracing.read = read
            return program
        except CheckpointError:
            raise
        except Exception as error:
            raise explained(error, self.skeleton, call) from error
        finally:
            memos.forget_traced()

    def _finish(self, program: torch.export.ExportedProgram, call: CallSpec, batch: int) -> CapturedGraph:
        exported = without_writes(program, type(self.skeleton).__name__)
        out_spec = program.call_spec.out_spec
        assert out_spec is not None
        inline_regions(exported)
        refuse_inner_graphs(exported.graph, type(self.skeleton).__name__)
        flatten_signature(exported.graph, call)
        drop_assertions(exported.graph)
        loosen_views(exported.graph)
        settle(exported.graph)
        self._refuse_originals(exported)
        name_constants(exported, self.skeleton)
        # A new module, without the input checks that torch.export attaches to the module that it returns.
        module = fx.GraphModule(exported, exported.graph, class_name=type(self.skeleton).__name__)
        module.meta[NAMES] = names_of(self.skeleton)
        name_layers(module, self.skeleton)
        module.graph.lint()
        if call.batched and not is_batch_open(module, call):
            call = call.at_batch(batch, "the model's own code fixes the batch size")
        return CapturedGraph(module, call, out_spec, code=fingerprint(module.graph))

    def _refuse_originals(self, module: fx.GraphModule) -> None:
        """Raise if the traced code read weights of the original model.

        A function that was put around a ``forward`` and that holds the original module does this.
        """
        original = self.original()
        if original is None:
            return
        names = {w.untyped_storage().data_ptr(): name for name, w in original.named_parameters() if not w.is_meta}
        for target, tensor in read_tensors(module).items():
            if isinstance(tensor, FakeTensor) or not target.rpartition(".")[2].startswith("lifted_tensor"):
                continue
            name = names.get(tensor.untyped_storage().data_ptr())
            if name is not None:
                raise CaptureError(
                    f"{type(self.skeleton).__name__} cannot be traced: a function that replaces a forward, or that is "
                    f"attached to a module, keeps a reference to the original module and reads {name!r} from it, not "
                    "from the copy that is traced. Bind the function with types.MethodType(function, module), and let "
                    "it call methods of its own self, such as type(self).forward(self, ...)"
                )


def _is_shape(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, int) for key in value)
