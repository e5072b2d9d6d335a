"""What a graph was before a pass, so that edits past the rewriter are found, and a failed pass can be undone.

A fingerprint is cheap: it holds the argument tuples, targets and tensors of a graph by reference, and some values of
each tensor. These are 64: sums over all weights of DiT-XL/2 take 0.3 s per graph and pass, 5 % or more of a conversion.
A write through ``.data`` or numpy that misses these values counts no version. It is found with ``thorough`` only, which
``prove=True`` sets. The rewriter reports each edit to the fingerprint (:meth:`Fingerprint.update`), and
:meth:`Fingerprint.check` compares the graph with what was reported.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxquant.errors import PassError
from fxquant.ir.meta import LAYER
from fxquant.ir.places import label
from fxquant.ir.tensors import get_tensor, holder_of, weights_and_buffers
from fxquant.memory.bound import relax

_Call = tuple[Any, Any, Any]  # Target, arguments and keyword arguments of a node.
_SAMPLED = 64  # Elements of each tensor that are compared, because writes through ``.data`` count no version.
_GENERATED = "<eval_with_key>"  # The file name of code that FX makes from a graph begins so.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _State(NamedTuple):
    """What changes if the values of a tensor are written in place, and what gradients do with it."""

    values: tuple[Any, ...] = ()
    gradients: tuple[bool, bool, int] = (False, False, 0)


class Fingerprint:
    """The state of a graph before a pass, and the state that the rewriter has made of it since.

    Args:
        module: The graph module.
        thorough: Compare all values of each tensor, not only some; this reads all weights.
    """

    def __init__(self, module: fx.GraphModule, *, thorough: bool = False) -> None:
        self.module = module
        self._thorough = thorough
        graph = module.graph
        self._codegen, self._tracer = graph._codegen, graph._tracer_cls
        self._nodes = [(node, node.name, node.type, dict(node.meta)) for node in graph.nodes]
        self._before: dict[fx.Node, _Call] = {node: _call(node) for node in graph.nodes}
        self._expected = dict(self._before)
        self._names = {name for name, _ in weights_and_buffers(module)}
        self._tensors: dict[str, Tensor] = {}
        self._trained: dict[str, bool] = {}
        self._held: dict[str, tuple[Tensor, _State]] = {}
        self._attributes = _attributes_of(module)
        for node in graph.nodes:
            if node.op == "get_attr" and (tensor := _tensor(module, node)) is not None:
                self._tensors[str(node.target)] = tensor
                self._trained[str(node.target)] = tensor.requires_grad
                self._held[str(node.target)] = tensor, self._state(tensor)
        self._signature = _signature(graph)
        self._forgotten: list[str] = []

    # --- what the rewriter reports ---

    def update(self, node: fx.Node) -> None:
        """Take the present state of a node that the rewriter made or changed, and of the tensor that it reads."""
        self._expected[node] = _call(node)
        if node.op == "get_attr" and (tensor := _tensor(self.module, node)) is not None:
            held = self._held.get(str(node.target))
            if held is None or held[0] is not tensor:
                self._held[str(node.target)] = tensor, self._state(tensor)

    def erase(self, node: fx.Node) -> None:
        """Take note that the rewriter erases a node."""
        self._expected.pop(node, None)

    def forget(self, target: str) -> None:
        """Let go of the values of a tensor, which the rewriter drops to free memory; they cannot be restored."""
        if self._tensors.pop(target, None) is not None:
            self._forgotten.append(target)

    # --- checks ---

    def check(self, pass_name: str, edits: int = 0) -> None:
        """Refuse edits that the rewriter did not report, and a changed signature.

        Args:
            pass_name: The pass, for messages.
            edits: Number of edits that the rewriter counted; without any, shapes and dtypes have to be as before.

        Raises:
            PassError: Names the pass, the node or tensor, and the method to use instead.
        """
        self._check_nodes(pass_name)
        self._check_places(pass_name, edits)
        self._check_tensors(pass_name)
        self._check_signature(pass_name)
        self._check_additions(pass_name)
        attributes = _attributes_of(self.module)
        for what, before in self._attributes.items():
            if attributes[what] != before:
                raise PassError(
                    f"{pass_name}: {what} of the graph module changed. What a graph computes is in its nodes alone, "
                    "and only these are saved; add nodes by rewriter.call or rewriter.inline"
                )

    def _check_nodes(self, pass_name: str) -> None:
        left = dict(self._expected)
        for node in self.module.graph.nodes:
            expected = left.pop(node, None)
            if expected is None:
                raise PassError(
                    f"{pass_name}: {label(node)} was added to the graph past the rewriter, so its shape and its pass "
                    "are not recorded; make it by rewriter.call(op, arguments, sources), a tensor by rewriter.constant"
                )
            if not _same(expected, _call(node)):
                raise PassError(
                    f"{pass_name}: {label(node)} was changed past the rewriter: {_difference(expected, node)}; use "
                    "rewriter.set_argument, rewriter.redirect or rewriter.replace, which keep shapes and provenance"
                )
        for node in left:
            raise PassError(
                f"{pass_name}: {label(node)} was erased past the rewriter; use rewriter.erase or rewriter.replace. A "
                "node that nothing reads any more is removed by the pipeline"
            )

    def _check_places(self, pass_name: str, edits: int) -> None:
        """Compare the order of the nodes that are left, their layers and, if nothing was edited, their shapes."""
        known = {node: meta for node, _, _, meta in self._nodes}
        names = {node: name for node, name, _, _ in self._nodes}
        left = [node for node in self.module.graph.nodes if node in known]
        remaining = set(left)
        for node, expected in zip(left, (node for node in known if node in remaining), strict=True):
            if node is not expected:
                raise PassError(
                    f"{pass_name}: {label(node)} was moved past the rewriter; make a new node where it is needed, and "
                    "replace the old one by it"
                )
            if node.name != names[node] or any(node not in read.users for read in node.all_input_nodes):
                raise PassError(
                    f"{pass_name}: the name or the readers of node {names[node]} were set past the rewriter"
                )
            before, after = known[node].get(LAYER), node.meta.get(LAYER)
            if before != after:
                raise PassError(
                    f"{pass_name}: node {node.name} was of layer {before} and is now of layer {after}; the plan and "
                    "statistics find layers by this name, so a pass keeps it"
                )
            if not edits and known[node].get("val") is not node.meta.get("val"):
                raise PassError(f"{pass_name}: the recorded shape or dtype of {label(node)} was set past the rewriter")

    def _check_tensors(self, pass_name: str) -> None:
        for node in self.module.graph.nodes:
            if node.op != "get_attr" or (tensor := _tensor(self.module, node)) is None:
                continue
            held, state = self._held.get(str(node.target), (None, _State()))
            if tensor is not held:
                raise PassError(
                    f"{pass_name}: the tensor {node.target} was set past the rewriter; use rewriter.put or "
                    "rewriter.fold, which know the other readers and graphs that share the tensor"
                )
            now = self._state(tensor)
            if now.gradients != state.gradients:
                what = "requires_grad" if now.gradients[0] != state.gradients[0] else "the gradient or a hook"
                raise PassError(
                    f"{pass_name}: {what} of the tensor {node.target} was set. The model's own weight may be the same "
                    "tensor, and passes do not train; compute with a copy, tensor.detach().clone()"
                )
            if now.values != state.values:
                raise PassError(
                    f"{pass_name}: the values of the tensor {node.target} were changed in place. The model's own "
                    "weight may be the same memory, and it stays changed: load the model again. Use rewriter.fold("
                    "node, name, function), whose function returns a new tensor"
                )

    def _check_additions(self, pass_name: str) -> None:
        """Refuse tensors that the rewriter did not add; nothing reads them, but they would be held with the model."""
        for name, _ in weights_and_buffers(self.module):
            if name not in self._names and name not in self._held:
                raise PassError(
                    f"{pass_name}: the tensor {name} was added past the rewriter; use rewriter.constant, which also "
                    "adds the node that reads it"
                )

    def _check_signature(self, pass_name: str) -> None:
        before, after = self._signature, _signature(self.module.graph)
        for what, old, new in zip(("inputs", "outputs"), before, after, strict=True):
            if old != new:
                raise PassError(
                    f"{pass_name}: the {what} of the graph were {_listed(old)} and are now {_listed(new)}; a pass "
                    f"keeps the number, order, shapes and dtypes of {what}, because the model is called as before"
                )

    def _state(self, tensor: Tensor) -> _State:
        has_gradient = tensor.is_leaf and tensor.grad is not None
        gradients = tensor.requires_grad, has_gradient, len(tensor._backward_hooks or ())
        if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
            return _State(gradients=gradients)
        place = tensor.data_ptr() if _is_plain(tensor) else None
        found = _State((_version(tensor), place, _values(tensor, self._thorough)), gradients)
        relax()
        return found

    # --- restoration ---

    def restore(self) -> list[str]:
        """Make the graph what it was before the pass, of new nodes over the same tensors.

        Returns:
            Names of tensors that were dropped to free memory and cannot be restored.
        """
        graph = fx.Graph(tracer_cls=self._tracer)
        graph._codegen = self._codegen
        made: dict[fx.Node, fx.Node] = {}
        for node, name, kind, meta in self._nodes:
            target, arguments, named = map_arg(self._before[node], made.__getitem__)
            new = graph.create_node(node.op, target, arguments, named, name, kind)
            new.meta = meta
            made[node] = new
        for name in [name for name, _ in weights_and_buffers(self.module) if name not in self._names]:
            _remove(self.module, name)
        for target, tensor in self._tensors.items():
            if tensor.is_leaf and tensor.requires_grad != self._trained[target]:
                tensor.requires_grad_(self._trained[target])  # Only values stay changed.
            _put_back(self.module, target, tensor)
        if self._attributes["the forward"] is None:
            vars(self.module).pop("forward", None)
        for hooks in _HOOKS:
            for key in set(getattr(self.module, hooks)) - set(self._attributes[hooks]):
                del getattr(self.module, hooks)[key]
        self.module.graph = graph  # Which recompiles it.
        return [target for target in self._forgotten if target in self._names]


def _call(node: fx.Node) -> _Call:
    return node.target, node.args, node.kwargs


def _same(expected: _Call, actual: _Call) -> bool:
    # Assigning arguments always makes new tuples, so most comparisons end with identity.
    if all(one is other for one, other in zip(expected, actual, strict=True)):
        return True
    return expected[0] is actual[0] and _alike(expected[1], actual[1]) and _alike(expected[2], actual[2])


def _alike(one: Any, other: Any) -> bool:
    """Whether arguments are equal. Symbolic numbers are compared by identity: comparing values would fix the batch."""
    left, right = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return left[1] == right[1] and all(
        a is b or (type(a) is type(b) and isinstance(a, (int, float, str)) and a == b)
        for a, b in zip(left[0], right[0], strict=True)
    )


def _difference(expected: _Call, node: fx.Node) -> str:
    target, arguments, named = expected
    if target is not node.target:
        return f"it was {target} and is now {node.target}"
    if not _alike(arguments, node.args):
        return f"its arguments were {arguments} and are now {node.args}"
    return f"its keyword arguments were {named} and are now {node.kwargs}"


def _tensor(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    try:
        return get_tensor(module, str(node.target))
    except AttributeError:  # Verification reports it.
        return None


def _version(tensor: Tensor) -> int:
    """How often values of a tensor were written in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided


def _values(tensor: Tensor, thorough: bool) -> bytes | int | None:
    """Some values of a tensor, or a checksum of all of them."""
    if not _is_plain(tensor) or tensor.numel() == 0 or tensor.is_quantized:
        return None
    flat = tensor.detach()
    flat = flat.view(-1) if flat.is_contiguous() else flat[(0,) * (flat.dim() - 1)].reshape(-1)
    found = flat if thorough else flat[:: max(1, flat.numel() // _SAMPLED)]
    data: Any = found.cpu().contiguous().view(torch.uint8).numpy()
    return zlib.crc32(data) if thorough else bytes(data)


def _attributes_of(module: fx.GraphModule) -> dict[str, Any]:
    """What a graph module runs besides its graph."""
    hooks = {name: tuple(getattr(module, name)) for name in _HOOKS}
    forward: Any = type(module).forward
    if getattr(getattr(forward, "__code__", None), "co_filename", "").startswith(_GENERATED):
        forward = None  # FX makes a new function from the graph whenever the graph is recompiled.
    own = {"the forward": vars(module).get("forward"), "the forward of the class": forward}
    return {**own, "the code generation": module.graph._codegen, **hooks}


def _signature(graph: fx.Graph) -> tuple[list[str], list[str]]:
    inputs = [f"{node.target}{_type(node)}" for node in graph.nodes if node.op == "placeholder"]
    outputs = [node for node in graph.nodes if node.op == "output"]
    leaves = [leaf for node in outputs for leaf in pytree.tree_leaves(node.args)]
    return inputs, [_type(leaf) if isinstance(leaf, fx.Node) else repr(leaf) for leaf in leaves]


def _type(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    return f" {str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"


def _listed(entries: list[str]) -> str:
    return f"({'; '.join(entry.strip() for entry in entries)})"


def _put_back(module: nn.Module, target: str, tensor: Tensor) -> None:
    """Make the very same tensor an attribute again; ``set_tensor`` would make a new parameter of it."""
    holder, name = holder_of(module, target)
    if getattr(holder, name, None) is tensor:
        return
    if hasattr(holder, name):
        delattr(holder, name)
    if isinstance(tensor, nn.Parameter):
        holder.register_parameter(name, tensor)
    else:
        holder.register_buffer(name, tensor)


def _remove(module: nn.Module, target: str) -> None:
    """Delete a tensor, and the modules along its path that become empty."""
    path, _, leaf = target.rpartition(".")
    holder = module.get_submodule(path)
    delattr(holder, leaf)
    while path and not holder._parameters and not holder._buffers and not holder._modules:
        path, _, leaf = path.rpartition(".")
        holder = module.get_submodule(path)
        delattr(holder, leaf)
