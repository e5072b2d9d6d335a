"""Tensors of graph modules and models by name: list, read, set, bind and drop them."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxquant.errors import CheckpointError, PassError
from fxquant.ir.meta import NAMES

CONSTANT = "constant_"
"""Prefix of the names of tensors that came from the code of a model and not from its weights."""


def bind(module: fx.GraphModule, values: Mapping[str, torch.Tensor]) -> None:
    """Replace the fake tensors that the graph was traced with by the given tensors.

    Raises:
        CheckpointError: If a tensor is missing or has another shape.
    """
    for target in sorted({str(node.target) for node in module.graph.nodes if node.op == "get_attr"}):
        value, held = values.get(target), get_tensor(module, target)
        if value is None and isinstance(held, FakeTensor):
            raise CheckpointError(f"no tensor {target!r}: the weights do not belong to this model or are incomplete")
        if value is None:
            continue
        if value.shape != held.shape:
            raise CheckpointError(
                f"tensor {target!r} has shape {tuple(value.shape)}, the model needs {tuple(held.shape)}"
            )
        set_tensor(module, target, value)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a model by name; a shared tensor appears under each of its names."""
    return {name: value.detach() for name, value in weights_and_buffers(model)}


def get_tensor(module: nn.Module, target: str) -> torch.Tensor:
    """The tensor that a ``get_attr`` node of this target reads."""
    value = operator.attrgetter(target)(module)
    assert isinstance(value, torch.Tensor), target
    return value


def set_tensor(module: nn.Module, target: str, value: torch.Tensor) -> None:
    """Make ``value`` the tensor of a ``get_attr`` target, adding empty modules along the path as needed.

    Floating-point tensors become parameters, all others buffers, so that ``dtype``, ``device``, ``to`` and
    ``state_dict`` of the module mean what users expect. A parameter requires gradients only if ``value`` is a parameter
    that requires them.
    """
    holder, name = holder_of(module, target)
    if hasattr(holder, name):
        if not isinstance(getattr(holder, name), (torch.Tensor, type(None))):
            raise PassError(f"a tensor cannot be called {target!r}: {name!r} is another attribute of its module")
        delattr(holder, name)
    if value.is_floating_point():
        trained = isinstance(value, nn.Parameter) and value.requires_grad
        setattr(holder, name, nn.Parameter(value.detach(), requires_grad=trained))
    else:
        holder.register_buffer(name, value.detach())


def holder_of(module: nn.Module, target: str) -> tuple[nn.Module, str]:
    """The module whose attribute a target is, and the name of the attribute; empty modules are added along the path.

    Raises:
        PassError: If something else than a module is in the path.
    """
    *path, name = target.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
        if not isinstance(module, nn.Module):
            raise PassError(f"a tensor cannot be called {target!r}: {part!r} is an attribute of every module")
    return module, name


def read_tensors(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The tensors that a graph reads, by target, in the order of the graph."""
    targets = dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "get_attr")
    return {target: get_tensor(module, target) for target in targets}


def drop_unread_tensors(module: fx.GraphModule) -> None:
    """Delete parameters and buffers that no node reads, and modules that become empty."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in weights_and_buffers(module) if name not in read]:
        path, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(path), leaf)
    module.delete_all_unused_submodules()


def weights_and_buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name; a shared tensor appears under each of its names."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def is_constant_name(target: str) -> bool:
    """Whether a tensor of this name came from the model's code or a plain object in it, and not from its weights.

    Code that fills a cache at its first call yields such a tensor if the cache is full, and computes the value if not.
    """
    return target.rpartition(".")[2].startswith(CONSTANT)


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A new graph module with a copy of the graph, the same tensors and the names that the model uses."""
    made = fx.GraphModule(module, copy.deepcopy(module.graph), class_name=type(module).__name__)
    if NAMES in module.meta:  # Other entries are about the compilation of one module.
        made.meta[NAMES] = module.meta[NAMES]
    return made


def is_finite(value: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    # Any NaN or infinity shows in the extremes. Unlike isfinite(), they need no mask as large as the tensor.
    return value.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(value))


def are_alike(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors agree in shape, strides, dtype and device."""
    return (left.shape, left.stride(), left.dtype, left.device) == (
        right.shape,
        right.stride(),
        right.dtype,
        right.device,
    )


def contiguous(value: torch.Tensor) -> torch.Tensor:
    """A tensor in the order of memory in which files store it; tensors in layouts of kernels stay as they are."""
    return value.contiguous() if value.layout is torch.strided else value


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The mode under which the graph's fake values were made: the mode of its inputs, which knows the open batch."""
    for node in graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        if isinstance(value, FakeTensor):
            mode = value.fake_mode
            assert isinstance(mode, FakeTensorMode)
            return mode
    raise PassError("the graph has no shapes; capture it with fxquant or run shape propagation first")


def size_for(size: int | torch.SymInt, batch: int) -> int:
    """A recorded size for a batch of so many samples."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def forget_inferred(graph: fx.Graph) -> None:
    """Empty torch's cache of the shapes that ops gave in a graph, when nothing will be inferred for it soon.

    The cache of a trace takes more memory than the graph, and torch's caches of functions keep the last traces alive,
    also those of models that are gone.
    """
    env = fake_mode_of(graph).shape_env
    if env is not None:
        env.fake_tensor_cache.clear()


def fake_in(mode: FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    """A fake tensor of a mode like ``value``, a real tensor or a fake one of any mode."""
    if not isinstance(value, FakeTensor):
        return mode.from_tensor(value, static_shapes=True)
    if value.fake_mode is mode:
        return value
    with mode:  # A weight of the skeleton, which has its own fake mode.
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
