"""Gives tensors and layers of a graph names that are the same in every graph of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxquant.capture.state import HOLLOW, kept_tensors
from fxquant.errors import CaptureError
from fxquant.ir.layers import LAYER_OPS, layer_name, stored_weight
from fxquant.ir.meta import LAYER
from fxquant.ir.tensors import CONSTANT, get_tensor, set_tensor, weights_and_buffers


def fake_mode_of_model(model: nn.Module) -> FakeTensorMode:
    """The fake tensor mode of the parameters of a model without weights."""
    parameter = next(model.parameters(), None)
    return parameter.fake_mode if isinstance(parameter, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)


def name_constants(module: fx.GraphModule, model: nn.Module) -> None:
    """Give unique names to tensors that are neither parameters nor attributes of the model.

    torch.export numbers such tensors, so two graphs of one model may hold different tensors under the same name. A
    tensor that a module keeps in a list or dict is named by its place there. A tensor that the code makes, such as
    ``torch.tensor([height, width])``, is named by its content.
    """
    kept = kept_tensors(model)
    weights = weights_and_buffers(model)  # torch.export does not recognize a weight that the code reads from a list.
    is_hollow = getattr(model, HOLLOW, False)
    first: dict[str, fx.Node] = {}
    of_weights = {name for name, _ in weights}
    for node in [node for node in module.graph.nodes if node.op == "get_attr"]:
        tensor = get_tensor(module, str(node.target))
        is_lifted = str(node.target).rpartition(".")[2].startswith("lifted_tensor")
        name = _name_in(kept, tensor)
        if name is not None and is_hollow:  # The checkpoint holds the true values.
            tensor = fake_mode_of_model(model).from_tensor(tensor)
        elif not is_lifted:
            name = None
        elif name is None and isinstance(tensor, FakeTensor):
            name = _name_in(weights, tensor)
            node.meta["val"].constant = None  # torch would compute with values that do not exist.
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
            "variable or an attribute of a class, and that a trace of the model filled. Empty it, then call the float "
            "model once with inputs like these before fxquant calls it"
        )
    path, dot, _ = target.rpartition(".")
    return f"{path}{dot}{CONSTANT}{_digest(tensor)}"


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
    """The names that a model uses, each with True for a tensor and False for a module."""
    names = {name: False for name, _ in model.named_modules(remove_duplicate=False) if name}
    return names | {name: True for name, _ in [*weights_and_buffers(model), *kept_tensors(model)]}


def name_layers(module: fx.GraphModule, model: nn.Module) -> None:
    """Give each linear, convolution and embedding with a stored weight a stable name, that of the weight's owner.

    If several modules share a weight, the name is that of the module that calls the op. If none of these modules calls
    the op, the name is the one under which ``torch.export`` reads the weight, which is the same in all graphs. Further
    uses of a weight under one name are numbered, ``name@2``.
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
    """The name of a shared weight that belongs to the module that calls an op, or to the nearest module around it."""
    modules = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    for path in reversed(modules):
        inside = [name for name in names if path and name.startswith(f"{path}.")]
        if inside:
            direct = [name for name in inside if "." not in name.removeprefix(f"{path}.")]
            return next(iter(direct), default if default in inside else inside[0])
    return default
