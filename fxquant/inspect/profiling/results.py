"""The results of a profile: rows, sums and warnings, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import fx

from fxquant.inspect.profiling.kinds import KINDS, kind_of
from fxquant.inspect.profiling.roofline import Roofline
from fxquant.inspect.profiling.timing import Times, total
from fxquant.ir.names import qualified_name
from fxquant.text import name_of_all, pattern_of

FLOAT, QUANTIZED = "float", "quantized"
SLOWER = 1.05
"""A layer is slower above this multiple of its float time, if the middle halves of the rounds do not overlap either."""


@dataclass(frozen=True)
class NodeTime:
    """One op of one graph.

    Attributes:
        graph: ``float`` or ``quantized``.
        name: Name of the node.
        op: The op that it calls.
        kind: Kind of its work; see :func:`fxquant.inspect.profiling.kinds.kind_of`.
        layer: Layer, or path of the module, that it is counted with.
        times: Times of its calls.
    """

    graph: str
    name: str
    op: str
    kind: str
    layer: str
    times: Times

    @classmethod
    def of(cls, graph: str, node: fx.Node, layer: str, times: Times) -> NodeTime:
        """The entry of a node."""
        return cls(graph, node.name, qualified_name(node.target), kind_of(node), layer, times)


@dataclass(frozen=True)
class Row:
    """A layer, or the work of one kind in one module, or several of these that differ only in their block.

    Attributes:
        layers: Layers that run in one kernel, or one layer or module path. Of similar blocks, those of the first block.
        is_layer: Whether these are layers of the plan.
        kind: Kind of the work.
        precision: For example ``w8a8`` or ``float``; empty for rows that are not layers.
        kernel: What the backend runs, or empty.
        falls_back: Whether the kernel is a fallback.
        floating: Time of the float model; None if the float model does not do this work, or was not run.
        quantized: Time of the quantized model, including quantization of the layer's input; None if it does not do this
            work any more.
        operations: Operations of its matrix products, two per multiply-add.
        traffic: Bytes that these products read and write in the quantized model.
        count: Number of similar blocks that this row combines.
        alike: The first of the layers in each of these blocks.
    """

    layers: tuple[str, ...]
    is_layer: bool
    kind: str
    precision: str
    kernel: str
    falls_back: bool
    floating: Times | None
    quantized: Times | None
    operations: int
    traffic: int
    count: int = 1
    alike: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``blocks.0-7.attn.to_q``, or ``blocks.0-7.attn.to_q+to_k`` for layers that run in one kernel."""
        first = name_of_all([f"{name}." for name in self.alike or self.layers[:1]]).removesuffix(".")
        parent = self.layers[0].rpartition(".")[0]
        if all(layer.rpartition(".")[0] == parent for layer in self.layers):
            return "+".join([first, *(layer.rpartition(".")[2] for layer in self.layers[1:])]) or "(model)"
        return " + ".join([first, *self.layers[1:]])

    @property
    def is_quantized(self) -> bool:
        """Whether weights or activations have fewer bits than in float."""
        return self.precision not in ("", "float")

    @property
    def is_integer(self) -> bool:
        """Whether its matrix products are meant to be integer products."""
        return self.is_quantized and "a16" not in self.precision

    @property
    def speedup(self) -> float | None:
        """Float time divided by quantized time, or None if one of them is missing."""
        if self.floating is None or self.quantized is None or not self.quantized.median:
            return None
        return self.floating.median / self.quantized.median

    @property
    def rate(self) -> float | None:
        """Billions of operations per second in the quantized model, or None for rows without matrix products."""
        if not self.operations or self.quantized is None or not self.quantized.median:
            return None
        return self.operations / self.quantized.median * 1e-6

    @property
    def is_slower(self) -> bool:
        """Whether the quantized layer is slower than the float one by more than noise; see :data:`SLOWER`."""
        if not self.is_quantized or self.floating is None or self.quantized is None:
            return False
        apart = self.quantized.quartiles[0] > self.floating.quartiles[1]
        return apart and self.quantized.median > SLOWER * self.floating.median

    def share_of_peak(self, roofline: Roofline) -> float | None:
        """The rate divided by the peak; also None for attention, whose kernels choose the dtype of their products."""
        if self.rate is None or self.kind == "attention":
            return None
        return self.rate / roofline.peak(self.is_integer)

    def bound(self, roofline: Roofline) -> str | None:
        """What limits its speed, ``compute`` or ``memory``; None if :meth:`share_of_peak` is None."""
        if self.share_of_peak(roofline) is None:
            return None
        return roofline.bound(self.operations, self.traffic, self.is_integer)

    def to_json(self, roofline: Roofline) -> dict[str, Any]:
        """The row as JSON values."""
        return {
            "name": self.name,
            "layers": list(self.layers),
            "kind": self.kind,
            "precision": self.precision,
            "kernel": self.kernel,
            "falls_back": self.falls_back,
            "is_slower": self.is_slower,
            "float": None if self.floating is None else self.floating.to_json(),
            "quantized": None if self.quantized is None else self.quantized.to_json(),
            "speedup": self.speedup,
            "gops": self.rate,
            "share_of_peak": self.share_of_peak(roofline),
            "bound": self.bound(roofline),
        }


@dataclass(frozen=True)
class Profile:
    """How a quantized model spends its time; prints as a table.

    Attributes:
        model_class: Class of the original model.
        backend: Name of the backend.
        device: The device that it ran on.
        batch: Samples per call.
        roofline: The peaks of the machine.
        calls: Times of whole calls: ``quantized``, ``float``, and if requested ``quantized, compiled`` and so on.
        rows: One row per layer, and one for other work of each kind in each module, in the order of the graph.
        nodes: Every op of both graphs.
    """

    model_class: str
    backend: str
    device: str
    batch: int
    roofline: Roofline
    calls: Mapping[str, Times]
    rows: tuple[Row, ...]
    nodes: tuple[NodeTime, ...]

    @property
    def kinds(self) -> dict[str, dict[str, Times]]:
        """Time of each kind of op in each graph, by kind and graph, in the order of the kinds."""
        found: dict[str, dict[str, Times]] = {}
        for kind in KINDS:
            for graph in (FLOAT, QUANTIZED):
                times = [node.times for node in self.nodes if (node.graph, node.kind) == (graph, kind)]
                if times:
                    found.setdefault(kind, {})[graph] = total(times)
        return found

    def summed(self, graph: str) -> Times | None:
        """Time of all ops of a graph, or None if it was not run."""
        times = [node.times for node in self.nodes if node.graph == graph]
        return total(times) if times else None

    def merged(self) -> list[Row]:
        """The rows, slowest first. Rows that differ only in the number of their block are combined into one."""
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            names = tuple(pattern_of(f"{name}.") for name in row.layers)
            groups.setdefault((names, row.is_layer, row.kind, row.precision, row.kernel), []).append(row)
        return heaviest(_merge(group) for group in groups.values())

    @property
    def warnings(self) -> list[str]:
        """What a user should know: layers slower than in float, fallbacks, and a model slower than in float."""
        return list(_warnings(self))

    def to_json(self) -> dict[str, Any]:
        """The profile as JSON values, times in milliseconds."""
        sums = {graph: self.summed(graph) for graph in (FLOAT, QUANTIZED)}
        return {
            "model_class": self.model_class,
            "backend": self.backend,
            "device": self.device,
            "batch": self.batch,
            "roofline": asdict(self.roofline),
            "calls": {name: times.to_json() for name, times in self.calls.items()},
            "sums": {graph: times.to_json() for graph, times in sums.items() if times is not None},
            "kinds": {
                kind: {graph: times.to_json() for graph, times in graphs.items()} for kind, graphs in self.kinds.items()
            },
            "rows": [row.to_json(self.roofline) for row in self.rows],
            "warnings": self.warnings,
            "nodes": [
                {"graph": node.graph, "name": node.name, "op": node.op, "kind": node.kind, "layer": node.layer}
                | node.times.to_json()
                for node in self.nodes
            ],
        }

    def table(self, *, top: int | None = 20, every: bool = False) -> str:
        """The profile as text of at most 140 columns.

        Args:
            top: Number of rows to show, slowest first; None for all.
            every: Show one row per layer. Otherwise similar blocks share a row.
        """
        from fxquant.inspect.profiling.table import profile_table

        return profile_table(self, top, every)

    def __str__(self) -> str:
        return self.table()


def heaviest(rows: Iterator[Row] | Sequence[Row]) -> list[Row]:
    """Sort rows by their time in the quantized model, slowest first."""
    return sorted(rows, key=lambda row: tuple(-_median(times) for times in (row.quantized, row.floating)))


def _median(times: Times | None) -> float:
    return 0.0 if times is None else times.median


def _merge(group: Sequence[Row]) -> Row:
    def summed(times: Sequence[Times | None]) -> Times | None:
        known = [entry for entry in times if entry is not None]
        return total(known) if known else None

    return replace(
        group[0],
        floating=summed([row.floating for row in group]),
        quantized=summed([row.quantized for row in group]),
        operations=sum(row.operations for row in group),
        traffic=sum(row.traffic for row in group),
        count=len(group),
        alike=tuple(row.layers[0] for row in group),
    )


def _warnings(profile: Profile) -> Iterator[str]:
    merged = profile.merged()
    if slow := [_compared(row) for row in merged if row.is_slower]:
        yield (
            f"slower than in float: {_some(slow, 8)}. Keep such layers float "
            "(assign-precision{overrides=LAYER=float}), or use another backend; a larger batch may help too"
        )
    fallbacks: dict[str, list[Row]] = {}
    for row in merged:
        if row.falls_back:
            fallbacks.setdefault(row.kernel, []).append(row)
    for kernel, rows in fallbacks.items():
        count = sum(row.count * len(row.layers) for row in rows)
        names = _some([row.name for row in rows], 3)
        what = "attention" if rows[0].kind == "attention" else "layer"
        runs = f"{what} runs" if count == 1 else f"{what}s run"
        yield f"{count} {runs} a fallback of backend {profile.backend!r}, {kernel}: {names}"
    for end in ("", ", compiled"):
        own, base = profile.calls.get(QUANTIZED + end), profile.calls.get(FLOAT + end)
        if own is not None and base is not None and own.median > base.median:
            yield f"the model{end} is slower than in float: {own.median:.3g} ms a call, float {base.median:.3g} ms"


def _compared(row: Row) -> str:
    return f"{row.name} {_median(row.quantized):.3g} ms (float {_median(row.floating):.3g})"


def _some(items: Sequence[str], count: int) -> str:
    more = len(items) - count
    return ", ".join(items[:count]) + (f" and {more} more" if more > 0 else "")
