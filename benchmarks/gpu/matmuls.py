"""Products of the shapes of a model: checked, then timed in interleaved rounds, as shares of the device's peak."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.check import Found, Wrong, check_product
from benchmarks.gpu.job import free
from benchmarks.gpu.modes import Run, record
from benchmarks.gpu.products import Case, Product, Shape, all_products
from benchmarks.gpu.timing import ColdCaches

SMALL = ((33, 128, 48), (17, 64, 32), (130, 320, 80))
"""Shapes to check if nothing is timed. None of them is a multiple of a tile."""
SQUARES = (4096, 8192, 16384)
"""Side lengths of the square products that measure the peak."""
_RUNS = 8
"""Runs of a product in a round."""


@dataclass
class Cell:
    """One product of one shape.

    Attributes:
        shape: Rows, inputs, outputs.
        product: Its name.
        numbers: Kind of number that it multiplies.
        found: Comparison with float64.
        failed: Why there is no time, or no comparison either.
        wrong: Whether it failed because the comparison failed.
        seconds: Seconds of its runs; empty if nothing is timed.
    """

    shape: Shape
    product: str
    numbers: str
    found: Found | None = None
    failed: str | None = None
    wrong: bool = False
    seconds: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float | None:
        """Operations per second of the median run; a multiplication with its addition counts as two."""
        if not self.seconds:
            return None
        rows, inputs, outputs = self.shape
        return 2.0 * rows * inputs * outputs / statistics.median(self.seconds)


class Lost(Exception):
    """The device no longer responds; only a new process can continue."""


def chosen(texts: Sequence[str]) -> list[Product]:
    """Products whose names contain one of the texts."""
    return [product for product in all_products() if any(text in product.name for text in texts)]


def measure_shape(
    shape: Shape, products: Iterable[Product], device: torch.device, rounds: int, caches: ColdCaches | None
) -> list[Cell]:
    """Check all products of a shape and time those that are correct.

    Args:
        shape: Rows, inputs and outputs.
        products: The products.
        device: The device.
        rounds: Number of rounds.
        caches: Times the runs; None to check only.

    Raises:
        Lost: If the device no longer responds.
    """
    cells, ready = [], []
    for product in products:
        cell = Cell(shape, product.name, product.numbers)
        cells.append(cell)
        cell.failed = product.lacks(device)
        if cell.failed is not None:
            continue
        try:
            case = product.make(shape, device)
            run = case.run if caches is None else record(case.run)
            cell.found = check_product(case, run)
        except Exception as error:  # Reported in the table; the other products continue.
            cell.failed, cell.wrong = reason(error), isinstance(error, Wrong)
            still_there(error)
            continue
        ready.append((cell, case, run))
    if caches is not None:
        _time(ready, rounds, caches)
    ready.clear()
    free()
    return cells


def _time(ready: Sequence[tuple[Cell, Case, Run]], rounds: int, caches: ColdCaches) -> None:
    for _ in range(rounds):
        for cell, _case, run in ready:
            cell.seconds += caches.seconds(run, _RUNS)


def peaks(cells: Iterable[Cell]) -> dict[str, float]:
    """Operations per second of the fastest product of large squares, by kind of number."""
    found: dict[str, float] = {}
    for cell in cells:
        if cell.rate is not None and min(cell.shape) in SQUARES:
            found[cell.numbers] = max(found.get(cell.numbers, 0.0), cell.rate)
    return found


def reason(error: Exception) -> str:
    """Why something failed, in one line."""
    if isinstance(error, Wrong):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def still_there(error: Exception) -> None:
    """Raise :class:`Lost` if the device no longer responds after an error."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        raise Lost(f"the device was lost: {reason(error)}") from error
    free()


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)
