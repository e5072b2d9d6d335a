"""Formats results as tables, as JSON and as a page of markdown."""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
import statistics
import subprocess
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.figures import decibel, finite, quartiles, versions
from benchmarks.gpu.matmuls import Cell
from benchmarks.gpu.products import Shape
from benchmarks.gpu.session import Row
from benchmarks.gpu.systems import REFERENCE

NOT_TIMED = "Checks only: nothing was timed, and there are no figures of speed or memory."
_PACKAGES = ("torch", "triton", "diffusers", "torchao")


def systems_table(rows: Sequence[Row], tablefmt: str = "simple", reference: str = REFERENCE.name) -> str:
    """One row per system; systems that failed are listed below with the reason."""
    header = ["system", "ms", "quartiles", f"x {reference}", "SQNR dB", "weights MB", "peak MB", "start s"]
    lines = [_grid([_cells(row) for row in rows if row.failed is None], header, tablefmt)]
    most = max((len(row.seconds) for row in rows), default=0)
    few = [f"{row.system} ({len(row.seconds)})" for row in rows if 0 < len(row.seconds) < most]
    lines += ["", f"In fewer rounds than the {most} of the others: {'; '.join(few)}."] if few else []
    return "\n".join([*lines, *_left_out([(row.system, row.failed) for row in rows])])


def _cells(row: Row) -> list[str]:
    low, high = (f"{1e3 * end:.3f}" for end in quartiles(row.seconds)) if row.seconds else ("", "")
    return [
        row.system,
        f"{1e3 * statistics.median(row.seconds):.3f}" if row.seconds else "",
        f"{low} to {high}" if row.seconds else "",
        "" if row.speedup is None else f"{row.speedup:.2f}",
        decibel(row.sqnr_db),
        "" if row.weights is None else f"{row.weights / 1e6:.0f}",
        "" if row.peak is None else f"{row.peak / 1e6:.0f}",
        "" if row.started is None else f"{row.started:.0f}",
    ]


def products_table(
    cells: Sequence[Cell], peaks: dict[str, float], counts: dict[Shape, int], tablefmt: str = "simple"
) -> str:
    """One row per shape, one column per product: TFLOP/s and the share of the peak, or the result of the check."""
    shapes, names = (list(dict.fromkeys(values)) for values in zip(*((c.shape, c.product) for c in cells), strict=True))
    found = {(cell.shape, cell.product): _product(cell, peaks) for cell in cells if cell.failed is None}
    rows = [
        [_shape(shape), str(counts.get(shape, "")), *(found.get((shape, name), "") for name in names)]
        for shape in shapes
    ]
    failed = [(f"{cell.product}, {_shape(cell.shape)}", cell.failed) for cell in cells]
    return "\n".join([_grid(rows, ["rows x inputs x outputs", "layers", *names], tablefmt), *_left_out(failed)])


def _product(cell: Cell, peaks: dict[str, float]) -> str:
    if cell.rate is None:
        assert cell.found is not None
        return "exact" if math.isinf(cell.found.sqnr_db) else f"correct, {cell.found.sqnr_db:.1f} dB"
    share = f" ({cell.rate / peaks[cell.numbers]:.2f})" if cell.numbers in peaks else ""
    return f"{1e-12 * cell.rate:.0f}{share}"


def _shape(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def peaks_line(peaks: dict[str, float]) -> str:
    """The peaks that shares are relative to."""
    if not peaks:
        return "No peaks were measured."
    said = ", ".join(f"{1e-12 * rate:.0f} TFLOP/s {numbers}" for numbers, rate in peaks.items())
    return f"Peaks, measured with the fastest product of large squares: {said}."


def _grid(rows: Sequence[list[str]], header: list[str], tablefmt: str) -> str:
    kept = [column for column in range(len(header)) if any(row[column] for row in rows)]
    if not kept:
        return "None."
    return tabulate(
        [[row[column] for column in kept] for row in rows],
        [header[column] for column in kept],
        tablefmt=tablefmt,
        disable_numparse=True,
        colalign=["left", *["right"] * (len(kept) - 1)],
    )


def _left_out(found: Sequence[tuple[str, str | None]]) -> list[str]:
    """Lines that list what has no figures, grouped by reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in found:
        if why is not None:
            reasons.setdefault(why, []).append(name)
    lines = [f"- {'; '.join(names)}: {why}" for why, names in reasons.items()]
    return ["", "Not measured:", "", *lines] if lines else []


def row_to_json(row: Row | Cell) -> dict[str, Any]:
    """All fields; numbers that JSON does not support are text."""
    data = dataclasses.asdict(row)
    if isinstance(row, Cell):
        return data | {"found": data["found"] and data["found"] | {"sqnr_db": finite(data["found"]["sqnr_db"])}}
    return data | {"sqnr_db": finite(row.sqnr_db)}


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the versions that were measured with."""
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": versions(_PACKAGES),
    }
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": _ask("driver_version"),
        "power_limit": _ask("power.limit"),
        "clock": _ask("clocks.max.sm"),
    }


def _ask(field: str) -> str | None:
    """A field that nvidia-smi reports; None if it fails."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def page(found: dict[str, Any], rounds: int, sections: Sequence[tuple[str, str]]) -> str:
    """A page of markdown: device, versions, date, settings, and one section per table."""
    numbers = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    more = [
        f"{key.replace('_', ' ')} {found[key]}" for key in ("cuda", "driver", "power_limit", "clock") if found.get(key)
    ]
    how = f"{rounds} interleaved rounds, random weights." if rounds else NOT_TIMED
    head = (
        f"{', '.join([found['device'], *more])}; Python {found['python']}, {numbers}; {found['date']}. {how} "
        "[`gpu/__init__.py`](../gpu/__init__.py) defines each number."
    )
    parts = ["# On a GPU" if rounds else "# Checks of the benchmark for GPUs", head]
    for title, text in sections:
        parts += [f"## {title}", text]
    return "\n\n".join(parts) + "\n"
