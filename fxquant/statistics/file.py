"""The file that statistics are saved in: tensors, and a header as JSON in the metadata of the safetensors file.

A file may come from anybody, so the header is compared with its schema, and the tensors with the header.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxquant.disk.files import share
from fxquant.disk.whole_file import whole_file
from fxquant.errors import CheckpointError
from fxquant.schemas.common import LARGEST_FILE, check
from fxquant.schemas.statistics import StatisticsFile
from fxquant.statistics.kept_calls import KeptCall, Run

if TYPE_CHECKING:
    from fxquant.statistics.collection import Statistics

_FORMAT = "fxquant-statistics"
_VERSION = 2  # With rows of second moments; files without them are of version 1, which earlier releases read.
_TENSORS = (
    *("timesteps", "count", "minimum", "maximum", "rows", "priorities"),
    *("moments", "moment_timesteps", "moment_sums", "moment_counts"),
    *("moment_rows", "moment_calls", "moment_call_timesteps"),
)


def write(statistics: Statistics, path: str | Path) -> None:
    """Write statistics to one file, completely or not at all.

    Raises:
        CheckpointError: If there are more kinds of call or more keys than can be read back.
        WriteError: If the file cannot be written.
        CalibrationError: If second moments were reduced to what rounding needs.
    """
    tensors = {
        f"{key}.{name}": tensor for key, channels in statistics.items() for name, tensor in channels._tensors().items()
    }
    numbers: dict[int, str] = {}
    calls = []
    for call in statistics.calls:
        for tensor in call.inputs:
            if id(tensor) not in numbers:
                numbers[id(tensor)] = f"call:{len(numbers)}"
                tensors[numbers[id(tensor)]] = tensor
        inputs = [numbers[id(tensor)] for tensor in call.inputs]
        calls.append({"kind": call.kind, "timestep": call.timestep, "number": call.number, "inputs": inputs,
                      "priority": call.priority})  # fmt: skip
    run = statistics.run
    header = {
        "version": _VERSION if any(name.endswith(".moment_rows") for name in tensors) else 1,
        "num_rows": statistics.num_rows,
        "seed": statistics.seed,
        "keys": {key: sorted(channels.seeds) for key, channels in statistics.items()},
        "keep_calls": statistics.calls.most,
        "run": None if run is None else {**vars(run), "prepared": list(run.prepared)},
        "seen_calls": statistics.calls.seen,
        "kinds": statistics.calls.kinds,
        "calls": calls,
    }
    check(StatisticsFile, header, "what would be saved")
    text = json.dumps(header)
    if len(text.encode()) > LARGEST_FILE:
        raise CheckpointError(f"the header of the statistics takes more than {LARGEST_FILE} bytes; keep fewer calls")
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished, metadata={_FORMAT: text})
        share(unfinished)


def read(path: str | Path) -> Statistics:
    """Read what :func:`write` wrote.

    Raises:
        CheckpointError: The file is missing, damaged, not a file of statistics, or has a newer format.
    """
    from fxquant.statistics.collection import Statistics

    if Path(path).is_dir():
        raise CheckpointError(f"{path} is a folder; give the file of statistics that save() or --keep-statistics wrote")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header, kinds = _header(path, (file.metadata() or {}).get(_FORMAT))
            held = set(file.keys())
            found = Statistics(num_rows=header.num_rows, seed=header.seed, keep_calls=header.keep_calls)
            for key, seeds in header.keys.items():
                names = [name for name in _TENSORS if f"{key}.{name}" in held]
                found._put_back(key, seeds, {name: file.get_tensor(f"{key}.{name}") for name in names})
            if header.run is not None:
                run = header.run.model_dump()
                found.run = Run(**{**run, "prepared": tuple(run["prepared"])})
            found.calls.kinds = kinds
            pool: dict[str, Tensor] = {}
            calls = []
            for call in header.calls:
                for name in call.inputs:
                    if name not in pool:
                        pool[name] = file.get_tensor(name).clone()
                inputs = tuple(pool[name] for name in call.inputs)
                _check_inputs(inputs, [leaf for leaf in header.kinds[call.kind].leaves if leaf.shape is not None])
                calls.append(KeptCall(call.kind, call.timestep, call.number, call.priority, inputs))
            found.calls.restore(calls, header.seen_calls)
    except CheckpointError as error:
        if str(path) in str(error).split():  # A short name would also be part of other words.
            raise
        raise CheckpointError(f"cannot read statistics from {path}: {error}. Calibrate again.") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"cannot read statistics from {path}: {error}. Calibrate again.") from error
    return found


def _header(path: str | Path, text: str | None) -> tuple[StatisticsFile, list[dict[str, Any]]]:
    """The header, and the kinds of call as they stand in it."""
    if text is None:
        raise CheckpointError(f"{path} holds no fxquant statistics. Give the file that save() wrote.")
    if len(text) > LARGEST_FILE:
        raise CheckpointError(f"the header has {len(text)} characters; at most {LARGEST_FILE} are read")
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header is damaged ({error})") from error
    version = data.get("version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > _VERSION:
        raise CheckpointError(
            f"{path} has statistics of format {version}; this fxquant reads up to {_VERSION}. "
            "Upgrade fxquant, or calibrate again."
        )
    return check(StatisticsFile, data, "the header"), data.get("kinds", [])


def _check_inputs(inputs: tuple[Tensor, ...], leaves: list[Any]) -> None:
    """Compare the inputs of a call with its kind.

    Raises:
        ValueError: A tensor has another dtype or shape.
    """
    sizes = set()
    for tensor, leaf in zip(inputs, leaves, strict=True):
        if tensor.dtype != getattr(torch, leaf.dtype) or tensor.dim() != len(leaf.shape):
            raise ValueError(f"an input of a kept call is {tensor.dtype} {list(tensor.shape)}")
        for size, wanted in zip(tensor.shape, leaf.shape, strict=True):
            if isinstance(wanted, str):
                sizes.add(size)
            elif size != wanted:
                raise ValueError(f"an input of a kept call has shape {list(tensor.shape)}, not {leaf.shape}")
    if len(sizes) > 1:
        raise ValueError(f"the inputs of a kept call have different batch sizes: {sorted(sizes)}")
