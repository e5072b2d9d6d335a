"""Formats measurements as a table, as JSON and as a page of markdown."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.cpu.rounds import Measured, Row, Settings
from benchmarks.figures import decibel, finite, quartiles, versions

_HEADER = ["system", "ms", "quartiles", "x eager fp32", "of int8", "SQNR dB", "digits dB", "resident MB", "peak MB"]
_PACKAGES = ("torch", "diffusers", "torchao", "openvino", "nncf")


def table(measured: Measured, tablefmt: str = "simple") -> str:
    """One row per system; systems that failed are listed below with the reason."""
    rows = [_cells(row, measured.floor) for row in measured.rows if row.failed is None and row.seconds]
    kept = [column for column in range(len(_HEADER)) if any(row[column] for row in rows)]
    text = tabulate(
        [[row[column] for column in kept] for row in rows],
        [_HEADER[column] for column in kept],
        tablefmt=tablefmt,
        disable_numparse=True,
        colalign=["left", *["right"] * (len(kept) - 1)] if rows else None,
    )
    failed = [f"{row.system}: {row.failed}" for row in measured.rows if row.failed is not None]
    failed += [f"{row.system}, on digits: {row.digits_failed}" for row in measured.rows if row.digits_failed]
    lines = [text, "", _floor(measured)]
    if failed:
        lines += ["", "Not measured:", "", *(f"- {line}" for line in failed)]
    return "\n".join(lines)


def _cells(row: Row, floor: float | None) -> list[str]:
    low, high = quartiles(row.seconds)
    return [
        row.system,
        f"{1e3 * row.median:.1f}",
        f"{1e3 * low:.1f} to {1e3 * high:.1f}",
        f"{row.speedup:.2f}",
        "" if floor is None else f"{floor / row.median:.2f}",
        decibel(row.sqnr_db),
        decibel(row.digits_db),
        "" if row.resident is None else f"{row.resident / 1e6:.0f}",
        "" if row.peak is None else f"{row.peak / 1e6:.0f}",
    ]


def _floor(measured: Measured) -> str:
    if measured.floor is None:
        return f"No roofline: {measured.note}."
    return (
        f"Roofline: {measured.operations / 1e9:.1f} GOP in linear layers at {statistics.median(measured.peaks):.0f} "
        f"GOP/s, the rate of the best int8 product of their shapes, take {1e3 * measured.floor:.1f} ms."
    )


def to_json(title: str, settings: Settings, measured: Measured) -> dict[str, Any]:
    """All measurements of one model."""
    return {
        "title": title,
        "model": settings.model,
        "batch": settings.batch,
        "rounds": settings.rounds,
        "operations": measured.operations,
        "int8_gops": measured.peaks,
        "roofline_ms": None if measured.floor is None else 1e3 * measured.floor,
        "rows": [_row_to_json(row, measured.floor) for row in measured.rows],
    }


def _row_to_json(row: Row, floor: float | None) -> dict[str, Any]:
    data: dict[str, Any] = {"system": row.system, "failed": row.failed}
    if row.failed is not None or not row.seconds:
        return data
    return data | {
        "median_ms": 1e3 * row.median,
        "quartiles_ms": [1e3 * end for end in quartiles(row.seconds)],
        "rounds_ms": [1e3 * seconds for seconds in row.seconds],
        "speedup": row.speedup,
        "share_of_int8": None if floor is None else floor / row.median,
        "started_s": row.started,
        "sqnr_db": finite(row.sqnr_db),
        "digits_db": finite(row.digits_db),
        "digits_failed": row.digits_failed,
        "resident_bytes": row.resident,
        "peak_bytes": row.peak,
    }


def machine(threads: int) -> dict[str, Any]:
    """The machine and the versions that were measured with."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
    return {
        "date": datetime.date.today().isoformat(),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "instructions": sorted(flags & {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8"}),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "python": platform.python_version(),
        "versions": versions(_PACKAGES),
    }


def page(found: dict[str, Any], settings: Settings, tables: Sequence[tuple[str, str]]) -> str:
    """A page of markdown: machine, versions, date, settings, and one table per model."""
    numbers = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    parts = [
        "# On the CPU",
        f"{found['processor']}, {found['cores']} cores, {found['threads']} threads "
        f"({', '.join(found['instructions'])}); Python {found['python']}, {numbers}; {found['date']}. "
        f"{settings.rounds} interleaved rounds, random weights. [`cpu/__init__.py`](../cpu/__init__.py) defines each "
        "number. Only ratios carry over to other machines.",
    ]
    for title, text in tables:
        parts += [f"## {title}", text]
    return "\n\n".join(parts) + "\n"
