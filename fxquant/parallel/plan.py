"""The plan of a tensor-parallel model: how each quantized linear is divided, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fxquant.errors import ConfigurationError, check_type
from fxquant.parallel.linears import read_by_others
from fxquant.parallel.styles import Style, Styles, styles_of
from fxquant.planning.plan import Plan
from fxquant.runtime.given import quantized_model
from fxquant.text import fitted

KINDS = {"column": "column-wise", "row": "row-wise", "whole": "replicated"}


@dataclass(frozen=True)
class LayerStyle:
    """How one quantized layer is divided between ranks.

    Attributes:
        style: ``"column-wise"``: each rank computes its output channels. ``"row-wise"``: each rank reads its input
            channels, and the results are summed. ``"replicated"``: each rank computes all of it.
        gathered: Whether the output of a column-wise layer is gathered, so that all ranks have all channels.
        runs: Sizes of the runs of channels of which each rank holds an equal share, such as ``(3072, 12288)`` for a
            layer that reads attention and feed-forward side by side. Empty for a replicated layer.
        why: The reason.
    """

    style: str
    gathered: bool
    runs: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class TensorParallelPlan:
    """How the quantized layers of a model are divided between ranks; prints as a table.

    Attributes:
        size: Number of ranks.
        layers: The style of each quantized layer, by name.
    """

    size: int
    layers: dict[str, LayerStyle]
    _held: dict[str, Style] = field(repr=False, compare=False, default_factory=dict)  # By name of the weight.
    _shared: frozenset[str] = field(repr=False, compare=False, default=frozenset())

    def __getitem__(self, layer: str) -> LayerStyle:
        if layer not in self.layers:
            raise ConfigurationError(f"the plan has no quantized layer {layer!r}; its layers: {', '.join(self.layers)}")
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __str__(self) -> str:
        rows: list[list[Any]] = [
            [name, f"{layer.style}, gathered" if layer.gathered else layer.style, layer.why]
            for name, layer in self.layers.items()
        ]
        return f"tensor-parallel on {self.size} ranks\n" + fitted(["layer", "style", "why"], rows, {2: 60})


def tensor_parallel_plan(model: nn.Module, size: int) -> TensorParallelPlan:
    """How the quantized layers of a model are divided between ranks, as :func:`parallelize` does.

    A layer is row-wise if the graph shows that its input channels come from layers that can be column-wise, channel by
    channel or head by head. All other layers are column-wise with a gathered output, or replicated if nothing divides
    them evenly.

    Args:
        model: A quantized model.
        size: Number of ranks, at least 2.

    Raises:
        ConfigurationError: If the model is not quantized, or the size is not such a number.
    """
    quantized, plan = quantized_model(model, "tensor_parallel_plan")
    check_size(size)
    if quantized.parallel is not None:
        return quantized.parallel.plan
    return plan_of([captured.module.graph for captured in quantized.captured], plan, size)[0]


def plan_of(graphs: Sequence[fx.Graph], plan: Plan, size: int) -> tuple[TensorParallelPlan, list[Styles]]:
    """The plan of graphs that share their tensors, and the styles of each graph."""
    shared = frozenset(read_by_others(graphs))
    held: dict[str, Style] = {}
    every: list[Styles] = []
    layers: dict[str, LayerStyle] = {}
    for graph in graphs:
        styles = styles_of(graph, size, held, shared)
        every.append(styles)
        held |= styles.styles
        for node, linear in styles.linears.items():
            if linear.is_quantized:
                style = styles.styles[linear.weight]
                gathered = style.kind == "column" and node not in styles.ways
                layers.setdefault(linear.name, LayerStyle(KINDS[style.kind], gathered, style.runs, style.why))
    for name, layer in plan.layers.items():
        if layer.weight_bits is not None and name not in layers:
            layers[name] = LayerStyle("replicated", False, (), f"not a linear: {layer.kind}")
    return TensorParallelPlan(size, layers, held, shared), every


def check_size(size: object) -> None:
    """Refuse a number of ranks that divides nothing.

    Raises:
        ConfigurationError: If it is not a number of at least 2.
    """
    check_type("size", size, int, "the number of ranks")
    if size < 2:  # type: ignore[operator]
        raise ConfigurationError(f"size is {size}; tensor parallelism needs at least 2 ranks")
