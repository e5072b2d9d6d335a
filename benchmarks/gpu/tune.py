"""Finds the fastest tiling of each of our products, and writes the table that the native backend reads.

    python -m benchmarks.gpu.tune --model dit,flux:1+1@1 --batch 2,16

The result of every tiling is compared with float64 before it is timed. The table is written after each entry, to the
user's cache folder or to ``--out``. Entries of other shapes and devices are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.figures import write
from benchmarks.gpu.check import Wrong, check_product
from benchmarks.gpu.job import free
from benchmarks.gpu.matmuls import say
from benchmarks.gpu.modes import Run, record
from benchmarks.gpu.our_products import our_products
from benchmarks.gpu.products import Product, Shape
from benchmarks.gpu.timing import ColdCaches
from benchmarks.models import linear_shapes, models_of, task_of
from fxquant.backends.native.gpu.configs import Config, candidates, key, trying
from fxquant.backends.native.gpu.machine import tuned_files

KINDS = {
    "native s8 x s8, symmetric weights": "int8",
    "native s8 x u4": "int4",
    "native s8 x u4, groups of 64": "int4-g64",
    "native e4m3 x e4m3": "fp8",
}
"""Our products and their names in the table. Asymmetric weights use the tilings of symmetric ones."""
_RUNS = 20

Timer = Callable[[Run], float]
"""Returns the seconds of a run."""


def tune(
    shapes: Iterable[Shape],
    device: torch.device,
    name: str,
    timer: Timer,
    out: Path,
    known: Collection[str] = (),
    tuned: Callable[[str, Config | None], None] = lambda entry, config: None,
    ended: Callable[[], bool] = lambda: False,
) -> dict[str, Config]:
    """Write the fastest tiling of each shape and kind to a table, and return the new entries.

    Args:
        shapes: Rows, inputs and outputs of each product.
        device: The device.
        name: Name of the device in the table.
        timer: Times a run.
        out: The table, a JSON file. It is written after each entry.
        known: Entries that are left as they are.
        tuned: Called after each entry, with None if no tiling is right.
        ended: Returns whether no further entry is to be tuned.
    """
    found: dict[str, Config] = {}
    products = {KINDS[product.name]: product for product in our_products() if product.name in KINDS}
    for shape in shapes:
        rows, inputs, outputs = shape
        for kind, product in products.items():
            entry = key(kind, rows, outputs, inputs, name)
            if entry in known or entry in found or product.lacks(device) is not None:
                continue
            if ended():
                return found
            fastest = _fastest(kind, product, shape, device, timer)
            if fastest is not None:
                found[entry] = fastest
                _add(out, entry, fastest)
            tuned(entry, fastest)
        free()
    return found


def _add(out: Path, entry: str, config: Config) -> None:
    table = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    table[entry] = asdict(config)
    write(out, json.dumps(dict(sorted(table.items())), indent=1) + "\n")


def _fastest(kind: str, product: Product, shape: Shape, device: torch.device, timer: Timer) -> Config | None:
    case = product.make(shape, device)
    seconds: dict[Config, float] = {}
    for config in candidates(kind, shape[0]):
        with trying(config):
            try:
                run = record(case.run) if device.type == "cuda" else case.run
                check_product(case, run)
                seconds[config] = timer(run)
            except (Wrong, RuntimeError) as error:  # For example, too much shared memory for this device.
                say(f"    {kind} {shape} {config}: left out: {error}")
    if not seconds:
        return None
    best = min(seconds, key=lambda config: seconds[config])
    say(f"{kind} {shape}: {1e6 * seconds[best]:.1f} us by {best}")
    return best


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="dit", help="models joined by commas, as for python -m benchmarks.gpu")
    parser.add_argument("--batch", default="2,16,64", help="samples per call, joined by commas; default 2,16,64")
    parser.add_argument(
        "--out", type=Path, default=tuned_files()[-1], help="the table; default: the one in the user's cache folder"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU to tune on")
    device = torch.device("cuda")
    caches = ColdCaches(device)
    shapes: set[Shape] = set()
    for model, batch in models_of(options.model, options.batch):
        shapes |= set(linear_shapes(task_of(model, batch)))
    with torch.no_grad():
        tune(
            sorted(shapes),
            device,
            torch.cuda.get_device_name(device),
            lambda run: statistics.median(caches.seconds(run, _RUNS)),
            options.out,
        )
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
