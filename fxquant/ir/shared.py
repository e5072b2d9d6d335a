"""The tensors that the graphs of one model share by name, and what each graph needs them to be.

What passes fold into a weight depends on the other readers of the value computed from it, and so on the kind of call.
The first graph that reads a tensor decides what is stored under its name. A later graph that needs another fold of the
tensor gets its own tensor while the float weights are available. Once they are gone, the graph reads the stored tensor
and corrects the value at run time. If the value cannot be corrected, the call is refused.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.errors import CaptureError
from fxquant.ir.arguments import args, source_of
from fxquant.ir.histories import History, history_of
from fxquant.ir.layers import is_cast, parameter_of
from fxquant.ir.meta import LAYER
from fxquant.ir.tensors import drop_unread_tensors, get_tensor, set_tensor

if TYPE_CHECKING:
    from fxquant.ir.rewriter import Rewriter

aten = torch.ops.aten

_PARAMETERS: dict[Any, tuple[str, ...]] = {
    aten.linear.default: ("weight", "bias"),
    aten.conv1d.default: ("weight", "bias"),
    aten.conv2d.default: ("weight", "bias"),
    aten.conv3d.default: ("weight", "bias"),
    aten.conv1d.padding: ("weight", "bias"),
    aten.conv2d.padding: ("weight", "bias"),
    aten.conv3d.padding: ("weight", "bias"),
    aten.layer_norm.default: ("weight", "bias"),
    aten.rms_norm.default: ("weight",),
    aten.embedding.default: ("weight",),
}
"""Ops whose result scales and shifts with their parameters, and the names of these among the arguments."""

_NORMS = (aten.layer_norm.default, aten.rms_norm.default)


Histories = tuple[History | None, ...]
"""Histories of the parameters of one op; None for a parameter that is not given or is computed."""


@dataclass(frozen=True)
class Fold:
    """How a pass changed the result y of an op by folding into its parameters: to ``scale * y + shift``, float64."""

    scale: Tensor
    shift: Tensor

    def then(self, scale: Tensor, shift: Tensor) -> Fold:
        """This fold followed by another one."""
        return Fold(self.scale * scale, self.shift * scale + shift)

    @classmethod
    def none(cls) -> Fold:
        """The fold that changes nothing."""
        return cls(torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))


@dataclass(frozen=True)
class Stored:
    """One form in which the parameters of an op are stored: their names and histories, and what was folded in."""

    names: tuple[str | None, ...]
    histories: Histories
    fold: Fold


@dataclass
class SharedTensors:
    """What the graphs of a model have settled so far.

    Attributes:
        names: For each name of a tensor, the digest of its history.
        forms: The stored forms of an op's parameters, by the histories of the parameters before anything was folded in.
        columns: What was folded into the columns of linears that are not balanced or shifted themselves, but share an
            input with such a linear; the plan does not contain these folds. For each layer and suffix of the plan's
            vectors: the vector, and the boundaries between its bins of timesteps.
        rounded: For each layer, the digest of the history of the weight from which its codes in the plan were rounded.
        values: For each quantized attention, a digest of the changes of its v for which its range was found.
        layers: The layers of the graphs so far.
        complete: Whether the float weights are gone, so that nothing more can be stored.
    """

    names: dict[str, str] = field(default_factory=dict)
    forms: dict[Histories, list[Stored]] = field(default_factory=dict)
    columns: dict[tuple[str, str], tuple[Tensor, tuple[float, ...]]] = field(default_factory=dict)
    rounded: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    layers: set[str] = field(default_factory=set)
    complete: bool = False

    def without_weights(self) -> SharedTensors:
        """A copy for graphs that are made after the float weights are gone."""
        closed = copy.copy(self)  # The dicts are shared: the next graph sees what one such graph adds.
        closed.complete = True
        return closed

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedTensors:
        return SharedTensors(
            dict(self.names),
            {key: list(forms) for key, forms in self.forms.items()},
            dict(self.columns),
            dict(self.rounded),
            dict(self.values),
            set(self.layers),
            self.complete,
        )

    def is_rounded_here(self, layer: str, history: History) -> bool:
        """Whether the codes of a layer's weight were rounded from the weight with this history, or none exist yet."""
        return self.rounded.setdefault(layer, history.digest) == history.digest

    def settle_names(self, module: fx.GraphModule) -> None:
        """Rename tensors of a finished graph so that no other graph holds a different tensor under the same name.

        Raises:
            CaptureError: If the graph needs a tensor that is not stored, and the float weights are gone.
        """
        renamed = False
        for node in module.graph.nodes:
            if LAYER in node.meta:
                self.layers.add(node.meta[LAYER])
            if node.op != "get_attr":
                continue
            name, tensor = str(node.target), get_tensor(module, str(node.target))
            found = history_of(module, node).digest
            if self.names.get(name, found) != found:
                name = f"{name}_{found[:8]}"
                if self.complete and isinstance(tensor, FakeTensor) and name not in self.names:
                    raise CaptureError(
                        f"tensor {node.target!r} is stored as the calibration calls need it, and this call of the "
                        "model needs another form of it, because other parts of the model read the value computed from "
                        "it; calibrate with a call like this one as well"
                    )
                set_tensor(module, name, tensor)
                node.target = name
                renamed = True
            self.names[name] = found
        if renamed:
            drop_unread_tensors(module)
            module.recompile()

    def unstored(
        self, module: fx.GraphModule, before: dict[fx.Node, Histories], folds: dict[fx.Node, Fold]
    ) -> list[tuple[fx.Node, Stored, Fold]]:
        """Decide in which form the parameters of a graph's ops are stored.

        While the float weights are available, the form that this graph needs is added.

        Args:
            module: The graph.
            before: Histories of each op's parameters before a pass folded anything in; see :func:`parameters_of`.
            folds: What the pass folded in.

        Returns:
            Once the float weights are gone: the ops whose form is not stored, each with a form that is stored and the
            fold that turns the result with the stored form into the result that the graph needs.
        """
        found = []
        for node, histories in before.items():
            attributes = attributes_of(node)
            if not any(attributes):  # Nothing reads it any more.
                continue
            needed, now = folds.get(node, Fold.none()), _form(module, attributes)
            if now[1] != histories and node not in folds:  # Changed by a fold that ``folds`` does not list.
                continue
            forms = self.forms.get(histories, [])
            if any((form.names, form.histories) == now for form in forms):
                continue
            if not self.complete:
                self.forms.setdefault(histories, []).append(Stored(*now, needed))
            elif forms:
                scale = needed.scale / forms[0].fold.scale
                found.append((node, forms[0], Fold(scale, needed.shift - forms[0].fold.shift * scale)))
        return found


def parameters_of(module: fx.GraphModule) -> dict[fx.Node, Histories]:
    """The ops of a graph into whose parameters factors can be folded, with the histories of these parameters.

    Ops without parameters are left out: the parameters that a pass gives them are derived from the plan, so every graph
    can have its own.
    """
    found: dict[fx.Node, Histories] = {}
    for node in module.graph.nodes:
        attributes = attributes_of(node)
        if any(attributes):
            found[node] = tuple(None if one is None else history_of(module, one) for one in attributes)
    return found


def attributes_of(node: fx.Node) -> tuple[fx.Node | None, ...]:
    """The ``get_attr`` nodes of an op's parameters; None for a parameter that is not given or is computed.

    A ``get_attr`` node that is read as a value, and not as the weight of an op, counts as its own parameter.
    """
    if node.op == "get_attr":
        value = node.meta.get("val")
        bare = isinstance(value, Tensor) and value.is_floating_point()
        bare = bare and any(_is_read_as_value(node, user) for user in node.users)
        return (node,) if bare else ()
    return tuple(_attribute(getattr(args(node), name)) for name in _PARAMETERS.get(node.target, ()))


def read_stored(node: fx.Node, stored: Stored, rewriter: Rewriter) -> fx.Node:
    """Make an op read another stored form of its parameters; returns the node whose value changes."""
    own = attributes_of(node)
    weight = next(one for one in own if one is not None)
    read: list[fx.Node | None] = []
    for attribute, name, history in zip(own, stored.names, stored.histories, strict=True):
        if name is None or history is None:
            read.append(None)
            continue
        like = rewriter.tensor(attribute or weight)
        if attribute is None and like.dim() > 1 and node.target not in _NORMS:  # A bias has one number per row.
            like = like.flatten(1)[:, 0]
        read.append(rewriter.read(name, history, like, [node]))
    if node.op == "get_attr":
        (found,) = read
        assert found is not None
        for user in [user for user in node.users if _is_read_as_value(node, user)]:
            rewriter.redirect(user, node, found)
        return found
    for parameter, old, new in zip(_PARAMETERS[node.target], own, read, strict=True):
        reader, argument = node, getattr(args(node), parameter)
        while old is not None and argument is not old:
            reader, argument = argument, source_of(argument)
        if old is not None and new is not None:
            rewriter.redirect(reader, old, new)
        elif old is not new:
            rewriter.set_argument(node, parameter, new)
    return node


def _attribute(argument: Any) -> fx.Node | None:
    found = parameter_of(argument) if isinstance(argument, fx.Node) else None
    return found if found is not None and found.op == "get_attr" else None


def _is_read_as_value(attribute: fx.Node, user: fx.Node) -> bool:
    """Whether an op reads a parameter, through a cast or not, other than as its weight or bias."""
    if is_cast(user) and len(user.users) == 1:
        return _is_read_as_value(attribute, next(iter(user.users)))
    return all(_attribute(getattr(args(user), name)) is not attribute for name in _PARAMETERS.get(user.target, ()))


def _form(module: fx.GraphModule, attributes: tuple[fx.Node | None, ...]) -> tuple[tuple[str | None, ...], Histories]:
    names = tuple(None if one is None else str(one.target) for one in attributes)
    return names, tuple(None if one is None else history_of(module, one) for one in attributes)
