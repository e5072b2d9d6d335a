"""The stages that a graph goes through, and the conditions that it must meet at each.

Every stage has a specification: the ops that the graph may hold, and conditions on them. :func:`verify` checks a graph
against a specification. The pipeline calls it before and after every pass.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from fxquant.errors import ConfigurationError, DuplicateNameError, VerificationError
from fxquant.ir import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.ir.arguments import args
from fxquant.ir.dataflow import behind
from fxquant.ir.meta import PROVENANCE
from fxquant.ir.places import label
from fxquant.ir.proofs import is_proven, prove
from fxquant.ir.tensors import fake_mode_of, get_tensor

_UNBACKED = re.compile(r"\bu\d+\b")


class Stage(enum.IntEnum):
    """The stage that a graph has reached."""

    CAPTURED = 0
    OBSERVED = 1
    TRANSFORMED = 2
    QUANTIZED = 3
    LOWERED = 4

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class StageSpec:
    """What a graph may hold.

    Attributes:
        name: For messages.
        ops: Names of the fxquant ops that may occur.
        namespaces: Namespaces whose ops may all occur.
        registered: The latest stage of which ops of other packages may occur (:func:`register_op`); None for none.
    """

    name: str
    ops: frozenset[str] = frozenset()
    namespaces: frozenset[str] = frozenset({"aten"})
    registered: Stage | None = None

    def allows(self, node: fx.Node) -> bool:
        """Whether the op of a ``call_function`` node may occur."""
        schema = getattr(node.target, "_schema", None)
        if schema is None:  # Python's own arithmetic on sizes, and getitem.
            return getattr(node.target, "__module__", "") in ("_operator", "operator", "math", "torch", "builtins")
        namespace, _, name = str(schema.name).partition("::")
        if self.registered is not None and _REGISTERED.get(str(schema.name), Stage.LOWERED) <= self.registered:
            return True
        return namespace in self.namespaces or (namespace == "fxquant" and name in self.ops)


_REGISTERED: dict[str, Stage] = {}
"""Ops of other packages by qualified name, each with the earliest stage of the graphs that may hold it."""


def register_op(stage: Stage, op: Any) -> None:
    """Let graphs hold an op of another package, from a stage on.

    The backend fake-quant runs the op's own kernel. Other backends refuse it by name, unless they lower it themselves
    and declare what they lower it to. The op needs a fake kernel (:func:`torch.library.register_fake`), which gives
    shapes, and it must not write into its arguments.

    Args:
        stage: ``TRANSFORMED`` or ``QUANTIZED``: the earliest stage of a graph that may hold the op.
        op: The op, ``torch.ops.my_package.my_op``, or an overload of it. All its overloads are registered.

    Raises:
        ConfigurationError: If this is not an op, or one that graphs cannot hold.
        DuplicateNameError: If it is registered for another stage.
    """
    packet = getattr(op, "overloadpacket", op)
    name = str(getattr(packet, "_qualified_op_name", ""))
    if not name or not hasattr(packet, "overloads"):
        raise ConfigurationError(f"{op!r} is not an op; give torch.ops.my_package.my_op, defined by torch.library")
    if name.partition("::")[0] in ("aten", "fxquant", "prim"):
        raise ConfigurationError(
            f"{name} belongs to {name.partition('::')[0]}; register ops of your own namespace only"
        )
    if stage not in (Stage.TRANSFORMED, Stage.QUANTIZED):
        raise ConfigurationError(f"{name}: ops can be registered for transformed and for quantized graphs, not {stage}")
    for overload in packet.overloads():
        if getattr(packet, overload)._schema.is_mutable:
            raise ConfigurationError(f"{name} writes into an argument, which other nodes may read; return a new tensor")
    if _REGISTERED.setdefault(name, stage) is not stage:
        raise DuplicateNameError(f"op {name} is registered for {_REGISTERED[name]} graphs already")


def is_registered(op: Any) -> bool:
    """Whether an op is one of another package that :func:`register_op` knows."""
    return str(getattr(getattr(op, "_schema", None), "name", "")) in _REGISTERED


_TRANSFORMED = frozenset({"channel_affine"})
_QUANTIZED = _TRANSFORMED | {"quantize", "token_grid", "linear", "conv2d", "matmul", "dequantize_weight"}

SPECS: dict[Stage, StageSpec] = {
    Stage.CAPTURED: StageSpec("captured"),
    Stage.OBSERVED: StageSpec("observed", frozenset({"observe"})),
    Stage.TRANSFORMED: StageSpec("transformed", _TRANSFORMED, registered=Stage.TRANSFORMED),
    Stage.QUANTIZED: StageSpec("quantized", _QUANTIZED, registered=Stage.QUANTIZED),
}
"""The specification of each stage except the last. Each backend declares its own specification of the last stage."""


def verify(module: fx.GraphModule, spec: StageSpec) -> None:
    """Check a graph: well-formed, ops allowed, recorded shapes and dtypes true, quantization parameters coherent.

    Raises:
        VerificationError: If a check fails. The message names the node, its layer and the passes that made it.
    """
    for node in module.graph.nodes:
        if node.op == "get_attr":
            _check_tensor(module, node)
    try:
        module.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"the graph of stage {spec.name!r} is not well-formed: {error}") from error
    mode = fake_mode_of(module.graph)
    with mode, torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "call_function":
                if not spec.allows(node):
                    raise _broken(node, f"op {node.target} does not belong in a graph of stage {spec.name!r}")
                if spec in SPECS.values() and getattr(getattr(node.target, "_schema", None), "is_mutable", False):
                    raise _broken(node, f"op {node.target} writes into its input, which other nodes may read")
                _check_value(node)
                check = _CHECKS.get(str(node.target))
                if check is not None:
                    check(node)
            elif node.op not in ("placeholder", "output", "get_attr"):
                raise _broken(node, f"a {node.op} node does not belong in any stage")


def _broken(node: fx.Node, what: str) -> VerificationError:
    origins = node.meta.get(PROVENANCE)
    made = f", made by {' <- '.join(str(origin) for origin in reversed(origins))}" if origins else ""
    return VerificationError(f"{label(node)}{made}: {what}")


def _check_tensor(module: fx.GraphModule, node: fx.Node) -> None:
    value = node.meta.get("val")
    try:
        held = get_tensor(module, str(node.target))
    except AttributeError:
        raise _broken(node, f"there is no tensor {node.target!r}") from None
    if value is None or tuple(value.shape) != tuple(held.shape) or value.dtype != held.dtype:
        raise _broken(node, f"{node.target} is {_text(held)}, but recorded as {_text(value)}")


def _check_value(node: fx.Node) -> None:
    recorded = node.meta.get("val")
    if recorded is None and node.users:
        raise _broken(node, "its shape and dtype are not recorded")
    if is_proven(node):
        return
    values, named = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    try:
        actual = node.target(*values, **named)  # type: ignore[operator]
    except Exception as error:
        raise _broken(node, f"its arguments do not fit: {error}") from error
    # Sizes that depend on values (u0) get a new name each time they are computed.
    same = _UNBACKED.sub("u", _text(actual)) == _UNBACKED.sub("u", _text(recorded))
    if isinstance(recorded, (Tensor, list, tuple, int, float, torch.SymInt)) and not same:
        raise _broken(node, f"it yields {_text(actual)}, but is recorded as {_text(recorded)}")
    prove(node)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(size) for size in value.shape)}]"


def _values(node: fx.Node, *names: str) -> Iterator[Tensor]:
    return (args(node).node(name).meta["val"] for name in names)


def _check_quantize(node: fx.Node) -> None:
    scale, zero_point = _values(node, "scale", "zero_point")
    qmin, qmax, dtype = args(node).qmin, args(node).qmax, args(node).dtype
    if scale.shape != zero_point.shape:
        raise _broken(node, f"scale {_text(scale)} and zero point {_text(zero_point)} differ in shape")
    if not scale.is_floating_point():
        raise _broken(node, f"the scale is {_text(scale)}, not floating-point")
    limits = torch.iinfo(dtype)
    if not limits.min <= qmin < qmax <= limits.max:
        raise _broken(node, f"codes {qmin}..{qmax} do not fit {dtype}")


def _check_linear(node: fx.Node) -> None:
    codes, x_scale, x_zero_point = _values(node, "xq", "x_scale", "x_zero_point")
    weight, scale, zero_point = _values(node, "wq", "w_scale", "w_zero_point")
    bits, group = args(node).bits, args(node).group_size
    features = int(codes.shape[-1])
    groups = 1 if group == 0 else features // group
    if group and features % group:
        raise _broken(node, f"groups of {group} do not divide {features} input channels")
    if codes.is_floating_point():
        raise _broken(node, f"its input is {_text(codes)}, not integer codes")
    if tuple(scale.shape) != (weight.shape[0], groups) or scale.shape != zero_point.shape:
        raise _broken(
            node,
            f"weight scale {_text(scale)} and zero point {_text(zero_point)} are not one each for "
            f"{weight.shape[0]} output channels x {groups} groups",
        )
    source = args(node).node("xq")
    if source.target is torch.ops.fxquant.quantize.default:
        if (args(source).scale, args(source).zero_point) != (args(node).x_scale, args(node).x_zero_point):
            raise _broken(node, f"its input scale and zero point are not those that {source.name} quantized with")
    elif x_scale.shape != x_zero_point.shape:
        raise _broken(node, "input scale and zero point differ in shape")
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise _broken(node, f"weights of {bits} bits are not supported")


_LAYOUT = ("transpose", "permute", "expand", "view", "reshape", "unsqueeze", "clone", "repeat_interleave")
"""Ops that move codes, and also move grids of more than one number."""


def _check_matmul(node: fx.Node) -> None:
    for what, side in (("left", "a"), ("right", "b")):
        names = (f"{side}q", f"{side}_scale", f"{side}_zero_point")
        codes, scale, zero_point = _values(node, *names)
        if codes.is_floating_point():
            raise _broken(node, f"its {what} factor is {_text(codes)}, not integer codes")
        if not scale.is_floating_point():
            raise _broken(node, f"the {what} scale is {_text(scale)}, not floating-point")
        if scale.shape != zero_point.shape:
            raise _broken(node, f"the {what} scale and zero point differ in shape")
        source, *grid = (behind(args(node).node(name), _LAYOUT) for name in names)
        if source.target is not torch.ops.fxquant.quantize.default:
            continue
        if grid != [behind(args(source).node(name), _LAYOUT) for name in ("scale", "zero_point")]:
            raise _broken(node, f"its {what} scale and zero point are not those that {source.name} quantized with")


def _check_affine(node: fx.Node) -> None:
    x, scale = _values(node, "x", "scale")
    try:
        shape = torch.broadcast_shapes(x.shape, scale.shape)
    except RuntimeError as error:
        raise _broken(node, f"scale {_text(scale)} does not broadcast against {_text(x)}") from error
    if tuple(shape) != tuple(x.shape):
        raise _broken(node, f"scale {_text(scale)} would change the shape of {_text(x)}")


_CHECKS: dict[str, Callable[[fx.Node], None]] = {
    "fxquant.quantize.default": _check_quantize,
    "fxquant.linear.default": _check_linear,
    "fxquant.matmul.default": _check_matmul,
    "fxquant.channel_affine.default": _check_affine,
}


def is_replayed(module: fx.GraphModule) -> bool:
    """Whether the graph holds fake tensors in place of weights, as it does while a plan is replayed."""
    return any(
        isinstance(get_tensor(module, str(node.target)), FakeTensor)
        for node in module.graph.nodes
        if node.op == "get_attr"
    )
