"""Which linears a pass of low-bit methods rewrites: by role and by name."""

from __future__ import annotations

import warnings
from collections.abc import Container
from fnmatch import fnmatchcase

from torch import fx

from fxquant.errors import ConfigurationError, QualityWarning, shortened
from fxquant.passes.assign_precision import nearest
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.linears import FloatLinear, linears_to_quantize, rounded_linears
from fxquant.planning.plan import Plan


def patterns_of(text: str) -> list[str]:
    """Name patterns joined by ``;``, as in ``*.ff.net.2;transformer_blocks.0.*``."""
    return [part for part in (each.strip() for each in text.split(";")) if part]


def targets(
    graph: fx.Graph,
    plan: Plan,
    roles: str,
    layers: str,
    decided: Container[str] = (),
    weights_only: bool = False,
    kept: Container[str] = (),
) -> list[FloatLinear]:
    """The linears with quantized weights and inputs whose role is one of ``roles`` and whose name fits ``layers``.

    Args:
        graph: A graph of the model.
        plan: The plan.
        roles: Roles joined by ``+``.
        layers: Patterns of names joined by ``;``.
        decided: Names of layers that are listed whatever the options say, because the plan decided about them.
        weights_only: Whether linears with float inputs count too, if their weight is rounded to less than 8 bits.
        kept: Names of linears that count whatever their precision.
    """
    return [
        layer
        for layer in (rounded_linears(graph, plan) if weights_only else linears_to_quantize(graph, plan, kept))
        if layer.name in decided or is_targeted(layer.name, layer.plan, roles, layers)
    ]


def is_targeted(name: str, layer: LayerPlan, roles: str, layers: str) -> bool:
    """Whether a layer has one of these roles, and a name that fits these patterns."""
    return layer.role in roles.split("+") and any(fnmatchcase(name, one) for one in patterns_of(layers))


def warn_of_none(pass_name: str, plan: Plan, roles: str, layers: str, what: str) -> None:
    """Warn that a pass changes no layer of a model although weights of layers that it names are quantized."""
    named = [
        name
        for name, layer in plan.layers.items()
        if layer.kind == "linear" and layer.weight_bits is not None and is_targeted(name, layer, roles, layers)
    ]
    if named:
        warnings.warn(f"{pass_name} changes no layer, such as {named[0]}: {what}", QualityWarning, stacklevel=3)


def check_patterns(pass_name: str, layers: str, plan: Plan) -> None:
    """Refuse patterns that fit no layer of a model.

    Raises:
        ConfigurationError: If one fits none. The message names near ones.
    """
    for pattern in patterns_of(layers):
        if not any(fnmatchcase(name, pattern) for name in plan.layers):
            raise ConfigurationError(
                f"{pass_name}: layers={shortened(pattern)!r} fits no layer of the model; {nearest(pattern, plan)}"
            )
