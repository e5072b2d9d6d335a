"""What a linear with weights alone costs on ``native``: ``python -m benchmarks.low_bit.weight_only``, in two minutes.

One linear, 1152 inputs and 4608 outputs, with 1 and with 512 rows of inputs, on one core. Each float format is
measured in the compiled kernel and in the reference op, which decodes the whole weight, and beside it 4-bit integers in
groups of the same size. Systems take turns. Times are CPU time in milliseconds, medians over rounds; ratios are medians
of the ratios of rounds. Memory is what one call adds to the resident memory of the process at its peak, in MiB.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional

from fxquant.backends.native import machine
from fxquant.backends.native.compiled import weights
from fxquant.memory.mappings import trim
from fxquant.numerics.weights import QuantizedWeight, encode_weight

Call = Callable[[Tensor], Tensor]

INTEGERS = "int4"
FORMATS = {"nf4": (0, 64), "mxfp4": (32,), "nvfp4": (16,), "fp8": (0,)}
"""Formats and the inputs per group that are measured."""

_LITTLE = 64
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def kernel(weight: QuantizedWeight, bias: Tensor) -> Call:
    """The compiled kernel, with tensors as the backend holds them."""
    native, out = torch.ops.fxquant_native, weight.packed.shape[0]
    panels = weights.panels(weight.packed, weight.bits, weight.in_features, weight.bits == 4)
    grid, shape = (weight.scale, weight.zero_point), (weight.group_size, out)
    if weight.zero_point is not None:
        return lambda x: native.weight_only_linear(x, panels, *grid, bias, weight.bits, *shape)
    scales = weights.scale_panels(weight.scale)
    return lambda x: native.float_weight_linear(x, panels, scales, weight.global_scale, bias, weight.format, *shape)


def reference(weight: QuantizedWeight, bias: Tensor) -> Call:
    """The reference op decodes the weight, and ATen multiplies it."""
    return lambda x: functional.linear(x, weight.dequantize(x.dtype), bias)


def systems(out: int, inner: int, dtype: torch.dtype) -> dict[str, Call]:
    """Calls by name: ``nf4-g64``, ``nf4-g64 decoded``, ``int4-g64``, and ``float``."""
    torch.manual_seed(0)
    weight, bias = torch.randn(out, inner) * inner**-0.5, torch.randn(out).to(dtype)
    real = weight.to(dtype)
    calls: dict[str, Call] = {"float": lambda x: functional.linear(x, real, bias)}
    for format, groups in FORMATS.items():
        for group in groups:
            name = f"{format}-g{group}"
            found = encode_weight(weight, format=format, group_size=group)
            calls[name], calls[f"{name} decoded"] = kernel(found, bias), reference(found, bias)
            integers = encode_weight(weight, format=INTEGERS, group_size=group)
            calls.setdefault(f"{INTEGERS}-g{group}", kernel(integers, bias))
    return calls


def cpu_times(calls: dict[str, Call], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds per call of each system, one number per round, in interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = 20 if len(x) == 1 else 1
    for number in range(rounds + 1):
        for name, call in calls.items():
            count = 1 if "decoded" in name else repeats
            began = time.process_time()
            for _ in range(count):
                call(x)
            if number:  # The first round warms up.
                times[name].append((time.process_time() - began) * 1e3 / count)
    return times


def peak_mib(call: Call, x: Tensor, warm: Callable[[], object]) -> float:
    """MiB that the first call adds to the resident memory at its peak, in a process of its own (Linux only).

    Args:
        call: The system.
        x: Its inputs.
        warm: Runs the same code on little memory, because pages of code count too.

    Raises:
        RuntimeError: If the call fails.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            warm()
            trim()  # The call would fill free memory of earlier calls before it asks for more.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Forgets the peak so far.
            before = _status("VmRSS")
            call(x)
            os.write(writer, str(max(0, _status("VmHWM") - before)).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    if not found:
        raise RuntimeError("the process that measures memory ended without a result; its error is above")
    return int(found) / 1024


def _status(name: str) -> int:
    """An entry of the process's status, in KiB."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1])


def table(out: int, inner: int, rows: int, dtype: torch.dtype, rounds: int) -> list[list[object]]:
    """One row per format: name, ms, ratio to decoding, to integers and to float, MiB, MiB of decoding."""
    calls, x = systems(out, inner, dtype), torch.randn(rows, inner).to(dtype)
    little = systems(_LITTLE, _LITTLE, dtype)
    warm = {name: functools.partial(call, x[:, :_LITTLE]) for name, call in little.items()}
    peaks = {name: peak_mib(call, x, warm[name]) for name, call in calls.items()}
    times = cpu_times(calls, x, rounds)

    def ratio(name: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))

    found: list[list[object]] = []
    for format, groups in FORMATS.items():
        for group in groups:
            name, integers = f"{format}-g{group}", f"{INTEGERS}-g{group}"
            ratios = [ratio(name, other) for other in (f"{name} decoded", integers, "float")]
            found.append([name, statistics.median(times[name]), *ratios, peaks[name], peaks[f"{name} decoded"]])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each dtype and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, default=(4608, 1152), metavar=("OUT", "IN"))
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 512))
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args(arguments)
    reason = machine.missing_kernels()
    if reason is not None:
        raise SystemExit(f"there are no compiled kernels: {reason}")
    torch.set_num_threads(1)
    header = ["weight", "ms", "of decoding", "of int4", "of float", "MiB", "MiB, decoding"]
    for name, dtype in _DTYPES.items():
        for rows in given.rows:
            print(f"\n{name}, {rows} rows\n")
            print(tabulate(table(*given.shape, rows, dtype, given.rounds), header, floatfmt=".3g"))


if __name__ == "__main__":
    main()
