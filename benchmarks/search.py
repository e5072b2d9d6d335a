"""Time and memory of searching the precision of each layer of DiT-XL/2, with random weights.

    python -m benchmarks.search --layers 28 --size 0.2 --json out/search.json

The calibration forwards are timed separately: a search from given statistics needs no others. Everything after them
counts as the search: factors, rounding in every candidate, sensitivities, the integer program, the final model and its
measurement. The phases are those that ``progress`` reports.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.convert import build, call, machine, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=28, help="transformer blocks; DiT-XL/2 has 28")
    parser.add_argument("--size", type=float, default=0.2, help="share of the float model's bytes")
    parser.add_argument("--timesteps", type=int, default=10, help="calibration forwards, one timestep each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    options = parser.parse_args()
    found = {"machine": machine(), "options": vars(options) | {"json": None}, **search(options)}
    print(json.dumps({name: found[name] for name in ("seconds", "phases", "point", "uniform")}, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


def search(options: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, search, and measure both."""
    import torch

    import fxquant

    torch.set_num_threads(options.threads)
    model = build(options.layers)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    statistics = fxquant.Statistics(keep_calls=options.timesteps)
    clock, seconds, phases = _Clock(), dict[str, Any](), list[dict[str, Any]]()

    def calibrate() -> None:
        for step in range(options.timesteps):
            call(model, 1, 999 - step * (1000 // options.timesteps))
        seconds["until the end of calibration"] = clock.read()

    def progress(what: str, done: int, total: int) -> None:
        phases.append({"what": what, "done": done, **clock.read(), "peak": peak() / 1e9})
        print(phases[-1], file=sys.stderr, flush=True)

    result = fxquant.search(
        model,
        size=options.size,
        calibrate=calibrate,
        statistics=statistics,
        timesteps=options.timesteps,
        progress=progress,
    )
    seconds["whole"] = clock.read()
    seconds["search"] = {
        kind: seconds["whole"][kind] - seconds["until the end of calibration"][kind] for kind in ("wall", "cpu")
    }
    return {
        "seconds": seconds,
        "phases": phases,
        "float_bytes": weights,
        "peak_bytes": peak(),
        "point": result.point.__dict__ if hasattr(result.point, "__dict__") else str(result.point),
        "uniform": [str(point) for point in result.uniform],
        "table": str(result),
    }


class _Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"wall": time.perf_counter() - self._wall, "cpu": time.process_time() - self._cpu}


if __name__ == "__main__":
    main()
