"""Time of a conversion on 1, 2 and 4 processes of one thread each, and how their statistics differ.

    python -m benchmarks.ranks --json out/ranks.json --into docs/distributed.md

A small DiT with random weights is calibrated, gets branches of low rank, is rounded by GPTQ, and its blocks are learned
from the same statistics. The processes exchange by gloo. Each round runs every number of processes once, and the
smallest value of all rounds counts. For each phase there are two times:

* processor seconds of the process that needs most of them: the time on a machine with a free core for each process;
* seconds of the clock, which include waiting for others, and for cores that other programs use.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.figures import versions, write

_START, _END = "<!-- benchmarks.ranks -->", "<!-- benchmarks.ranks: end -->"
_PASSES = {"split-low-rank": "low-rank branches", "quantize-linears": "GPTQ", "reconstruct-blocks": "reconstruction"}
PHASES = ("calibration", *_PASSES.values())
SMALL = {"layers": 2, "heads": 4, "calls": 8, "samples": 8, "iterations": 30}
"""Blocks, heads of 64 channels, calibration calls of all processes, samples of a call, and steps for a block."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default="1,2,4", help="numbers of processes; the first is 1")
    parser.add_argument("--rounds", type=int, default=2)
    for name, value in SMALL.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path, default=Path("out/ranks.json"))
    parser.add_argument("--into", type=Path, help="page of the documentation that gets the table")
    options = parser.parse_args()
    shape = {name: getattr(options, name) for name in SMALL}
    report = measure([int(size) for size in options.sizes.split(",")], options.rounds, shape)
    write(options.json, json.dumps(report, indent=1) + "\n")
    print(f"{table(report)}\n\n{conditions(report)}")
    if options.into:
        show(report, options.into)


def measure(sizes: list[int], rounds: int, shape: dict[str, int]) -> dict[str, Any]:
    """Run all numbers of processes in turn; the times of each are in the order of the rounds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "diffusers", "fxquant", "fxquant.api", __name__])
    times: dict[str, list[Any]] = {str(size): [] for size in sizes}
    differences: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for size in sizes:
                times[str(size)].append(_run(context, size, shape, Path(folder)))
        for size in sizes[1:]:
            differences[str(size)] = compare(Path(folder) / "1.statistics", Path(folder) / f"{size}.statistics")
    found = {"shape": shape, "times": times, "differences": differences}
    load = os.getloadavg()[1] if hasattr(os, "getloadavg") else None
    return {**found, "cores": os.cpu_count(), "load": load, "versions": versions(("torch", "diffusers"))}


def _run(context: Any, size: int, shape: dict[str, int], folder: Path) -> list[dict[str, list[float]]]:
    """Start the processes of one case; returns the times of each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=_work, args=(rank, size, port, shape, folder, sender))
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    results = [receiver.recv() for receiver, _ in pipes]
    for process in processes:
        process.join()
    return results


def _work(rank: int, size: int, port: int, shape: dict[str, int], folder: Path, sender: Any) -> None:
    """One process: convert twice, and send the processor seconds and the seconds of the clock of each phase."""
    import torch
    import torch.distributed as dist

    import fxquant

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    dist.init_process_group("gloo")
    group = dist.group.WORLD if size > 1 else None
    model, clock = _model(shape), Clock()
    statistics = fxquant.Statistics(keep_calls=shape["calls"])
    mine = range(shape["calls"] * rank // size, shape["calls"] * (rank + 1) // size)

    def calibrate() -> None:
        with clock.phase("calibration"):
            for number in mine:
                _call(model, number, shape)

    common: dict[str, Any] = {"statistics": statistics, "group": group, "measure": 0, "instruments": [clock]}
    learned = fxquant.make_recipe("ptq4dit-reconstruct-w4a8").with_options(
        "reconstruct-blocks", iterations=shape["iterations"], batch=shape["samples"] * 2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fxquant.compile(model, recipe="svdquant-gptq-w4a8", calibrate=calibrate, **common)
        clock.times.pop("reconstruction", None)
        if rank == 0:
            statistics.save(folder / f"{size}.statistics")
        rounding = clock.times.pop("GPTQ")
        fxquant.compile(model, recipe=learned, **common)
        clock.times["GPTQ"] = rounding
    dist.destroy_process_group()
    sender.send(clock.times)


class Clock:
    """Processor seconds and seconds of the clock of each phase; an instrument of the pipeline.

    Attributes:
        times: Both, by phase.
    """

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self._began = 0.0, 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within this context a phase runs."""
        began = time.process_time(), time.perf_counter()
        yield
        self._add(name, began)

    def before(self, step: Any, module: Any) -> None:
        self._began = time.process_time(), time.perf_counter()

    def after(self, step: Any, module: Any, record: Any) -> None:
        if step.name in _PASSES:
            self._add(_PASSES[step.name], self._began)

    def failed(self, step: Any, module: Any, error: Exception) -> None: ...

    def _add(self, name: str, began: tuple[float, float]) -> None:
        processor, clock = self.times.get(name, [0.0, 0.0])
        self.times[name] = [processor + time.process_time() - began[0], clock + time.perf_counter() - began[1]]


def _model(shape: dict[str, int]) -> Any:
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_layers=shape["layers"], num_attention_heads=shape["heads"], attention_head_dim=64, sample_size=16
    ).eval()


def _call(model: Any, number: int, shape: dict[str, int]) -> None:
    """One calibration call."""
    import torch

    generator, samples = torch.Generator().manual_seed(number), shape["samples"]
    latents = torch.randn(samples, model.config.in_channels, 16, 16, generator=generator)
    timestep = torch.full((samples,), 999 - 999 * number // shape["calls"])
    with torch.no_grad():
        model(latents, timestep=timestep, class_labels=torch.arange(samples))


def compare(one: Path, other: Path) -> dict[str, float]:
    """The largest difference of extremes, and the largest relative one of second moments, between two files."""
    import fxquant

    first, second = fxquant.Statistics.load(one), fxquant.Statistics.load(other)
    extremes = moments = 0.0
    for key, channels in first.items():
        for part in ("minimum", "maximum"):
            ours, theirs = getattr(channels, part), getattr(second[key], part)
            extremes = max(extremes, float((ours - theirs).abs().max()))
        if channels.moments is not None:
            ours, theirs = channels.moments.matrix, second[key].moments.matrix
            moments = max(moments, float((ours - theirs).norm() / ours.norm()))
    return {"extremes": extremes, "moments": moments}


def best(report: dict[str, Any], size: str, phase: str) -> tuple[float, float]:
    """Processor seconds of the busiest process and seconds of the clock: the smallest of all rounds."""
    rounds = report["times"][size]
    processor, clock = (min(max(times[phase][which] for times in ranks) for ranks in rounds) for which in range(2))
    return processor, clock


def table(report: dict[str, Any]) -> str:
    """The times and differences as Markdown."""
    sizes = list(report["times"])
    heads = ["1 process" if size == "1" else f"{size} processes" for size in sizes]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(sizes)}"]
    for phase in PHASES:
        cells = (f"{processor:.1f} ({clock:.1f}) s" for processor, clock in (best(report, s, phase) for s in sizes))
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    for what, name in (("extremes", "extremes differ by"), ("moments", "second moments differ by, relative")):
        found = (report["differences"].get(size) for size in sizes)
        lines.append(f"| {name} | {' | '.join('' if each is None else f'{each[what]:.1g}' for each in found)} |")
    return "\n".join(lines)


def conditions(report: dict[str, Any]) -> str:
    """What was measured, and where."""
    shape, rounds = report["shape"], len(report["times"]["1"])
    load = "" if report["load"] is None else f"; on average {report['load']:.0f} programs wanted to run"
    return (
        f"{shape['layers']} block(s) of {64 * shape['heads']} channels, {shape['calls']} calls of {shape['samples']} "
        f"samples of 64 tokens, {shape['iterations']} steps per block; the best of {rounds} round(s) on "
        f"{report['cores']} cores{load}."
    )


def show(report: dict[str, Any], page: Path) -> None:
    """Write the table into a page."""
    text = page.read_text(encoding="utf-8")
    if text.count(_START) != 1 or text.count(_END) != 1:
        raise SystemExit(f"{page} lacks the lines {_START!r} and {_END!r}")
    before, after = text.partition(_START)[0], text.partition(_END)[2]
    write(page, f"{before}{_START}\n\n{table(report)}\n\n{conditions(report)}\n\n{_END}{after}")


if __name__ == "__main__":
    main()
