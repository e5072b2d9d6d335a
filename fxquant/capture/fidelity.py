"""Checks that a graph computes the same as its model, when it is captured and the float model is available.

A graph is one path through the model's code, followed once. The graph freezes what the code keeps in attributes between
calls, takes from elsewhere in Python, or does where torch does not see it. So the model runs once on inputs that differ
from those of the capture, and the graph must give the same output. If that call changed attributes, a second call
distinguishes what the model computes only once, such as tables of positions, from state that the next call reads.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant.capture.caches import Caches, Places, put
from fxquant.capture.calls import TRACED_BATCH, Call, CallSpec, TensorSpec
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.hooks import drop_own_hooks
from fxquant.capture.state import OWN, detached, frozen, is_equal
from fxquant.capture.threads import uncompiled, without_autocast
from fxquant.capture.trace import Architecture
from fxquant.errors import CaptureError
from fxquant.ir.arguments import args
from fxquant.ir.tensors import read_tensors, weights_and_buffers

log = logging.getLogger(__name__)

_OWN = OWN - {"_buffers"}
_MISSING = object()

State = dict[tuple[str, str], Any]
"""Values of attributes, by the path of the module and the name of the attribute."""


class Original:
    """A float model to compare graphs with. Only copies of the model are run, so the model itself does not change.

    Args:
        model: The model. Its weights are shared; everything else that it holds is copied.
        timestep: Name of the ``forward`` argument that holds the timestep.
    """

    def __init__(self, model: nn.Module, timestep: str | None) -> None:
        self._model = _twin(model)
        drop_own_hooks(self._model)
        self._weights = _places(model)
        self._caches: Caches | None = None
        self._timestep = timestep

    def warm(self, call: Call, architecture: Architecture | None = None) -> None:
        """Run a call once before it is traced.

        This fills tables that the code keeps outside of the model, in ``functools.lru_cache`` or a global, with
        tensors. A trace would fill them with fake tensors, which the model would read in all later calls.

        Args:
            call: The call.
            architecture: Its caches that the call fills again are emptied; see :mod:`fxquant.capture.caches`.
        """
        # The weights were moved or converted since, so the call is not one of the model as it was.
        if _places(self._model) != self._weights:
            return

        def run(change: Places) -> tuple[nn.Module, list[Any]]:
            model = _twin(self._model)
            put(model, change)
            with _alike(call.device):
                return model, pytree.tree_leaves(_run(model, call))

        try:
            called, output = run({})
            if architecture is not None:
                if self._caches is None:
                    self._caches = Caches(self._model, architecture.skeleton, self._timestep)
                self._caches.empty(called, output, run)
        except _WritesArgumentsError:
            raise
        except Exception as error:  # The capture fails too, and its error says where.
            log.info("the model does not accept the call: %s", error)

    def compare(self, captured: CapturedGraph, call: Call) -> None:
        """Compare a graph whose weights are bound with the model.

        This costs one call of the graph and one of the model, or two of each if the first call changes attributes.

        Args:
            captured: The graph.
            call: The call that it was captured from.

        Raises:
            CaptureError: If the model keeps state between calls, or its output differs from that of the graph.
        """
        model = _twin(self._model)
        if not _shares_weights(captured, model):
            log.info("the graph is not compared with the model, whose weights were moved or converted since")
            return
        before = _state(model)
        first = self._compare_once(model, captured, call, 1)
        changed = _changed(before, _state(model))
        if changed:
            before = _state(model)
            with _watching(model, changed) as carried:
                first = self._compare_once(model, captured, call, 2) or first
            kept = [key for key in _changed(before, _state(model)) if key in carried]
            if kept:
                names = ", ".join(repr(f"{path}.{name}".removeprefix(".")) for path, name in kept[:4])
                raise CaptureError(
                    f"{type(self._model).__name__} keeps state between calls, which each call reads and changes: "
                    f"{names}. A graph would be right for one step only. Remove what does this (a cache of steps, a "
                    "counter), or pass the state as an input"
                )
        if first is not None:
            raise CaptureError(first)

    def _compare_once(self, model: nn.Module, captured: CapturedGraph, call: Call, seed: int) -> str | None:
        """A description of the difference, or None if there is none."""
        tried = call.with_leaves(other_values(captured.call, call.leaves, self._timestep, seed))
        with _alike(call.device):
            try:
                expected = _run(model, tried)
            except Exception as error:  # An error on inputs that the user did not give is not the graph's.
                log.info("the model does not accept inputs like those of the call (%s); the call's own are used", error)
                tried = call
                expected = _run(model, tried)
        with _alike(call.device):
            actual = captured.module(*captured.inputs(tried.leaves))
        return _difference(type(self._model).__name__, captured, model, pytree.tree_leaves(expected), actual)


def example(spec: CallSpec, device: torch.device) -> Call:
    """A call that a spec describes. Open float tensors are random; open numbers and integer tensors are 0."""
    generator = torch.Generator().manual_seed(0)

    def value(name: str, leaf: TensorSpec) -> Any:
        if name in spec.known:
            return spec.known[name].to(device)
        if leaf.number:
            zero = 0.0 if leaf.dtype.is_floating_point else 0
            return zero if leaf.values is None else leaf.values[0]
        shape = leaf.concrete(TRACED_BATCH)
        drawn = torch.rand(shape, generator=generator) if leaf.dtype.is_floating_point else torch.zeros(shape)
        return drawn.to(device, leaf.dtype)

    given = zip(spec.names, spec.leaves, strict=True)
    leaves = [value(name, leaf) if isinstance(leaf, TensorSpec) else leaf for name, leaf in given]
    return Call(spec.names, leaves, spec.structure)


def _twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, detached(model) | {id(tensor): tensor for _, tensor in weights_and_buffers(model)})


def _places(model: nn.Module) -> list[tuple[int, torch.dtype]]:
    return [(tensor.data_ptr(), tensor.dtype) for _, tensor in weights_and_buffers(model)]


def _shares_weights(captured: CapturedGraph, model: nn.Module) -> bool:
    weights = dict(weights_and_buffers(model))
    return all(
        weights[name].data_ptr() == tensor.data_ptr() and weights[name].dtype == tensor.dtype
        for name, tensor in read_tensors(captured.module).items()
        if name in weights
    )


class _WritesArgumentsError(CaptureError):
    """A model writes into a list or dict that it is called with."""


@torch.no_grad()
def _run(model: nn.Module, call: Call) -> Any:
    """The output of a call.

    Raises:
        _WritesArgumentsError: If the model writes into a list or dict of the call, which a graph would not do.
    """
    arguments = call.arguments()
    before = {name: pytree.tree_flatten(value) for name, value in arguments.items()}
    output = model(**arguments)
    for name, (leaves, structure) in before.items():
        after, other = pytree.tree_flatten(arguments[name])
        if structure != other or any(left is not right for left, right in zip(leaves, after, strict=True)):
            raise _WritesArgumentsError(
                f"{type(model).__name__} writes into its input {name!r}, a {type(arguments[name]).__name__} that its "
                "caller holds, and a graph writes into nothing. Return the new values beside the output, and let the "
                "caller keep them. For VAEs, fxquant.compile_parts does this where the input is feat_cache"
            )
    return output


@contextmanager
def _alike(device: torch.device) -> Iterator[None]:
    """Run without autocast and compilation. Random ops draw the same numbers each time, from seeds of their own."""
    with (
        uncompiled(),
        without_autocast(device.type),
        torch.no_grad(),
        _OwnNoise(device),
    ):
        yield


class _OwnNoise(TorchDispatchMode):
    """Random ops draw from a seed of their own.

    All threads share torch's generators. So their state is replaced for one op at a time, and only for ops that may
    draw random numbers.
    """

    supports_higher_order_operators = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        devices = {torch.device("cpu"), device}
        self._states = {where: torch.Generator(where).manual_seed(0).get_state() for where in devices}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()) or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        users = {where: _random_state(where) for where in self._states}
        for where, state in self._states.items():
            _set_random_state(where, state)
        try:
            return func(*args, **kwargs)
        finally:
            for where, state in users.items():
                self._states[where] = _random_state(where)
                _set_random_state(where, state)


def _random_state(device: torch.device) -> Tensor:
    state: Tensor = (
        torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    )
    return state


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def other_values(call: CallSpec, leaves: Sequence[Any], timestep: str | None, seed: int) -> list[Any]:
    """Inputs like those of a call, with other values: floats and the timestep move up to a quarter closer to 0.

    So they stay in the range that the model accepts. Integers, which name things, and values that the graph holds do
    not change.
    """
    generator = torch.Generator().manual_seed(seed)

    def other(name: str, leaf: Any) -> Any:
        one = float(torch.rand((), generator=generator))
        if isinstance(leaf, Tensor):
            floating = leaf.is_floating_point() or leaf.is_complex()
            if name == timestep or (floating and leaf.dim() < 2):
                return (leaf * (1 - one / 4)).to(leaf.dtype)
            if floating:
                return leaf * (1 - torch.rand(leaf.shape, generator=generator) / 4).to(leaf.device, leaf.dtype)
        return leaf * (1 - one / 4) if type(leaf) is float else leaf

    made = []
    for name, leaf, spec in zip(call.names, leaves, call.leaves, strict=True):
        is_open = isinstance(spec, TensorSpec) and spec.values is None
        made.append(other(name, leaf) if is_open else leaf)
    return made


def _difference(
    title: str, captured: CapturedGraph, model: nn.Module, expected: Sequence[Any], actual: Sequence[Any]
) -> str | None:
    floats = [tensor.dtype for _, tensor in weights_and_buffers(model) if tensor.is_floating_point()]
    for number, (right, found) in enumerate(zip(expected, actual, strict=True)):
        if not isinstance(right, Tensor):
            continue
        if right.shape != found.shape:
            error = f"has shape {list(found.shape)}, not {list(right.shape)}"
        else:
            dtypes = [dtype for dtype in (*floats, right.dtype) if dtype.is_floating_point]
            allowed = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0) ** 0.5
            off = _relative_error(found, right)
            if off <= allowed:
                continue
            error = f"is off by {off:.1e} of its largest element"
        drawn = _draws(captured)
        if drawn is not None:
            return (
                f"{title} draws random numbers ({drawn}) in a way that a graph cannot follow: with the same seed, "
                f"output {number} of its graph {error}. Pass the noise as an input, or call model.eval()"
            )
        return (
            f"the graph of {title} does not compute what the model computes: for inputs other than those of the "
            f"capture, output {number} {error}. The code uses something that a graph cannot record, such as numpy, "
            "Python's own random numbers, or values that it keeps; compute that from the inputs with torch's functions"
        )
    return None


def _relative_error(found: Tensor, right: Tensor) -> float:
    wide = torch.complex128 if right.is_complex() else torch.float64
    found, right = found.detach().cpu().to(wide), right.detach().cpu().to(wide)
    finite = right.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return float("inf")
    difference = (found - right)[finite].abs()
    if not difference.numel() or not difference.any():
        return 0.0
    return float(difference.max() / right[finite].abs().max().clamp_min(torch.finfo(torch.float64).tiny))


def _draws(captured: CapturedGraph) -> str | None:
    """An op of the graph that draws random numbers, if there is one."""
    for node in captured.module.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _draws_nothing(node):
            return str(node.target)
    return None


def _draws_nothing(node: fx.Node) -> bool:
    """Whether an op that can apply dropout drops no elements."""
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        return bool(args(node).dropout_p == 0)
    return node.target is torch.ops.aten.dropout.default and (args(node).train is False or bool(args(node).p == 0))


# --- attributes -----------------------------------------------------------------------------------------------------


def _state(model: nn.Module) -> State:
    """A snapshot of the attributes of all modules of a model, including their buffers."""
    found: State = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _OWN:
                found[path, name] = frozen(value)
    return found


def _changed(before: State, after: State) -> list[tuple[str, str]]:
    keys = [*before, *(key for key in after if key not in before)]
    return [key for key in keys if not is_equal(before.get(key, _MISSING), after.get(key, _MISSING))]


@contextmanager
def _watching(model: nn.Module, keys: Sequence[tuple[str, str]]) -> Iterator[set[tuple[str, str]]]:
    """Record which of these attributes are read before they are written."""
    carried: set[tuple[str, str]] = set()
    for path in {path for path, _ in keys}:
        module = model.get_submodule(path)
        names = {name for where, name in keys if where == path}
        carried |= {(path, name) for name in names if name == "_buffers"}
        module.__class__ = _watched(type(module), path, names, carried)
    yield carried


def _watched(cls: Any, path: str, names: set[str], carried: set[tuple[str, str]]) -> type:
    written: set[str] = set()

    def read(self: nn.Module, name: str) -> Any:
        if name in names and name not in written:
            carried.add((path, name))
        return cls.__getattribute__(self, name)

    def write(self: nn.Module, name: str, value: Any) -> None:
        written.add(name)
        cls.__setattr__(self, name, value)

    watch: dict[str, Callable[..., Any]] = {"__getattribute__": read, "__setattr__": write}
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__, **watch})
