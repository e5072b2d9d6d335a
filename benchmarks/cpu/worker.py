"""The process of one system. It writes JSON messages, one per line, to its original standard output.

Modes: ``prepare`` makes the stored files; ``serve`` starts the system, reports its start time and memory, and times one
call for every line that it reads; ``digits`` reports the error on the trained model; ``roofline`` times integer
products of the model's shapes for every line that it reads; ``image`` times whole pipelines.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks.cpu.systems import System, all_systems
from benchmarks.models import Task, linear_shapes, task_of

_OUTPUT = "output.npy"


def main() -> None:
    order = json.loads(sys.argv[1])
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Output of libraries must not mix with messages.
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(order["threads"])

    def tell(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        with torch.no_grad():
            _MODES[order["mode"]](order, tell)
    except Exception as error:
        if os.environ.get("BENCHMARK_TRACEBACK"):
            raise
        tell(failed=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
        sys.exit(1)


Tell = Callable[..., None]


def _task(order: dict[str, Any]) -> Task:
    return task_of(order["model"], order["batch"])


def _system(order: dict[str, Any]) -> System:
    return all_systems()[order["system"]]


def prepare(order: dict[str, Any], tell: Tell) -> None:
    """Make the stored files."""
    stored = _system(order).stored
    assert stored is not None
    stored.make(_task(order), Path(order["folder"]))
    tell(done=True)


def serve(order: dict[str, Any], tell: Tell) -> None:
    """Start the system, report it, and answer every line with the seconds of a call."""
    system = _system(order)
    for name in system.needs:
        __import__(name)
    before = _resident()
    task = _task(order)
    began = time.perf_counter()
    run = system.start(task, Path(order["folder"]))
    call = task.timed
    output = run(call)
    started = time.perf_counter() - began
    del task
    run(call)
    numpy.save(Path(order["scratch"]) / _OUTPUT, output.float().numpy())
    del output
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    memory = {"imported": before, "resident": _resident() - before, "peak": _status("VmHWM") - before}
    tell(started=started, output=str(Path(order["scratch"]) / _OUTPUT), **memory)
    for _ in sys.stdin:
        run(call)  # An unmeasured call, because other systems changed the caches.
        began = time.perf_counter()
        run(call)
        tell(seconds=time.perf_counter() - began)


def digits(order: dict[str, Any], tell: Tell) -> None:
    """Report the mean SQNR on the trained model."""
    from benchmarks.digits import mean_sqnr

    system, task, folder = _system(order), _task(order), Path(order["folder"])
    if system.stored is not None and not any(folder.iterdir()):
        system.stored.make(task, folder)
    tell(sqnr_db=mean_sqnr(task, system.start(task, folder)))


def image(order: dict[str, Any], tell: Tell) -> None:
    """Report the seconds of images of a whole pipeline; see :mod:`benchmarks.cpu.images`."""
    from benchmarks.cpu.images import measured

    task = _task(order)
    run = _system(order).start(task, Path(order["folder"]))
    tell(**measured(task, run, order["steps"], order["rounds"]))


def roofline(order: dict[str, Any], tell: Tell) -> None:
    """Report the operations in the linears of a call; answer every line with the best rate of each product."""
    from fxquant.inspect.profiling.roofline import int8_product

    counts = linear_shapes(_task(order))
    # Memory bandwidth limits products of few rows, so they do not measure a peak.
    shapes = [shape for shape in counts if shape[0] > 64] or list(counts)
    works = {shape: int8_product(*shape, torch.device("cpu")) for shape in shapes}
    if any(work is None for work in works.values()):
        raise RuntimeError("this build of torch lacks oneDNN's integer product, which measures the roofline")
    tell(operations=sum(2 * rows * i * o * count for (rows, i, o), count in counts.items()))
    for _ in sys.stdin:
        rates = {}
        for (rows, i, o), work in works.items():
            assert work is not None
            rates[f"{rows}x{i}x{o}"] = 2e-9 * rows * i * o / min(_seconds(work) for _ in range(5))
        tell(rates=rates)


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _resident() -> int:
    gc.collect()
    return _status("VmRSS")


_MODES: dict[str, Callable[[dict[str, Any], Tell], None]] = {
    "prepare": prepare,
    "serve": serve,
    "digits": digits,
    "image": image,
    "roofline": roofline,
}

if __name__ == "__main__":
    main()
