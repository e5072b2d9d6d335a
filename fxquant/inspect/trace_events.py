"""Times as Chrome-trace JSON, for Perfetto (https://ui.perfetto.dev) and ``chrome://tracing``.

Events follow each other on a line of time, from 0. Times of passes come from the log of the plan; those of ops are the
medians of a profile, so gaps between ops are not shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fxquant.disk.whole_file import whole_file
from fxquant.inspect.profiling.results import Profile
from fxquant.inspect.rows import PassReport
from fxquant.text import json_values

Event = tuple[str, float, Mapping[str, Any]]
"""Name, microseconds, and what else is known."""


def trace_of_passes(passes: Sequence[PassReport]) -> dict[str, Any]:
    """The passes of a conversion, one event per pass, with their edits and changes of ops.

    Args:
        passes: The pass log, as :attr:`fxquant.Report.passes` has it.
    """
    events = [(entry.text, entry.seconds * 1e6, {"edits": entry.edits, **entry.ops}) for entry in passes]
    return _trace({"passes": events})


def trace_of_profile(profile: Profile) -> dict[str, Any]:
    """The ops of a profile, one line of time per graph: ``float`` and ``quantized``.

    Args:
        profile: What :func:`fxquant.profile` returns.
    """
    lines: dict[str, list[Event]] = {}
    for node in profile.nodes:
        about = {"op": node.op, "kind": node.kind, "layer": node.layer}
        lines.setdefault(node.graph, []).append((node.layer or node.name, node.times.median * 1e3, about))
    return _trace(lines)


def save_trace(trace: Mapping[str, Any], path: str | Path) -> None:
    """Write a trace.

    Raises:
        WriteError: If the file cannot be written.
    """
    with whole_file(path) as written:
        written.write_text(json.dumps(json_values(trace)) + "\n", encoding="utf-8")


def _trace(lines: Mapping[str, Iterable[Event]]) -> dict[str, Any]:
    events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "fxquant"}}]
    for number, (title, line) in enumerate(lines.items(), 1):
        events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": title}})
        at = 0.0
        for name, duration, about in line:
            events.append(
                {"name": name, "ph": "X", "pid": 1, "tid": number, "ts": at, "dur": duration, "args": dict(about)}
            )
            at += duration
    return {"traceEvents": events, "displayTimeUnit": "ms"}
