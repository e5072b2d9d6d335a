"""What formats of other tools cannot hold, by layer, with the recipe that would fit; and their packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from fxquant.errors import CheckpointError, ConfigurationError, MissingPackageError
from fxquant.ir import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.ir.arguments import args
from fxquant.ir.meta import LAYER
from fxquant.numerics.formats import is_integer

_SHOWN = 5
_AT_RUN_TIME = (
    torch.ops.fxquant.token_grid.default,
    torch.ops.fxquant.token_scale.default,
    torch.ops.fxquant.block_scale.default,
)
"""Ops that find scales when the model runs."""


def require(*packages: str, extra: str = "export") -> None:
    """Check that packages are installed.

    Raises:
        MissingPackageError: Names the first that is not, and says how to install it.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise MissingPackageError(f"{name} is not installed: pip install 'fxquant[{extra}]'")


def refuse_full(folder: Path) -> None:
    """Refuse a folder that exists and is not empty.

    Raises:
        CheckpointError: Names it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; choose another folder")


def refuse_fused(model: nn.Module) -> None:
    """Refuse a model whose attention holds fused projections beside the separate ones.

    Raises:
        ConfigurationError: Names the module, and says how to separate them.
    """
    fused = next((name for name, part in model.named_modules() if getattr(part, "fused_projections", False)), None)
    if fused is not None:
        raise ConfigurationError(
            f"{fused!r} holds fused projections beside the separate ones, and only the fused ones would be changed; "
            "call unfuse_qkv_projections() first"
        )


def refuse(format_name: str, reasons: Mapping[str, Sequence[str]], advice: str) -> None:
    """Refuse a format if there are layers that it cannot hold.

    Args:
        format_name: Name of the format.
        reasons: Layers by the reason why the format cannot hold them.
        advice: What to do instead.

    Raises:
        ConfigurationError: Lists the layers by reason.
    """
    if not reasons:
        return
    lines = []
    for reason, names in reasons.items():
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        lines.append(f"  {reason}: {shown}")
    listed = "\n".join(lines)
    raise ConfigurationError(f"{format_name} cannot hold this model:\n{listed}\n{advice}")


def ranges_of_graphs(graphs: Sequence[fx.Graph]) -> dict[str, list[str]]:
    """The layers whose input has no single static range, by reason."""
    found: dict[str, list[str]] = {}
    for graph in graphs:
        for node in graph.nodes:
            if node.target is not torch.ops.fxquant.quantize.default:
                continue
            scale = args(node).node("scale")
            if scale.op == "get_attr":
                continue
            dynamic = any(one.target in _AT_RUN_TIME for one in _producers(scale))
            reason = "each token has a range of its own" if dynamic else "the range depends on the timestep"
            own = found.setdefault(reason, [])
            own += [name for name in _readers(node) if name not in own]
    return found


def format_of_weight(node: fx.Node) -> str:
    """The number format of the weight of a quantized op."""
    stored = node.target is torch.ops.fxquant.dequantize_weight.default
    return str(args(node).format if stored else args(node).w_format)


def formats_of_graphs(graphs: Sequence[fx.Graph]) -> dict[str, list[str]]:
    """The layers whose weight or input is not in integers, or whose output channels share scales, by reason."""
    ops = torch.ops.fxquant
    found: dict[str, list[str]] = {}
    for graph in graphs:
        for node in graph.nodes:
            given, reasons, names = args(node), [], [str(node.meta.get(LAYER, node.name))]
            if node.target is ops.quantize.default and not is_integer(given.format):
                reasons.append(f"its input has the format {given.format}")
                names = _readers(node)
            elif node.target in (ops.linear.default, ops.conv2d.default, ops.dequantize_weight.default):
                format = format_of_weight(node)
                scale = given.node("scale" if node.target is ops.dequantize_weight.default else "w_scale")
                if not is_integer(format):
                    reasons.append(f"its weight has the format {format}")
                elif scale.meta["val"].shape[0] != given.node("wq").meta["val"].shape[0]:
                    reasons.append("several output channels of its weight share a scale")
            for reason in reasons:
                own = found.setdefault(reason, [])
                own += [name for name in names if name not in own]
    return found


def doubles_of_graphs(graphs: Sequence[fx.Graph]) -> dict[str, list[str]]:
    """The layers that compute in float64, by reason."""
    layers = [
        str(node.meta[LAYER])
        for graph in graphs
        for node in graph.nodes
        if LAYER in node.meta and isinstance(value := node.meta.get("val"), Tensor) and value.dtype is torch.float64
    ]
    return {"it computes in float64": list(dict.fromkeys(layers))} if layers else {}


def _readers(codes: fx.Node) -> list[str]:
    """The layers that read the codes of a value; the name of the node if no layer does."""
    return [str(user.meta[LAYER]) for user in codes.users if LAYER in user.meta] or [codes.name]


def _producers(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    left = [node]
    while left:
        one = left.pop()
        if one.target in _AT_RUN_TIME:
            return [one]
        if one not in found and len(found) < 50:
            found.append(one)
            left += one.all_input_nodes
    return found
