"""The rewriter, the only code that edits graphs.

It runs each new op on fake tensors to keep the recorded shape and dtype of every value current. It makes a private copy
of a parameter that other nodes still read. It records on each node which pass made the node, and from which nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxquant.errors import NonFiniteError, PassError
from fxquant.ir.arguments import args, source_of
from fxquant.ir.borders import hand_over
from fxquant.ir.edits import EditLog, NodeEdit, TensorEdit
from fxquant.ir.fingerprint import Fingerprint
from fxquant.ir.free_names import FreeNames
from fxquant.ir.histories import History, has_content, history_of, record
from fxquant.ir.inlining import infer_again, inline
from fxquant.ir.layer_changes import note_fold
from fxquant.ir.meta import LAYER, PROVENANCE
from fxquant.ir.places import Origin, place_of
from fxquant.ir.proofs import inferring, prove
from fxquant.ir.tensors import are_alike, contiguous, fake_in, fake_mode_of, get_tensor, is_finite, set_tensor
from fxquant.memory.bound import kept
from fxquant.memory.mappings import let_go

_PLACE = ("nn_module_stack", "stack_trace")  # Keys of ``node.meta`` for the place in the model's code.
_FEWEST_EDITS, _EDITS_PER_NODE = 20_000, 100  # A pass that makes more edits is taken to loop for ever.


class Rewriter:
    """Edits one graph on behalf of one pass.

    Attributes:
        module: The graph module being rewritten.
        pass_name: Recorded as provenance.
        edits: Number of changes made so far, which only grows; 0 means that the pass did not match. Very many raise a
            PassError: the pass most likely loops for ever.
        fingerprint: Receives every edit, so that the pipeline finds edits that were made in another way; or None.
        memo: Nodes that the pass has made and may use again, by keys that the pass chooses.
        log: The changes in order; see :mod:`fxquant.ir.edits`.
    """

    def __init__(self, module: fx.GraphModule, pass_name: str) -> None:
        self.module = module
        self.pass_name = pass_name
        self.fingerprint: Fingerprint | None = None
        self._edits = 0
        self._most_edits = max(_FEWEST_EDITS, _EDITS_PER_NODE * len(module.graph.nodes))
        self.memo: dict[Any, Any] = {}
        self.log = EditLog()
        self._tails: list[fx.Node | None] = []  # Of each insert point after a node: the node that was made there last.

    @property
    def graph(self) -> fx.Graph:
        """The graph being rewritten."""
        return self.module.graph

    @property
    def edits(self) -> int:  # noqa: D102  (an attribute, described above)
        return self._edits

    @edits.setter
    def edits(self, number: int) -> None:
        if number < self._edits:
            raise PassError(f"{self.pass_name}: the number of edits only grows; without edits, nothing is verified")
        if number > self._most_edits:
            raise PassError(
                f"{self.pass_name}: stopped after {self._most_edits} edits, {_EDITS_PER_NODE} or more per node of the "
                "graph; a pass that walks over nodes that it adds never ends: walk over list(graph.nodes), and skip "
                "what is rewritten already"
            )
        self._edits = number

    def tensor(self, node: Any) -> Tensor:
        """The tensor that a ``get_attr`` node reads: real, or fake while a plan is replayed without weights."""
        assert isinstance(node, fx.Node) and node.op == "get_attr", f"{node} is not a parameter"
        return get_tensor(self.module, str(node.target))

    def history(self, attribute: fx.Node) -> History:
        """What was done to the tensor that a ``get_attr`` node reads; see :mod:`fxquant.ir.histories`."""
        return history_of(self.module, attribute)

    def fold(
        self, node: fx.Node, name: str, function: Callable[[Tensor], Tensor], by: Sequence[Tensor | str] = ()
    ) -> None:
        """Replace a parameter, such as ``weight``, by ``function(parameter)``; other readers keep the old one.

        The function receives a copy of the parameter in its own dtype and may return another dtype (float64). The
        result is cast back once, here.

        Args:
            node: The reader.
            name: Name of the parameter among the reader's arguments.
            function: Computes the new parameter from the old one.
            by: Everything that the function depends on besides the parameter: factors, and a text that identifies the
                function. The graphs of a model share a parameter only if what was folded into it is equal. If ``by`` is
                empty, the pass is assumed to change the parameter in the same way in every graph. ``"columns"``,
                ``"rows"`` or ``"affine"`` followed by factors, and maybe by what is added, and ``"shift"`` followed by
                what is added, are also for the log, which then holds their ranges.

        Raises:
            NonFiniteError: If the result does not fit the parameter's dtype.
            PassError: If the function returns something else than a tensor.
        """
        attribute = args(node).node(name)
        while attribute.op != "get_attr":  # The node reads the parameter through a cast.
            node, attribute = attribute, source_of(attribute)
        if set(attribute.users) != {node}:
            attribute = self._private(attribute, [node])
        self.fold_attribute(attribute, function, by=by)

    def fold_attribute(
        self,
        attribute: fx.Node,
        function: Callable[[Tensor], Tensor],
        readers: Sequence[fx.Node] | None = None,
        by: Sequence[Tensor | str] = (),
    ) -> fx.Node:
        """Replace a parameter by ``function(parameter)`` for all or some readers; returns the node that they read."""
        if readers is not None and set(readers) != set(attribute.users):
            attribute = self._private(attribute, readers)
        old = self.tensor(attribute)
        new = function(old.detach().clone())  # A copy: the model's own weight is the same tensor until it is folded.
        if not isinstance(new, Tensor):
            raise PassError(
                f"{self.pass_name}: the function that folds into {attribute.target} returned a {type(new).__name__}; "
                "let it return the new tensor"
            )
        new = new.to(old.dtype)
        if not isinstance(new, FakeTensor) and not is_finite(new):
            raise NonFiniteError(
                f"{attribute.target} does not fit {old.dtype} after {self.pass_name}; "
                "convert the model to float32 first, or bound the factors of the pass"
            )
        self.put(attribute, new, by)
        return attribute

    def put(self, attribute: fx.Node, value: Tensor, by: Sequence[Tensor | str] = ()) -> None:
        """Make ``value`` the tensor of a ``get_attr`` node, contiguous in memory; ``by`` as in :meth:`fold`."""
        value = kept(contiguous(value))
        if not has_content(attribute):
            record(attribute, self.history(attribute).then(*(by or (self.pass_name,))))
        note_fold(self.module, attribute, by, self.pass_name)
        let_go(self.tensor(attribute))
        set_tensor(self.module, str(attribute.target), value)
        if not are_alike(attribute.meta["val"], value):  # Else it stays, and with it the proofs of readers.
            attribute.meta["val"] = fake_in(self._fake_mode, value)
        self.log.tensors.append(TensorEdit.folded(str(attribute.target), by))
        self._note(attribute, [attribute])

    def forget(self, attribute: fx.Node) -> None:
        """Drop the values of a parameter that is about to lose its last reader; its shape and dtype remain."""
        let_go(self.tensor(attribute))
        with self._fake_mode:
            set_tensor(self.module, str(attribute.target), torch.empty_like(attribute.meta["val"]))
        if self.fingerprint is not None:
            self.fingerprint.forget(str(attribute.target))
        self.log.tensors.append(TensorEdit("dropped", str(attribute.target)))
        self._note(attribute, [attribute])

    def constant(self, name: str, value: Tensor, sources: Sequence[fx.Node], history: History | None = None) -> fx.Node:
        """Add a tensor to the module under ``name`` (or a similar free name) and a node that reads it.

        Args:
            name: Name of the tensor.
            value: The tensor; it is stored contiguous in memory, on the device of the first source's value.
            sources: The nodes that the new one is made from.
            history: The tensor's history, if it is derived from weights; see :func:`fxquant.ir.histories.made_from`.
        """
        if not isinstance(value, Tensor):
            raise PassError(
                f"{self.pass_name}: the constant {name!r} is a {type(value).__name__}; give a tensor, such as "
                "torch.tensor(value). Numbers can be arguments of ops as they are"
            )
        made_from = next((node.meta["val"] for node in sources if isinstance(node.meta.get("val"), Tensor)), value)
        target, value = self._names.take(name), kept(contiguous(value.to(made_from.device)))
        set_tensor(self.module, target, value)
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.get_attr(target)
        node.meta["val"] = fake_in(self._fake_mode, value)
        record(node, history)
        self.log.tensors.append(TensorEdit("made", target))
        self._made(node, sources)
        return node

    def give(self, node: fx.Node, name: str, value: Tensor, history: History | None = None) -> None:
        """Give ``node`` a parameter that it lacked, in the dtype of its result; ``history`` as in :meth:`constant`."""
        attribute = self.constant(f"{place_of(node)}.{name}", value.to(node.meta["val"].dtype), [node], history)
        self.set_argument(node, name, attribute)

    def set_argument(self, node: fx.Node, name: str, value: Any) -> None:
        """Set an argument of ``node``, whether or not it was given before.

        The shape and dtype of its result, and of the values computed from it, are inferred again.

        Raises:
            ArgumentError: If the op has no argument of the name.
            PassError: If the op does not accept the value.
        """
        if name in node.kwargs or args(node).is_keyword(name):
            node.kwargs = {**node.kwargs, name: value}
        else:
            node.args = args(node).replaced(**{name: value})
            node.kwargs = {other: kept for other, kept in node.kwargs.items() if not args(node).is_positional(other)}
        infer_again(self, node)
        self.log.nodes.append(NodeEdit("rewired", node.name))
        self._note(node, [node])

    def leave_out(self, node: fx.Node, name: str) -> None:
        """Make ``node`` not give an argument, which then has its default.

        Raises:
            ArgumentError: If the op has no argument of the name, or no default for it.
        """
        node.args = args(node).without(name)
        node.kwargs = {other: value for other, value in node.kwargs.items() if other != name}
        self._rewired(node)

    def read(self, name: str, history: History, like: Tensor, sources: Sequence[fx.Node]) -> fx.Node:
        """Add a node that reads a tensor that another graph of the model stored under ``name``.

        Args:
            name: Name of the tensor.
            history: History of the tensor.
            like: A tensor of the same shape and dtype. The values are set when the graph gets its tensors.
            sources: The nodes that the new one is made from.
        """
        try:
            get_tensor(self.module, name)
        except AttributeError:
            set_tensor(self.module, name, fake_in(self._fake_mode, like))
        self._names.read(name)
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.get_attr(name)
        node.meta["val"] = fake_in(self._fake_mode, like)
        record(node, history)
        self._made(node, sources)
        return node

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Insert new nodes before ``node``, in the order in which they are made."""
        self._tails.append(None)
        with self.graph.inserting_before(node):
            try:
                yield
            finally:
                self._tails.pop()

    @contextmanager
    def after(self, node: fx.Node) -> Iterator[None]:
        """Insert new nodes after ``node``, in the order in which they are made."""
        self._tails.append(node)  # FX alone would insert each new node before the earlier ones.
        with self.graph.inserting_after(node):
            try:
                yield
            finally:
                self._tails.pop()

    def call(
        self,
        target: Any,
        arguments: tuple[Any, ...],
        sources: Sequence[fx.Node],
        name: str | None = None,
        layer: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> fx.Node:
        """Add a call of ``target``; its shape and dtype are computed on fake tensors.

        Args:
            target: An overload of an op.
            arguments: Its arguments, which may contain nodes.
            sources: The nodes that the new one is made from.
            name: A readable name for the node.
            layer: Whether the new node does work of the layer of its sources. It then gets the layer name of the last
                source that has one.
            kwargs: Its arguments by name.

        Raises:
            PassError: If the arguments are not a tuple, or one is a tensor, which a graph can only read by name.
        """
        named = dict(kwargs or {})
        if not isinstance(arguments, tuple):
            raise PassError(
                f"{self.pass_name}: the arguments of {target} are a {type(arguments).__name__}; give a tuple, such as "
                "rewriter.call(op, (node, 2), [node])"
            )
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((arguments, named))):
            raise PassError(f"{self.pass_name}: an argument of {target} is a tensor; add it by Rewriter.constant first")
        tail = self._tails[-1] if self._tails else None
        with nullcontext() if tail is None or tail._erased else self.graph.inserting_after(tail):
            node = self.graph.call_function(target, arguments, named, name=name)
        if tail is not None:
            self._tails[-1] = node
        node.meta["val"] = self.infer(node)
        prove(node)
        for source in sources:
            for key in (*_PLACE, LAYER) if layer else _PLACE:
                if key in source.meta:
                    node.meta[key] = source.meta[key]
        self._made(node, sources)
        return node

    def inline(
        self, function: Callable[..., Any], arguments: Sequence[Any], sources: Sequence[fx.Node], layer: bool = False
    ) -> Any:
        """Add the ops of a small function of tensors; see :func:`fxquant.ir.inlining.inline`."""
        return inline(self, function, arguments, sources, layer)

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Make all readers of ``node`` read ``new`` instead, and erase ``node``."""
        hand_over(node, new)
        changed = node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self._rewired(*(user for user in changed if user is not new))
        if not node.users:
            self._drop(node)

    def redirect(self, reader: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Make one reader read ``new`` instead of ``old``.

        Raises:
            PassError: If the reader does not read ``old``.
        """
        if old not in reader.all_input_nodes:
            raise PassError(
                f"{self.pass_name}: {reader.name} cannot be redirected from {old.name}, which it does not read"
            )
        reader.replace_input_with(old, new)
        self._rewired(reader)

    def erase(self, node: fx.Node) -> None:
        """Remove a node that nothing reads."""
        if node.users:
            raise PassError(f"{self.pass_name}: {node.name} is still read by {', '.join(u.name for u in node.users)}")
        self._drop(node)
        self.edits += 1

    def infer(self, node: fx.Node) -> Any:
        """The fake value of a node, computed from the fake values of its inputs."""
        values, named = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        with inferring(self._fake_mode):
            return node.target(*values, **named)  # type: ignore[operator]

    def _private(self, attribute: fx.Node, readers: Sequence[fx.Node]) -> fx.Node:
        place = place_of(readers[0]).replace(".", "_")
        history = None if has_content(attribute) else self.history(attribute)
        copy = self.constant(f"{attribute.target}_of_{place}", self.tensor(attribute), [attribute], history)
        self.log.tensors[-1] = TensorEdit("copied", str(copy.target), source=str(attribute.target))
        for reader in readers:
            self.redirect(reader, attribute, copy)
        return copy

    @cached_property
    def _fake_mode(self) -> FakeTensorMode:
        return fake_mode_of(self.graph)

    @cached_property
    def _names(self) -> FreeNames:
        return FreeNames(self.module)

    def _made(self, node: fx.Node, sources: Sequence[fx.Node]) -> None:
        self.log.nodes.append(NodeEdit("made", node.name))
        self._note(node, sources)

    def _rewired(self, *nodes: fx.Node) -> None:
        self.log.nodes += [NodeEdit("rewired", node.name) for node in nodes]
        self._count(*nodes)

    def _drop(self, node: fx.Node) -> None:
        self.log.nodes.append(NodeEdit("erased", node.name))
        if node.op == "get_attr":
            self._names.forget(str(node.target))
        self.graph.erase_node(node)
        if self.fingerprint is not None:
            self.fingerprint.erase(node)

    def _note(self, node: fx.Node, sources: Sequence[fx.Node]) -> None:
        inherited = dict.fromkeys(origin for source in sources for origin in source.meta.get(PROVENANCE, ()))
        origin = Origin(self.pass_name, tuple(source.name for source in sources))
        node.meta[PROVENANCE] = (*(o for o in inherited if o != origin), origin)
        self._count(node)

    def _count(self, *changed: fx.Node) -> None:
        """Count one edit, which made or changed these nodes."""
        self.edits += 1
        if self.fingerprint is not None:
            for node in changed:
                self.fingerprint.update(node)
