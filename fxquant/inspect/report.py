"""The report: what was decided for every layer, what it costs and how it changes the output.

Everything comes from the plan, so a report needs no weights and is the same for a model, its plan and its checkpoint.
There is one exception: only a model shows which attentions its backend left unchanged. Table and JSON are two views of
the same :class:`Report`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from fxquant.errors import ConfigurationError, UnknownNameError
from fxquant.inspect.adapters import AdapterReport, adapter_rows, adapter_table, branches_of
from fxquant.inspect.decisions import decision_rows, decision_tables
from fxquant.inspect.plans import plan_of
from fxquant.inspect.rows import COSTS, AttentionReport, DecisionReport, LayerReport, PassReport, Totals
from fxquant.inspect.sizes import dtype_of_plan, weight_bytes
from fxquant.inspect.tables import attention_bits, layer_row, reasons, sections, span_of
from fxquant.pipeline.backend import Backend, resolve_backend
from fxquant.planning.attribution import Attribution
from fxquant.planning.branches import branch_bytes
from fxquant.planning.decisions import AttentionPlan, LayerPlan
from fxquant.planning.plan import Plan
from fxquant.runtime.devices import usable_device
from fxquant.runtime.wrappers import unwrapped
from fxquant.text import (
    decimal,
    fitted,
    json_values,
    letter,
    name_of_all,
    pattern_of,
    size,
    without_numbers,
)

_LEFT = {
    "fxquant.matmul.default": "fxquant::matmul (reference)",
    "aten.scaled_dot_product_attention.default": "aten float",
}


@dataclass(frozen=True)
class Report:
    """What fxquant did to a model; prints as a table.

    Attributes:
        model_class: Class of the original model.
        recipe: The recipe as pipeline text.
        backend: Name of the backend.
        timesteps: The calibrated timesteps; none for a model without a timestep.
        fixed: For each kind of call whose graph serves only one batch size, or one value of a mask: the reason.
        totals: The model as a whole.
        output_sqnr_db: Output SQNR against float by timestep in dB, the noisiest timestep first; under 0 for a model
            without a timestep.
        layers: One row per layer, in the order of the graph.
        passes: The pass log.
        attentions: One row per attention, in the order of the graph.
        products: For each matrix product or convolution that is neither a layer nor part of an attention: the reason
            why it stays float, by the path of its module, its op and its line.
        decisions: What passes decided that has no field above (:mod:`fxquant.planning.pass_decisions`).
        attribution: Where the output error comes from, if :func:`fxquant.attribute` measured it.
        adapters: The LoRAs of a model or a checkpoint. Sizes, errors and ranges above are those without them.
    """

    model_class: str
    recipe: str
    backend: str
    timesteps: tuple[float, ...]
    fixed: tuple[str, ...]
    totals: Totals
    output_sqnr_db: Mapping[float, float]
    layers: tuple[LayerReport, ...]
    passes: tuple[PassReport, ...]
    attentions: tuple[AttentionReport, ...] = ()
    products: Mapping[str, str] = field(default_factory=dict)
    decisions: tuple[DecisionReport, ...] = ()
    attribution: Attribution | None = None
    adapters: tuple[AdapterReport, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values. Numbers that are not finite, such as the SQNR of a lossless layer, are strings."""
        data = asdict(replace(self, attribution=None))
        if self.attribution is not None:
            data["attribution"] = {**self.attribution.to_json(), "worst": self.attribution.rows()}
        data["output_sqnr_db"] = [[step, db] for step, db in self.output_sqnr_db.items()]
        for optional in ("decisions", "attribution", "adapters"):
            if not data[optional]:
                del data[optional]
        values = json_values(data)
        assert isinstance(values, dict)
        return values

    def table(self, *, every: bool = False) -> str:
        """The report as text of at most 140 columns.

        Layers that differ only in the number of their block and in measured values share a row. The row shows the range
        of the values. It is listed below the numbers of the blocks.

        Args:
            every: Show one row per layer instead.
        """
        parts = [self.summary(), self._layer_table(every)]
        balanced = [(layer.name, layer.reason) for layer in self.layers]
        if text := reasons("channels left alone, and why", balanced):
            parts.append(text)
        kept = [(layer.name, layer.float_because) for layer in self.layers]
        if text := reasons("layers and matrix products in float, and why", [*kept, *self.products.items()]):
            parts.append(text)
        if text := reasons("timesteps in one group, and why", [(one.name, one.one_bin_because) for one in self.layers]):
            parts.append(text)
        if self.attentions:
            parts.append(self._attention_table(every))
        parts += decision_tables(self.decisions, every)
        if self.adapters:
            parts.append(adapter_table(self.adapters))
        if self.output_sqnr_db and self.timesteps:
            parts.append(self._output_table())
        if self.attribution is not None:
            parts.append(f"where the output error comes from\n{self.attribution.table()}")
        if self.passes:
            parts.append(self._pass_table())
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.table()

    def summary(self) -> str:
        """The totals as a few lines of text."""
        totals = self.totals
        lines = [("model", f"{self.model_class.rpartition(':')[2]} on {self.backend}")]
        if totals.ratio is not None:
            before, after = map(size, (totals.bytes_before, totals.bytes_after))
            lines.append(("size", f"{before} -> {after}, {totals.ratio:.2f} times smaller"))
        mean, low, said = totals.mean_sqnr_db, totals.worst_sqnr_db, "not measured"
        if mean is not None and low is not None:
            said = f"mean {mean:.1f} dB"
            if totals.worst_timestep is not None:
                said += f", worst {low:.1f} dB at timestep {totals.worst_timestep:g}"
        lines.append(("output SQNR", said))
        worst = None if self.attribution is None else self.attribution.worst_cell()
        if worst is not None:
            lines.append(("worst layer", worst[0] + (f" at timestep {worst[1]:g}" if self.timesteps else "")))
        lines.append(("layers", ", ".join(f"{count} {name}" for name, count in totals.layers_by_precision.items())))
        targets = sum(totals.balance_by_cost.values())
        if targets:
            shown = [f"{count} {cost}" for cost, count in totals.balance_by_cost.items() if count]
            absorbed = targets - totals.balance_by_cost["not"]
            lines.append(("balanced", f"{absorbed} of {targets} layers: {', '.join(shown)}"))
        if self.adapters:
            active = ", ".join(adapter.name for adapter in self.adapters if adapter.active) or "none"
            lines.append(("LoRAs", f"{len(self.adapters)} loaded, {active} active"))
        if self.timesteps:
            span = f", {min(self.timesteps):g} to {max(self.timesteps):g}" if len(self.timesteps) > 1 else ""
            lines.append(("calibrated", f"{len(self.timesteps)} timesteps{span}"))
        lines += [("batch size", f"fixed, other calls get graphs of their own: {why}") for why in self.fixed]
        return "\n".join(f"{title:<12} {text}" for title, text in lines)

    def _layer_table(self, every: bool) -> str:
        kernels = Counter(layer.kernel for layer in self.layers)
        letters = {kernel: letter(number) for number, kernel in enumerate(kernels)}
        header = ["layer", "role", "bits", "size", "kernel", "balance", "range", "max|x|", "W dB", "x dB"]
        rows = []
        for title, groups in sections(self.layers, every):
            indent = ""
            if title:
                rows.append([title] + [""] * (len(header) - 1))
                indent = "  "
            rows += [layer_row(indent, group, letters) for group in groups]
        if not rows:
            return "no layers"
        legend = [[letters[kernel], kernel, f"{count} layers"] for kernel, count in kernels.items()]
        legend_text = tabulate(legend, ["kernel", "", ""], tablefmt="simple", disable_numparse=True)
        return fitted(header, rows, {0: 46, 5: 34}, right=(3,)) + "\n\n" + legend_text

    def _attention_table(self, every: bool) -> str:
        groups: dict[tuple[Any, ...], list[AttentionReport]] = {}
        for entry in self.attentions:
            bits = entry.bits, entry.softmax_bits
            alike = (pattern_of(entry.name), entry.kernel, *bits, without_numbers(entry.reason))
            groups.setdefault((entry.name,) if every else alike, []).append(entry)
        rows = []
        for group in groups.values():
            first = group[0]
            name = name_of_all([entry.name for entry in group])
            row = [name, attention_bits(first.bits, first.softmax_bits), first.kernel]
            for side in ("q", "k", "v"):
                ends = [entry.ranges[side] for entry in group if side in entry.ranges]
                row.append(f"{min(low for low, _ in ends):.3g}..{max(high for _, high in ends):.3g}" if ends else "")
            row += [span_of(entry.sqnr_db.get(side) for entry in group) for side in ("q", "k", "v")]
            rows.append([*row, first.reason or ""])
        header = ["attention", "bits", "kernel", "q", "k", "v", "q dB", "k dB", "v dB", "float because"]
        return fitted(header, rows, {0: 40, 9: 56})

    def _output_table(self) -> str:
        values = list(self.output_sqnr_db.items())
        width = 12
        lines = []
        for start in range(0, len(values), width):
            part = values[start : start + width]
            lines.append("timestep " + "".join(f"{step:>8g}" for step, _ in part))
            lines.append("SQNR dB  " + "".join(f"{decimal(db):>8}" for _, db in part))
        return "output SQNR against float\n" + "\n".join(lines)

    def _pass_table(self) -> str:
        rows = [
            [entry.text, entry.edits, f"{entry.seconds:.2f}", " ".join(f"{op}:{n:+d}" for op, n in entry.ops.items())]
            for entry in self.passes
        ]
        return fitted(["pass", "edits", "seconds", "change in ops"], rows, {0: 60, 3: 58}, right=(1, 2))


def report(model: nn.Module | Plan | str | Path, *, device: str | torch.device | None = None) -> Report:
    """Report what fxquant did to a model, layer by layer.

    Args:
        model: What ``fxquant.compile`` or ``fxquant.load`` returned, a plan, or the folder of a checkpoint or of a
            pipeline with one. No weights are read.
        device: For a plan or a folder: the device to run on, which decides the kernels. The CPU by default.

    Raises:
        ConfigurationError: If the model is not quantized, or a device is given for a model, which has its own.
        BackendError: If the backend does not run on that device.
        CheckpointError: If the folder holds no checkpoint, or a damaged one.
    """
    plan = plan_of(model)
    backend, left = _backend_of(model, plan, device), _attentions_left(model)
    dtype = dtype_of_plan(plan)
    layers = tuple(
        _layer_report(name, layer, backend, dtype, branch_bytes(plan, name, dtype))
        for name, layer in plan.layers.items()
    )
    return Report(
        model_class=plan.model_class,
        recipe=plan.recipe,
        backend=plan.backend,
        timesteps=() if plan.timestep is None else tuple(plan.timesteps),
        fixed=tuple(dict.fromkeys(call.fixed for call in plan.calls if call.fixed is not None)),
        totals=_totals(plan, layers),
        output_sqnr_db=dict(plan.output_sqnr_db),
        layers=layers,
        passes=tuple(
            PassReport(entry["pass"], entry["seconds"], entry["edits"], dict(entry["ops"])) for entry in plan.passes
        ),
        attentions=tuple(
            _attention_report(name, entry, backend, left.get(name.partition("@")[0]))
            for name, entry in plan.attentions.items()
        ),
        products=dict(plan.products),
        decisions=decision_rows(plan.pass_decisions),
        attribution=plan.attribution,
        adapters=adapter_rows(branches_of(model)),
    )


def _backend_of(model: object, plan: Plan, device: str | torch.device | None) -> Backend | None:
    backend = getattr(unwrapped(model), "backend", None)
    if isinstance(backend, Backend):  # It has the options that it was made with.
        if device is not None:
            raise ConfigurationError("a model has its device already; give a device only for a plan or a folder")
        return backend
    try:
        found = resolve_backend(plan.backend)
    except UnknownNameError:  # A plan can be read where its backend is not installed.
        return None
    if device is None:
        return found
    place = usable_device(device)
    found.check_device(place)
    return found.on(place)


def _layer_report(name: str, layer: LayerPlan, backend: Backend | None, dtype: torch.dtype, branch: int) -> LayerReport:
    balance, activation = layer.balance, layer.activation
    before, after = weight_bytes(layer, dtype)
    after += branch
    return LayerReport(
        name=name,
        kind=layer.kind,
        role=layer.role,
        kernel="?" if backend is None else backend.kernel(layer),
        precision=str(layer.precision),
        weight_bits=layer.weight_bits,
        activation_bits=layer.activation_bits,
        group_size=layer.group_size,
        shape=(layer.shape[0], layer.shape[1]),
        cost=balance.cost if balance else None,
        absorbed_into=tuple(balance.into) if balance else (),
        balanced_channels=balance.channels if balance else 0,
        reason=balance.reason if balance else None,
        shift_cost=layer.shift.cost if layer.shift else None,
        timestep_bins=len(layer.boundaries) + 1,
        activation_low=min(activation.ends[0]) if activation else None,
        activation_high=max(activation.ends[1]) if activation else None,
        spread=(layer.spread[0], layer.spread[1]) if layer.spread else None,
        weight_sqnr_db=layer.weight_sqnr_db,
        activation_sqnr_db=layer.activation_sqnr_db,
        float_because=layer.reason if layer.weight_bits is None else None,
        bytes_before=before,
        bytes_after=after,
        one_bin_because=layer.timesteps.reason if layer.timesteps else None,
    )


def _attentions_left(model: object) -> dict[str, str]:
    """What runs the attentions that a backend left unchanged, by the path of their module.

    A plan does not show this: backends find attentions by patterns, and an unusual mask may prevent a match.
    """
    found: dict[str, str] = {}
    for graph in getattr(unwrapped(model), "graphs", ()):
        for node in graph.graph.nodes:
            kernel = _LEFT.get(str(node.target))
            paths = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
            if kernel is not None and paths:
                found[paths[-1]] = kernel
    return found


def _attention_report(name: str, entry: AttentionPlan, backend: Backend | None, left: str | None) -> AttentionReport:
    return AttentionReport(
        name=name,
        kernel=left or ("?" if backend is None else backend.attention_kernel(entry)),
        bits=entry.bits,
        softmax_bits=entry.softmax_bits,
        ranges={side: (min(found.ends[0]), max(found.ends[1])) for side, found in entry.ranges.items()},
        sqnr_db=dict(entry.sqnr_db),
        reason=entry.reason,
    )


def _totals(plan: Plan, layers: Sequence[LayerReport]) -> Totals:
    outputs = plan.output_sqnr_db
    worst = min(outputs, key=lambda step: outputs[step], default=None)
    costs = Counter(layer.cost for layer in layers if layer.cost is not None)
    return Totals(
        bytes_before=plan.bytes_before,
        bytes_after=plan.bytes_after,
        ratio=plan.bytes_before / plan.bytes_after if plan.bytes_before and plan.bytes_after else None,
        mean_sqnr_db=sum(outputs.values()) / len(outputs) if outputs else None,
        worst_sqnr_db=None if worst is None else outputs[worst],
        worst_timestep=None if plan.timestep is None else worst,
        layers_by_precision=dict(Counter(layer.precision for layer in layers).most_common()),
        balance_by_cost={cost: costs[cost] for cost in COSTS},
    )
