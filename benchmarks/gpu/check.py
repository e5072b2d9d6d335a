"""Checks that must pass before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.job import Exact
from benchmarks.gpu.modes import Run
from benchmarks.gpu.products import Case
from fxquant.numerics.sqnr import sqnr_db

_ROWS = 2048


class Wrong(Exception):
    """A result is wrong; the message says by how much."""


@dataclass(frozen=True)
class Found:
    """How a product compares with float64.

    Attributes:
        elements: Number of compared elements.
        wrong: Number of elements that differ by more than rounding explains, or are NaN.
        sqnr_db: SQNR in dB over all elements.
    """

    elements: int
    wrong: int
    sqnr_db: float


def check_product(case: Case, run: Run) -> Found:
    """Compare a product with float64, element by element.

    Args:
        case: The product.
        run: Runs the product: its own `run`, or a recording of it.

    Raises:
        Wrong: If any element is wrong.
    """
    first = run()
    poison(first if case.target is None else case.target)
    with _new_memory_poisoned():
        output = run()
    weight = case.right().t()
    magnitudes = weight.abs()
    wrong, signal, noise = 0, 0.0, 0.0
    for start in range(0, output.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        left, found = case.left(part), output[part].double()
        exact, allowed = left @ weight, case.sums * (left.abs() @ magnitudes)
        if case.bias is not None:
            exact += case.bias.double()
        allowed += case.step * exact.abs()
        error = (found - exact).abs()
        wrong += int((~(error <= allowed)).sum())
        signal += float(exact.square().sum())
        noise += float(error.square().sum())
    if wrong:
        raise Wrong(f"{wrong} of {output.numel()} elements ({wrong / output.numel():.2%}) differ from float64")
    return Found(output.numel(), wrong, _decibels(signal, noise))


def _decibels(signal: float, noise: float) -> float:
    return float("inf") if noise == 0 else float(10 * torch.tensor(signal / noise, dtype=torch.float64).log10())


def poison(tensor: Tensor) -> None:
    """Overwrite a tensor with a value that no correct result contains."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).min + 1)


@contextmanager
def _new_memory_poisoned() -> Iterator[None]:
    """Fill new uninitialized tensors with NaN or the largest number, on any device."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)


def check_model(run: Run, exact: Exact, least_db: float) -> float:
    """The SQNR of a model's output in dB, after its last output was overwritten.

    Raises:
        Wrong: If the output is not finite, has the wrong shape, or has too low an SQNR.
    """
    poison(run())
    output = run().cpu()
    if output.shape != exact.output.shape:
        raise Wrong(f"the output has shape {tuple(output.shape)}, not {tuple(exact.output.shape)}")
    finite = torch.isfinite(output)
    if not finite.all():
        raise Wrong(f"{1 - float(finite.double().mean()):.2%} of the output are not finite")
    found = sqnr_db(exact.output.float(), output.float())
    if found < least_db:
        raise Wrong(f"an SQNR of {found:.1f} dB is below {least_db:.0f}, the least that its arithmetic explains")
    return found
