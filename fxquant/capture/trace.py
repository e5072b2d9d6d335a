"""Tracing: from a diffusion transformer and one call of it to an FX graph of ATen ops.

``torch.export`` in non-strict mode traces a *weightless copy* of the model (fake tensors in place of parameters), so
tracing needs no memory for weights, a checkpoint is loaded without ever holding float weights, and a later call with
other shapes can be traced long after the float model is gone. The values come from a mapping of names to tensors.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import logging
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    is_fake,
)
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from fxquant.capture.calls import BATCH, CallSpec, TensorSpec, canonical_call, changed_leaves, describe_call
from fxquant.capture.constants import is_plain
from fxquant.capture.fingerprint import fingerprint
from fxquant.capture.functionalize import functionalize, refuse_shared_lists, writes
from fxquant.capture.known_values import Tracing, is_followed
from fxquant.capture.memoized import Memos
from fxquant.capture.state import (
    HOLLOW,
    detached,
    kept,
    kept_tensors,
    replace_kept_tensors,
)
from fxquant.capture.threads import replaced, tracing_alone, without_autocast
from fxquant.errors import CaptureError, CheckpointError, ConfigurationError, FxquantError
from fxquant.ir.layers import LAYER_OPS, layer_name, stored_weight
from fxquant.ir.meta import ITEM, LAYER, NAMES
from fxquant.ir.tensors import CONSTANT, get_tensor, read_tensors, set_tensor, weights_and_buffers

log = logging.getLogger(__name__)


_SAME_IN_TRAINING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
"""Modules that compute the same in training mode, in which diffusers leaves the linears that it fuses."""

_MOST_TRIED = 4  # Numbers that are tried one by one, where not all can be inputs of a graph.
_TRACED_BATCH = 2  # Sizes 0 and 1 are special to torch.export; any larger one leaves the batch open.
_ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")
_RANDOM_IN_TRAINING = (torch.ops.aten.dropout.default, torch.ops.aten.feature_dropout.default)
_ABOUT_VALUES = ("data-dependent", "is not supported for tensor subclasses", "aten._local_scalar_dense")
_ON_VALUES = (
    "A graph is one path through the code: branch on shapes, options, masks and positions, not on tensor values "
    "that the model computes (no .item(), no `if tensor:`). Compute every branch and choose with torch.where, or "
    "move that part out of the transformer's forward."
)
_ON_OTHERS = (
    "The code raised this on tensors without values, for the call {call}. Call the model itself like this: if it fails "
    "too, the call does not fit it; if not, that line does what torch.export cannot follow, and has to be written "
    "otherwise."
)
_TALKATIVE = (
    *("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.export._trace"),
    *("torch.export.dynamic_shapes", "torch._export.non_strict_utils"),
)


@dataclass
class CapturedGraph:
    """One traced graph and the calls that it serves.

    Attributes:
        module: FX graph whose placeholders are the tensor inputs of ``call`` in order, and whose output is a tuple of
            the output's leaves.
        call: The inputs that the graph serves.
        out_spec: Pytree structure that turns the leaves back into the model's own output class.
        digest: Of the graph as it was quantized, before a backend lowered it (:mod:`fxquant.ir.digest`).
        code: The graph as it was traced, before any pass; see :func:`fxquant.capture.fingerprint.fingerprint`.
    """

    module: fx.GraphModule
    call: CallSpec
    out_spec: pytree.TreeSpec
    digest: str | None = None
    code: tuple[str, ...] = field(default=(), repr=False)

    @property
    def static_batch(self) -> str | None:
        """Why the batch size had to be fixed, or None when any batch size runs."""
        return self.call.fixed

    def inputs(self, leaves: Sequence[Any]) -> list[torch.Tensor]:
        """The tensor leaves of a call, in the order of the graph's placeholders."""
        return self.call.inputs(leaves)

    def output(self, leaves: Sequence[Any]) -> Any:
        """The model's own output, from the leaves that the graph returned."""
        return pytree.tree_unflatten(list(leaves), self.out_spec)


class Architecture:
    """A model without its weights: what it takes to trace it, as often as new input shapes ask for it.

    Attributes:
        skeleton: The model with fake parameters. Never run on real data.
        signature: Signature of the model's ``forward``.
        timestep: Name of the ``forward`` argument that holds the timestep.
        original: The model that was copied, for as long as it is there.
    """

    def __init__(self, skeleton: nn.Module, timestep: str | None) -> None:
        self.skeleton = skeleton
        self.timestep = timestep
        self.original: Callable[[], nn.Module | None] = lambda: None
        self.signature = inspect.signature(skeleton.forward)

    @classmethod
    def of(cls, model: nn.Module, timestep: str | None) -> Architecture:
        """The architecture of ``model``, which is left untouched and whose weights are not copied.

        Raises:
            ConfigurationError: If the model, or a module in it, is in training mode.
            CaptureError: If the module cannot be copied.
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
        architecture = cls(skeleton, timestep)
        architecture.original = weakref.ref(model)  # Not of its parameters: what has weak references cannot be swapped.
        return architecture

    @classmethod
    def from_config(cls, model_class: Any, config: Mapping[str, Any], timestep: str | None) -> Architecture:
        """Build the architecture of a diffusers model from its config, without weights."""
        with tracing_alone(), FakeTensorMode(allow_non_fake_inputs=True):
            skeleton = model_class.from_config(dict(config))
        _hollow_out(skeleton)
        return cls(skeleton.eval().requires_grad_(False), timestep)

    def on(self, device: torch.device) -> Architecture:
        """The same architecture with its weightless parameters on another device."""
        held = [tensor for _, tensor in weights_and_buffers(self.skeleton)]
        if all(tensor.device == device for tensor in held):
            return self
        with FakeTensorMode(allow_non_fake_inputs=True):
            moved: dict[int, Any] = {
                id(tensor): torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                for tensor in held
            }
        for tensor in held:
            if isinstance(tensor, nn.Parameter):
                moved[id(tensor)] = nn.Parameter(moved[id(tensor)], requires_grad=False)
        there = Architecture(copy.deepcopy(self.skeleton, moved), self.timestep)
        there.original = self.original
        return there

    def canonical(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[str, ...], list[Any], Any]:
        """Leaf names, leaves and structure of a call; see :func:`fxquant.capture.calls.canonical_call`."""
        return canonical_call(self.signature, args, kwargs, self.timestep)

    def capture(
        self, names: tuple[str, ...], leaves: Sequence[Any], structure: Any, others: Sequence[CallSpec] = ()
    ) -> CapturedGraph:
        """Trace the graph for calls like this one, with the batch size left open wherever the model allows.

        Where the model's code branches on values of integer or boolean inputs, such as the lengths of prompts in a
        mask, the graph is made for the values of this call; other values get a graph of their own. Python floats are
        inputs of the graph, and so are integers that were others in another kind of call; those by which the code
        decides are held as well.

        Args:
            names: Names of the leaves.
            leaves: The leaves.
            structure: What holds their numbers.
            others: Kinds of calls that have a graph already.

        Raises:
            CaptureError: If ``torch.export`` cannot trace the model; the message shows the line of the model.
        """
        device = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), torch.device("cpu"))
        with tracing_alone(), without_autocast(device.type):
            return self._capture(names, leaves, structure, device, others)

    def _capture(
        self,
        names: tuple[str, ...],
        leaves: Sequence[Any],
        structure: Any,
        device: torch.device,
        others: Sequence[CallSpec],
    ) -> CapturedGraph:
        changing = {name for other in others for name in changed_leaves(names, leaves, other) or ()}
        call = describe_call(names, leaves, structure, self.timestep, changing)
        try:
            return self._capture_call(call, leaves, device)
        except CaptureError:
            if not call.numbers:
                raise
        # Something takes no number but Python's own. Numbers of other inputs may still be left open.
        closed = self._capture_call(call.with_constants(call.numbers, leaves), leaves, device)
        for name in call.numbers if 1 < len(call.numbers) <= _MOST_TRIED else ():
            with suppress(CaptureError):
                return self._capture_call(call.with_constants([name], leaves), leaves, device)
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
        # Traced anew even if the batch was fixed at the right size: loading knows that from the start, and sizes that
        # are open at first leave other ops in the graph.
        fixed = call.at_batch(call.batch_size(leaves), reason)
        try:
            return self.capture_spec(fixed, device, numbers)
        except CaptureError as error:
            return self._capture_holding(fixed, leaves, device, error)

    def _capture_holding(
        self, call: CallSpec, leaves: Sequence[Any], device: torch.device, first: CaptureError
    ) -> CapturedGraph:
        """Trace with the values of masks, lengths and positions known, and hold on to those that mattered."""
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
            program = here._export(call.holding(known, leaves), device, 1, False, tracing)
        except CaptureError as error:
            raise error from first
        read = tracing.read.difference(call.numbers)
        reason = f"the model's own code branches on the values of {', '.join(sorted(read))}"
        held = call.holding(tracing.read, leaves)
        return here._finish(program, replace(held, fixed=reason if read else call.fixed), 1)

    def capture_spec(
        self, call: CallSpec, device: torch.device, numbers: Mapping[str, float] | None = None
    ) -> CapturedGraph:
        """Trace the graph for calls of this spec, its inputs and weights living on ``device``.

        Args:
            call: The spec.
            device: Where inputs and weights live.
            numbers: What Python numbers among the inputs are in a call, by name; the graph is made for those of them
                by which the model's code decides. None if it is to serve all numbers that the spec leaves open.

        Raises:
            CaptureError: If ``torch.export`` cannot trace the model for them.
        """
        with tracing_alone(), without_autocast(device.type):
            here = self.on(device)
            batch = _TRACED_BATCH if call.batched else 1
            tracing = Tracing()
            program = here._export(call, device, batch, call.batched, tracing, numbers)
            read = {name: number for name, number in (numbers or {}).items() if name in tracing.read}
            return here._finish(program, call.holding_numbers(read), batch)

    def _export(
        self,
        call: CallSpec,
        device: torch.device,
        batch: int,
        dynamic: bool,
        tracing: Tracing,
        numbers: Mapping[str, float] | None = None,
    ) -> torch.export.ExportedProgram:
        mode = _fake_mode_of(self.skeleton)

        def fake(name: str, spec: TensorSpec) -> torch.Tensor:
            with mode:
                where = torch.device("cpu") if spec.number else device
                return torch.empty(spec.concrete(batch), dtype=spec.dtype, device=where)

        # What torch.export does not take, the model gets from ``tracing``.
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
        if variadic:  # torch.export wants the shapes of **kwargs below the name of that parameter.
            own = {name for name in self.signature.parameters if name not in variadic}
            extra = {name: shapes for name, shapes in dynamic_shapes.items() if name not in own}
            dynamic_shapes = {name: shapes for name, shapes in dynamic_shapes.items() if name in own}
            if extra:
                dynamic_shapes[variadic[0]] = extra

        def export() -> torch.export.ExportedProgram:
            with torch.no_grad(), _quietly(), kept(self.skeleton), tracing.knowing(self.skeleton, call, numbers or {}):
                return torch.export.export(
                    self.skeleton, (), arguments, strict=False, dynamic_shapes=dynamic_shapes if dynamic else None
                )

        memos = Memos()
        try:
            program, read = export(), set(tracing.read)
            if tables := memos.read():
                for memo in tables:
                    memo.cache_clear()
                try:
                    program = export()
                except Exception as error:  # They are made from values: in the graph, they have to be constants.
                    log.info("tables in caches of functions are constants of the graph: %s", error)
                    tracing.read = read
            return program
        except CheckpointError:
            raise
        except Exception as error:
            raise _explained(error, self.skeleton, call) from error
        finally:
            memos.forget_traced()

    def _finish(self, program: torch.export.ExportedProgram, call: CallSpec, batch: int) -> CapturedGraph:
        exported = self._without_writes(program)
        out_spec = program.call_spec.out_spec
        assert out_spec is not None
        _inline_regions(exported)
        _flatten_signature(exported.graph, call)
        _drop_assertions(exported.graph)
        _loosen_views(exported.graph)
        self._refuse_originals(exported)
        _name_constants(exported, self.skeleton)
        # A module of its own, without the input checks that torch.export hangs on the one it returns.
        module = fx.GraphModule(exported, exported.graph, class_name=type(self.skeleton).__name__)
        module.meta[NAMES] = names_of(self.skeleton)
        _name_layers(module, self.skeleton)
        module.graph.lint()
        if call.batched and not _open_dimensions(module, call):
            call = call.at_batch(batch, "the model's own code fixes the batch size")
        return CapturedGraph(module, call, out_spec, code=fingerprint(module.graph))

    def _refuse_originals(self, module: fx.GraphModule) -> None:
        """Raise if the code ran weights of the model itself, which a function holds that was put around a forward."""
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
                    f"{type(self.skeleton).__name__} cannot be traced: a function that was put in place of a forward, "
                    f"or hung on a module, holds on to the module itself, so that {name!r} is read past the copy that "
                    "is traced. Bind the function with types.MethodType(function, module), and let it run what its "
                    "own self has, such as type(self).forward(self, ...)"
                )

    def _without_writes(self, program: torch.export.ExportedProgram) -> fx.GraphModule:
        """The graph of a program, with every op a function of its inputs."""
        exported = program.module(check_guards=False)
        if any(map(writes, program.graph.nodes)):
            assert isinstance(exported, fx.GraphModule)
            refuse_shared_lists(exported.graph)
            regions = any(isinstance(node.target, HigherOrderOperator) for node in program.graph.nodes)
            if regions or not functionalize(exported.graph, _fake_mode(program.graph)):
                try:
                    program = program.run_decompositions({})
                except RuntimeError as error:  # It writes into a tensor that the model keeps as an attribute.
                    raise CaptureError(
                        f"{type(self.skeleton).__name__} writes into a tensor in a way that cannot be traced "
                        f"({str(error).splitlines()[0]}); let it work on a copy, and keep no state between calls"
                    ) from error
                exported = program.module(check_guards=False)
            if program.graph_signature.user_inputs_to_mutate or program.graph_signature.buffers_to_mutate:
                raise CaptureError(
                    f"{type(self.skeleton).__name__} writes into its inputs or buffers in place; let it work on a copy"
                )
        assert isinstance(exported, fx.GraphModule)
        return exported


def _is_shape(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, int) for key in value)


def _flatten_signature(graph: fx.Graph, call: CallSpec) -> None:
    """Make the graph's placeholders the tensor inputs alone, and its output a flat tuple."""
    graph.set_codegen(CodeGen())
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, leaf in zip(placeholders, call.leaves, strict=True):
        if not isinstance(leaf, TensorSpec):
            if node.users:
                raise CaptureError(f"the graph reads the constant input {node.name!r} as a value; give it as a tensor")
            graph.erase_node(node)
    remaining = [node for node in graph.nodes if node.op == "placeholder"]
    for node, (name, _) in zip(remaining, call.tensors, strict=True):
        if name in call.items:
            node.meta[ITEM] = call.items[name]
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target) == "_guards_fn":
            graph.erase_node(node)


def _fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode of the fake values of a graph."""
    values = (node.meta.get("val") for node in graph.nodes)
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def _fake_mode_of(model: nn.Module) -> FakeTensorMode:
    """The mode of the parameters of a model without weights."""
    parameter = next(model.parameters(), None)
    return parameter.fake_mode if isinstance(parameter, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)


def _inline_regions(module: fx.GraphModule) -> None:
    """Put the ops of regions under ``no_grad`` or ``autocast``, which are graphs of their own, where the regions stand.

    Raises:
        CaptureError: If the region computes in another dtype than its values have.
    """
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "") if isinstance(node.target, HigherOrderOperator) else ""
        if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        position = next(i for i, argument in enumerate(node.args) if _is_graph(argument))
        body = getattr(module, str(node.args[position].target))
        _inline_regions(body)
        if name == "wrap_with_autocast":
            _refuse_casts(body, node.args[1], bool(node.args[2]))
        inputs = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        for inner in body.graph.nodes:
            if inner.op == "get_attr":
                set_tensor(module, f"{node.name}.{inner.target}", get_tensor(body, str(inner.target)))
                inner.target = f"{node.name}.{inner.target}"
        with module.graph.inserting_before(node):
            values: dict[fx.Node, Any] = dict(zip(inputs, node.args[position + 1 :], strict=True))
            results: Any = module.graph.graph_copy(body.graph, values)
        if isinstance(results, (list, tuple)):
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])
                module.graph.erase_node(user)
        else:
            node.replace_all_uses_with(results)
        module.graph.erase_node(node)


def _is_graph(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr" and "val" not in argument.meta


def _refuse_casts(body: fx.GraphModule, dtype: Any, enabled: bool) -> None:
    for node in body.graph.nodes:
        value = node.meta.get("val")
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()) or not enabled or dtype is None:
            continue
        if value.dtype not in (dtype, torch.float64):
            raise CaptureError(
                f"part of the model runs under autocast to {dtype} on values of {value.dtype}; convert the model to "
                f"{dtype}, or leave its autocast out"
            )


def _drop_assertions(graph: fx.Graph) -> None:
    """Remove checks of traced dtypes and sizes, which would break casts and other shapes, and what only they read."""
    for node in list(graph.nodes):
        if node.op == "call_function" and any(name in str(node.target) for name in _ASSERTIONS):
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() and node.target not in _RANDOM_IN_TRAINING)


def _loosen_views(graph: fx.Graph) -> None:
    """Let views be reshapes where a value does not lie in order, or comes from a convolution that yields such a one.

    They fit the memory layout of the trace, and a convolution has another at other sizes, or when it is quantized.
    """
    loose: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        convolved = "conv" in str(node.target) and isinstance(value, torch.Tensor) and not value.is_contiguous()
        if convolved or not loose.isdisjoint(node.all_input_nodes):
            loose.add(node)
        if node.target is torch.ops.aten.view.default:
            source = node.args[0]
            if source in loose or not source.meta["val"].is_contiguous():
                node.target = torch.ops.aten.reshape.default


def _name_constants(module: fx.GraphModule, model: nn.Module) -> None:
    """Give tensors that are neither parameters nor attributes of the model names that no other tensor has.

    torch.export numbers them, so that two graphs of one model may hold different ones under one name. Those that a
    module keeps in a list or dict are named by their place there, those that the code makes, such as
    ``torch.tensor([height, width])``, by what they hold.
    """
    kept = kept_tensors(model)
    weights = weights_and_buffers(model)  # torch.export does not know them where the code reads them from a list.
    is_hollow = getattr(model, HOLLOW, False)
    first: dict[str, fx.Node] = {}
    of_weights = {name for name, _ in weights}
    for node in [node for node in module.graph.nodes if node.op == "get_attr"]:
        tensor = get_tensor(module, str(node.target))
        is_lifted = str(node.target).rpartition(".")[2].startswith("lifted_tensor")
        name = _name_in(kept, tensor)
        if name is not None and is_hollow:  # What belongs there is in the checkpoint.
            tensor = _fake_mode_of(model).from_tensor(tensor)
        elif not is_lifted:
            name = None
        elif name is None and isinstance(tensor, FakeTensor):
            name = _name_in(weights, tensor)
            node.meta["val"].constant = None  # torch would compute with values that it has not.
        if is_lifted:
            node.target = name or _name_by_value(str(node.target), tensor, model)
        if is_lifted or name is not None:
            set_tensor(module, str(node.target), tensor)
        if first.setdefault(str(node.target), node) is not node and node.target in of_weights:
            node.replace_all_uses_with(first[str(node.target)])
            module.graph.erase_node(node)


def _name_in(named: Sequence[tuple[str, torch.Tensor]], tensor: torch.Tensor) -> str | None:
    return next((name for name, other in named if _is_same(other, tensor)), None)


def _name_by_value(target: str, tensor: torch.Tensor, model: nn.Module) -> str:
    if isinstance(tensor, FakeTensor):
        raise CaptureError(
            f"{type(model).__name__} reads a table that its code keeps outside of the model, in a global "
            "variable or an attribute of a class, and that was filled while the model was traced. Empty it, then call "
            "the float model once with inputs like these before fxquant does"
        )
    path, dot, _ = target.rpartition(".")
    return f"{path}{dot}{CONSTANT}{_digest(tensor)}"


def _hollow_out(model: nn.Module) -> None:
    """Put zeros in place of fake tensors in attributes of modules and plain objects, where torch.export takes none."""

    def hollow(_: str, tensor: torch.Tensor) -> torch.Tensor:
        if not is_fake(tensor):
            return tensor
        zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
        setattr(zeros, HOLLOW, True)
        return zeros

    replace_kept_tensors(model, hollow)
    setattr(model, HOLLOW, True)


def _is_same(left: torch.Tensor, right: torch.Tensor) -> bool:
    same_memory = left.untyped_storage()._cdata == right.untyped_storage()._cdata
    return same_memory and (left.shape, left.stride(), left.storage_offset()) == (
        right.shape,
        right.stride(),
        right.storage_offset(),
    )


def _digest(tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(f"{tensor.dtype}{list(tensor.shape)}".encode() + content, digest_size=6).hexdigest()


def names_of(model: nn.Module) -> dict[str, bool]:
    """The names that a model uses: those of its tensors with True, those of its modules with False."""
    names = {name: False for name, _ in model.named_modules(remove_duplicate=False) if name}
    return names | {name: True for name, _ in [*weights_and_buffers(model), *kept_tensors(model)]}


def _name_layers(module: fx.GraphModule, model: nn.Module) -> None:
    """Give each linear, convolution and embedding with a stored weight a stable name: that of the weight's owner.

    Modules that share a weight have a name each: that of the module that calls the op. Where none of them does, the
    name is the one under which ``torch.export`` reads the weight, the same in all graphs. Further uses of a weight
    under one name are numbered, ``name@2``.
    """
    owners: dict[int, list[str]] = {}
    for name, tensor in weights_and_buffers(model):
        owners.setdefault(id(tensor), []).append(name)
    shared = {name: names for names in owners.values() if len(names) > 1 for name in names}
    seen: dict[str, int] = {}
    for node in module.graph.nodes:
        weight = stored_weight(node) if node.target in LAYER_OPS else None
        if weight is None:
            continue
        target = str(weight.target)
        name = layer_name(_owned_by_caller(node, shared[target], target) if target in shared else target)
        seen[name] = seen.get(name, 0) + 1
        node.meta[LAYER] = name if seen[name] == 1 else f"{name}@{seen[name]}"


def _owned_by_caller(node: fx.Node, names: Sequence[str], default: str) -> str:
    """Which of the names of a shared weight belongs to the module that calls an op, or to the nearest one around it."""
    modules = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    for path in reversed(modules):
        inside = [name for name in names if path and name.startswith(f"{path}.")]
        if inside:
            direct = [name for name in inside if "." not in name.removeprefix(f"{path}.")]
            return next(iter(direct), default if default in inside else inside[0])
    return default


def _open_dimensions(module: fx.GraphModule, call: CallSpec) -> bool:
    """Whether the graph kept every batch dimension that it reads symbolic.

    They need not be one symbol: that of a mask, say, is never compared with that of the values which it masks.
    """
    placeholders = (node for node in module.graph.nodes if node.op == "placeholder")
    return all(
        not str(node.meta["val"].shape[dim]).isdigit()
        for node, (_, spec) in zip(placeholders, call.tensors, strict=True)
        for dim, size in enumerate(spec.shape)
        if size == BATCH and node.users
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep off the screen what torch says of attempts: graphs, tracebacks, hints. What fails is raised all the same."""
    from torch.export import _trace  # Costly to import before something is traced.

    ours = threading.get_ident()

    def is_wanted(record: logging.LogRecord) -> bool:
        return record.thread != ours or record.levelno < logging.WARNING

    def show(*values: Any, **options: Any) -> None:
        if threading.get_ident() != ours:
            print(*values, **options)

    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    for logger in loggers:
        logger.addFilter(is_wanted)
    try:
        with replaced(_trace, "print", show):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_wanted)


def _explained(error: BaseException, model: nn.Module, call: CallSpec) -> CaptureError:
    """What went wrong in the user's terms: the innermost line of the model's own code, and torch's reason."""
    frames = [frame for frame in _frames(error) if _is_user_code(frame.filename)]
    where, short = "", ""
    if frames:
        last = frames[-1]
        where = f'\n  File "{last.filename}", line {last.lineno}, in {last.name}\n    {last.line}'
        short = f" ({Path(last.filename).name}, line {last.lineno})"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    advice = _ON_VALUES if any(map(_is_about_values, _chain(error))) else _ON_OTHERS.format(call=call)
    return CaptureError(
        f"{type(model).__name__} cannot be traced: {reason}{where}\n{advice}", reason=f"{reason}{short}"
    )


def _is_about_values(error: BaseException) -> bool:
    """Whether an error says that code asks for the value of a tensor that has none."""
    unknown = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)
    return isinstance(error, unknown) or any(words in str(error) for words in _ABOUT_VALUES)


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and its causes, the innermost last."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _frames(error: BaseException) -> Iterator[traceback.FrameSummary]:
    for link in _chain(error):  # The frames of the innermost cause are the ones closest to the user's line.
        yield from traceback.extract_tb(link.__traceback__)


def _is_user_code(filename: str) -> bool:
    libraries = {Path(torch.__file__).parent, Path(__file__).parent}
    if Path(filename).parent == Path(contextlib.__file__).parent:  # Python's own.
        return False
    return not filename.startswith("<") and not any(Path(filename).is_relative_to(folder) for folder in libraries)
