"""The stages that a graph goes through, and the conditions that it must meet at each.

Every stage has a specification: the ops that the graph may hold, and conditions on them. :func:`verify` checks a graph
against a specification. The pipeline calls it before and after every pass.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from fxquant.errors import ConfigurationError, DuplicateNameError, VerificationError
from fxquant.ir import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.ir.op_checks import CHECKS, broken, text_of
from fxquant.ir.places import label
from fxquant.ir.proofs import inferring, is_proven, prove
from fxquant.ir.stage_order import (
    STAGES,
    Stage,
    in_order,
    is_own,
    known_again,
    later,
    neighbours,
    place,
    remove,
    stage_named,
)
from fxquant.ir.tensors import fake_mode_of, get_tensor

__all__ = [
    "SPECS",
    "STAGES",
    "Stage",
    "StageSpec",
    "homes_of",
    "in_order",
    "is_own",
    "is_registered",
    "is_replayed",
    "later",
    "neighbours",
    "register_op",
    "register_stage",
    "stage_named",
    "unregister_stage",
    "verify",
]

_UNBACKED = re.compile(r"\bu\d+\b")

NodeCheck: TypeAlias = Callable[[fx.Node], str | None]
"""What is wrong with a node, as text that follows its name; None if nothing is."""


@dataclass(frozen=True)
class StageSpec:
    """What a graph may hold.

    Attributes:
        name: For messages.
        ops: Names of the fxquant ops that may occur.
        namespaces: Namespaces whose ops may all occur.
        registered: The latest stage of which ops of other packages may occur (:func:`register_op`); None for none.
        others: Ops of other packages, named ``namespace::name``, that may occur at this stage only.
        check: The condition that a stage of another package puts on each node.
    """

    name: str
    ops: frozenset[str] = frozenset()
    namespaces: frozenset[str] = frozenset({"aten"})
    registered: Stage | None = None
    others: frozenset[str] = frozenset()
    check: NodeCheck | None = field(default=None, compare=False)

    def allows(self, node: fx.Node) -> bool:
        """Whether the op of a ``call_function`` node may occur."""
        schema = getattr(node.target, "_schema", None)
        if schema is None:  # Python's own arithmetic on sizes, and getitem.
            return getattr(node.target, "__module__", "") in ("_operator", "operator", "math", "torch", "builtins")
        namespace, _, name = str(schema.name).partition("::")
        if self.registered is not None and _REGISTERED.get(str(schema.name), Stage.LOWERED) <= self.registered:
            return True
        if namespace in self.namespaces or str(schema.name) in self.others:
            return True
        return namespace == "fxquant" and name in self.ops


_REGISTERED: dict[str, Stage] = {}
"""Ops of other packages by qualified name, each with the earliest stage of the graphs that may hold it."""

_OP_HOMES: dict[str, str] = {}
"""The module that registered each of them."""


def register_op(stage: Stage, op: Any) -> None:
    """Let graphs hold an op of another package, from a stage on.

    The backend fake-quant runs the op's own kernel. Other backends refuse it by name, unless they lower it themselves
    and declare what they lower it to. The op needs a fake kernel (:func:`torch.library.register_fake`), which gives
    shapes, and it must not write into its arguments.

    Args:
        stage: The earliest stage of a graph that may hold the op: ``TRANSFORMED``, ``QUANTIZED``, or a stage of
            another package (:func:`register_stage`).
        op: The op, ``torch.ops.my_package.my_op``, or an overload of it. All its overloads are registered.

    Raises:
        ConfigurationError: If this is not an op, or one that graphs cannot hold.
        DuplicateNameError: If it is registered for another stage.
    """
    name = _checked_op(op)
    if not isinstance(stage, Stage) or stage in (Stage.CAPTURED, Stage.OBSERVED, Stage.LOWERED):
        raise ConfigurationError(
            f"{name}: ops can be registered for transformed and for quantized graphs and for stages of other packages, "
            f"not {stage}"
        )
    if _REGISTERED.setdefault(name, stage) is not stage:
        raise DuplicateNameError(f"op {name} is registered for {_REGISTERED[name]} graphs already")
    _OP_HOMES[name] = str(sys._getframe(1).f_globals.get("__name__", ""))


def homes_of(module: fx.GraphModule, stage: Stage) -> list[str]:
    """The modules of other packages that a process has to import before it can run passes on a graph of a stage."""
    homes = [] if is_own(stage) else [stage.home]
    names = (str(node.target._schema.name) for node in module.graph.nodes if is_registered(node.target))
    return sorted({*homes, *(_OP_HOMES[name] for name in names if name in _OP_HOMES)})


def _checked_op(op: Any) -> str:
    """The qualified name of an op of another package that a graph can hold."""
    packet = getattr(op, "overloadpacket", op)
    name = str(getattr(packet, "_qualified_op_name", ""))
    if not name or not hasattr(packet, "overloads"):
        raise ConfigurationError(f"{op!r} is not an op; give torch.ops.my_package.my_op, defined by torch.library")
    namespace = name.partition("::")[0]
    if namespace in ("aten", "fxquant", "prim", "prims"):
        raise ConfigurationError(f"{name} belongs to {namespace}; register ops of your own namespace only")
    for overload in (getattr(packet, each) for each in packet.overloads()):
        if overload._schema.is_mutable:
            raise ConfigurationError(f"{name} writes into an argument, which other nodes may read; return a new tensor")
        if not _gives_shapes(overload):
            raise ConfigurationError(
                f"{name} does not say the shape of its result; add a fake kernel: "
                f"@torch.library.register_fake({name!r})"
            )
    return name


def _gives_shapes(overload: Any) -> bool:
    """Whether fake tensors can run an op: by a fake kernel, or because it consists of ops that have one."""
    name = overload._schema.name
    entry = torch._library.simple_registry.singleton.find(name)
    keys = ("Meta", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
    return entry.fake_impl.kernel is not None or any(
        torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), key) for key in keys
    )


def is_registered(op: Any) -> bool:
    """Whether an op is one of another package that :func:`register_op` knows."""
    return str(getattr(getattr(op, "_schema", None), "name", "")) in _REGISTERED


_TRANSFORMED = frozenset({"channel_affine", "hadamard", "low_rank"})
_QUANTIZED = _TRANSFORMED | {
    *("quantize", "token_grid", "token_scale", "block_scale"),
    *("linear", "conv2d", "matmul", "dequantize_weight"),
}

SPECS: dict[Stage, StageSpec] = {
    Stage.CAPTURED: StageSpec("captured"),
    Stage.OBSERVED: StageSpec("observed", frozenset({"observe"}), registered=Stage.OBSERVED),
    Stage.TRANSFORMED: StageSpec("transformed", _TRANSFORMED, registered=Stage.TRANSFORMED),
    Stage.QUANTIZED: StageSpec("quantized", _QUANTIZED, registered=Stage.QUANTIZED),
}
"""The specification of each stage except the last. Each backend declares its own specification of the last stage."""


def register_stage(
    name: str,
    *,
    after: Stage | str,
    before: Stage | str | None = None,
    ops: Iterable[Any] = (),
    check: NodeCheck | None = None,
) -> Stage:
    """Add a stage of another package, for passes to name in ``requires`` and ``establishes``.

    A graph of the stage may hold what a graph of the stage ``after`` may hold, and ``ops``. The pipeline orders passes
    by it, and verifies graphs of the stage. To let graphs hold an op from this stage on, later ones included, give it
    to :func:`register_op` instead. Keep the stage in a variable of a module; an entry point of the group
    ``fxquant.stages`` with the name of the stage makes it known when the package is installed.

    Args:
        name: Small letters and digits, joined by hyphens.
        after: The stage before, or its name.
        before: The stage afterwards, or its name; by default the next stage of fxquant itself.
        ops: Ops of the package that only graphs of this stage may hold, as for :func:`register_op`.
        check: Called with each node of a graph of this stage; returns what is wrong with it, or None.

    Returns:
        The stage. Registering it again in the same way, as a cell of a notebook that runs twice does, returns the same.

    Raises:
        ConfigurationError: If the name cannot be read, the stage cannot be at this place, or an op cannot be held.
        UnknownNameError: If a neighbour is not registered; the message lists the stages.
        DuplicateNameError: If another stage has the name.
    """
    home = str(sys._getframe(1).f_globals.get("__name__", ""))
    if check is not None and not callable(check):
        raise ConfigurationError(f"stage {name}: check should be a function of a node, not {check!r}")
    only_here = frozenset(_checked_op(op) for op in ops)
    known = known_again(name, home, after, before)
    if known is not None and _same_rules(SPECS[known], only_here, check):
        return known
    stage = place(name, home, after, before)
    start = SPECS[neighbours(stage)[0]]
    SPECS[stage] = StageSpec(name, start.ops, start.namespaces, stage, start.others | only_here, check)
    return stage


def _same_rules(spec: StageSpec, only_here: frozenset[str], check: NodeCheck | None) -> bool:
    start = SPECS[neighbours(stage_named(spec.name))[0]]
    paths = [getattr(each, "__qualname__", None) for each in (spec.check, check)]
    return spec.others == start.others | only_here and paths[0] == paths[1]


def unregister_stage(stage: Stage) -> None:
    """Forget a stage of another package. Passes that name it, and dumps of its graphs, cannot be used any more.

    Raises:
        ConfigurationError: If the stage belongs to fxquant, is not registered, or another stage or an op needs it.
    """
    for op, needed in _REGISTERED.items():
        if needed is stage:
            raise ConfigurationError(f"the op {op} is registered for {stage} graphs; keep the stage")
    remove(stage)
    del SPECS[stage]


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
    with inferring(fake_mode_of(module.graph)):
        for node in module.graph.nodes:
            if node.op == "call_function":
                if not spec.allows(node):
                    raise broken(node, f"op {node.target} does not belong in a graph of stage {spec.name!r}")
                if spec in SPECS.values() and getattr(getattr(node.target, "_schema", None), "is_mutable", False):
                    raise broken(node, f"op {node.target} writes into its input, which other nodes may read")
                _check_value(node)
                check = CHECKS.get(str(node.target))
                if check is not None:
                    check(node)
            elif node.op not in ("placeholder", "output", "get_attr"):
                raise broken(node, f"a {node.op} node does not belong in any stage")
            if spec.check is not None and (wrong := _checked_by_others(spec, node)) is not None:
                raise broken(node, f"{wrong}, in a graph of stage {spec.name!r}")


def _checked_by_others(spec: StageSpec, node: fx.Node) -> str | None:
    assert spec.check is not None
    try:
        return spec.check(node)
    except Exception as error:
        raise VerificationError(
            f"the check of stage {spec.name!r} failed at {label(node)}: {type(error).__name__}: {error}"
        ) from error


def _check_tensor(module: fx.GraphModule, node: fx.Node) -> None:
    value = node.meta.get("val")
    try:
        held = get_tensor(module, str(node.target))
    except AttributeError:
        raise broken(node, f"there is no tensor {node.target!r}") from None
    if value is None or tuple(value.shape) != tuple(held.shape) or value.dtype != held.dtype:
        raise broken(node, f"{node.target} is {text_of(held)}, but recorded as {text_of(value)}")


def _check_value(node: fx.Node) -> None:
    recorded = node.meta.get("val")
    if recorded is None and node.users:
        raise broken(node, "its shape and dtype are not recorded")
    if is_proven(node):
        return
    values, named = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    try:
        actual = node.target(*values, **named)  # type: ignore[operator]
    except Exception as error:
        raise broken(node, f"its arguments do not fit: {error}") from error
    # Sizes that depend on values (u0) get a new name each time they are computed.
    same = _UNBACKED.sub("u", text_of(actual)) == _UNBACKED.sub("u", text_of(recorded))
    if isinstance(recorded, (Tensor, list, tuple, int, float, torch.SymInt)) and not same:
        raise broken(node, f"it yields {text_of(actual)}, but is recorded as {text_of(recorded)}")
    prove(node)


def is_replayed(module: fx.GraphModule) -> bool:
    """Whether the graph holds fake tensors in place of weights, as it does while a plan is replayed."""
    return any(
        isinstance(get_tensor(module, str(node.target)), FakeTensor)
        for node in module.graph.nodes
        if node.op == "get_attr"
    )
