"""Seconds until the first output of a compiled model: compiled as a whole, and in pieces.

Each measurement is a process of its own with an empty cache of inductor. All load the same checkpoint. The seconds of
the first call include compilation; loading is not included. A call of the uncompiled model is subtracted nowhere, and
is reported beside.

    python -m benchmarks.cold_start --model dit:28 --backend native --json out/cold-start.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import Task, cast, task_of

MODES = ("whole", "pieces")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dit:28")
    parser.add_argument("--recipe", default="rtn-w8a8")
    parser.add_argument("--backend", default="native")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of what is not quantized")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    if options.worker is not None:
        print(json.dumps(_measured(options, Path(options.worker))))
        return
    with tempfile.TemporaryDirectory() as folder:
        _child([*sys.argv[1:], "--worker", f"{folder}/prepare"])
        found = {mode: _child([*sys.argv[1:], "--worker", f"{folder}/{mode}"]) for mode in MODES}
    found["ratio"] = found["pieces"]["first_s"] / found["whole"]["first_s"]
    for name, value in found.items():
        print(name, value)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(vars(options) | {"json": str(options.json), "found": found}, indent=2))


def _child(arguments: list[str]) -> Any:
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, "-m", "benchmarks.cold_start", *arguments]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measured(options: argparse.Namespace, path: Path) -> dict[str, float]:
    import fxquant

    task, dtype = task_of(options.model), getattr(torch, options.dtype)
    checkpoint = path.with_name("checkpoint")
    if path.name == "prepare":
        _prepare(task, options.recipe, dtype, checkpoint)
        return {}
    model = fxquant.load(checkpoint, backend=options.backend)
    call = cast(task.timed, dtype)
    with torch.no_grad():
        eager = _seconds(model, call)
        if path.name == "whole":
            model.compile()
        else:
            model.compile_repeated_blocks()
        return {"first_s": _seconds(model, call), "second_s": _seconds(model, call), "eager_s": eager}


def _prepare(task: Task, recipe: str, dtype: torch.dtype, checkpoint: Path) -> None:
    import fxquant

    model = task.model(dtype)
    with torch.no_grad():
        made = fxquant.compile(model, recipe=recipe, calibrate=lambda: model(**cast(task.timed, dtype)), measure=0)
    fxquant.save(made, checkpoint)


def _seconds(model: Any, call: Any) -> float:
    began = time.perf_counter()
    model(**call)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
