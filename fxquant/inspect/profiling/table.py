"""A profile as text."""

from __future__ import annotations

from collections.abc import Sequence

from fxquant.inspect.profiling.results import FLOAT, QUANTIZED, Profile, Row, heaviest
from fxquant.inspect.profiling.timing import Times
from fxquant.text import fitted, letter, wrapped


def profile_table(profile: Profile, top: int | None, every: bool) -> str:
    """Summary, kinds, rows, kernels, and warnings if there are any."""
    rows = heaviest(profile.rows) if every else profile.merged()
    shown = rows if top is None else rows[:top]
    parts = [summary(profile), _kinds(profile), _rows(profile, shown, len(rows))]
    if warnings := profile.warnings:
        parts.append("warnings\n" + "\n".join(line for warning in warnings for line in wrapped(warning)))
    return "\n\n".join(parts)


def summary(profile: Profile) -> str:
    """Model, machine and whole calls as a few lines of text."""
    peaks, threads = profile.roofline, f", {profile.roofline.threads} threads" if profile.device == "cpu" else ""
    int8 = "no int8 product" if peaks.int8 is None else f"int8 {peaks.int8:.0f} GOP/s"
    lines = [
        ("model", f"{profile.model_class.rpartition(':')[2]} on {profile.backend}, batch {profile.batch}"),
        ("machine", f"{int8}, {peaks.dtype} {peaks.floating:.0f} GFLOP/s, memory {peaks.memory:.0f} GB/s{threads}"),
    ]
    for end, title in (("", "call"), (", compiled", "compiled")):
        own, base = profile.calls.get(QUANTIZED + end), profile.calls.get(FLOAT + end)
        if own is None:
            continue
        text = f"quantized {_spread(own)}"
        if base is not None:
            text += f", float {_spread(base)}: {base.median / own.median:.2f} x"
        lines.append((title, text))
    sums = [(graph, profile.summed(graph)) for graph in (QUANTIZED, FLOAT)]
    text = ", ".join(f"{graph} {times.median:.2f} ms" for graph, times in sums if times)
    if not any("compiled" in name for name in profile.calls):
        text += ", each by itself; torch.compile fuses small ones (--compile, compiled=True)"
    lines.append(("sum of ops", text))
    return "\n".join(f"{title:<12} {text}" for title, text in lines)


def _spread(times: Times) -> str:
    low, high = times.quartiles
    return f"{times.median:.2f} ms ({low:.2f} to {high:.2f})"


def _kinds(profile: Profile) -> str:
    whole = {graph: profile.summed(graph) for graph in (FLOAT, QUANTIZED)}
    ordered = sorted(profile.kinds.items(), key=lambda item: -_median(item[1].get(QUANTIZED)))
    rows = []
    for kind, times in ordered:
        row = [kind]
        for graph in (FLOAT, QUANTIZED):
            own, everything = times.get(graph), whole[graph]
            row += ["", ""] if everything is None else _with_share(_median(own), everything.median)
        own, base = times.get(QUANTIZED), times.get(FLOAT)
        row.append(f"{base.median / own.median:.2f}" if own and base and own.median else "")
        rows.append(row)
    header = ["kind of op", "float ms", "share", "quantized ms", "share", "x"]
    return fitted(header, rows, {}, right=range(1, 6))


def _median(times: Times | None) -> float:
    return 0.0 if times is None else times.median


def _with_share(own: float, whole: float) -> list[str]:
    return [f"{own:.2f}", f"{100 * own / whole:.0f}%" if whole else ""]


def _rows(profile: Profile, rows: Sequence[Row], count: int) -> str:
    kernels = {kernel: letter(i) for i, kernel in enumerate(dict.fromkeys(row.kernel for row in rows if row.kernel))}
    whole = profile.summed(QUANTIZED)
    assert whole is not None
    cells = [_cells(row, profile, kernels, whole.median) for row in rows]
    header = ["layer", "kind", "bits", "kernel", "float ms", "ms", "share", "x", "GOP/s", "of peak", "bound by"]
    text = fitted(header, cells, {0: 58}, right=range(4, 10))
    if count > len(rows):
        text += f"\n{count - len(rows)} more rows, of {_rest(profile, rows, whole.median)}; --top shows more"
    legend = "\n".join(f"kernel {mark}: {kernel}" for kernel, mark in kernels.items())
    return f"{text}\n\n{legend}" if legend else text


def _rest(profile: Profile, rows: Sequence[Row], whole: float) -> str:
    rest = whole - sum(_median(row.quantized) for row in rows)
    return f"{max(rest, 0.0):.2f} ms"


def _cells(row: Row, profile: Profile, kernels: dict[str, str], whole: float) -> list[str]:
    share = _with_share(_median(row.quantized), whole)
    peak = row.share_of_peak(profile.roofline)
    rate = row.rate
    return [
        row.name,
        row.kind,
        row.precision,
        kernels.get(row.kernel, ""),
        "" if row.floating is None else f"{row.floating.median:.2f}",
        *share,
        "" if row.speedup is None else f"{row.speedup:.2f}",
        "" if rate is None else f"{rate:.0f}",
        "" if peak is None else f"{100 * peak:.0f}%",
        row.bound(profile.roofline) or "",
    ]
