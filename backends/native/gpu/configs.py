"""The tiling of the matrix-product kernel: tiles, warps and stages, chosen by the shape of the product.

A table that was tuned on a device decides for the shapes that it lists: ``configs.json`` beside this file, or
``gpu-configs.json`` in the user's cache folder. For other shapes a cost model decides: it counts the waves of tiles
that a shape takes. Nothing is timed while a model runs, so CUDA graphs can be captured from the first call.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from fxquant.backends.native.gpu.machine import tuned_files

_MULTIPROCESSORS = 132  # Of an H100 or H200. Other GPUs have other numbers, but the same number is used for them.
_SMALL = 64


@dataclass(frozen=True)
class Config:
    """One tiling of a product.

    Attributes:
        block_m: Rows per tile.
        block_n: Output channels per tile.
        block_k: Input channels per step.
        warps: Warps per tile.
        stages: Steps whose loads are in flight.
        super_m: Tiles along the rows that run together and share one part of the weight.
    """

    block_m: int
    block_n: int
    block_k: int = 128
    warps: int = 8
    stages: int = 4
    super_m: int = 8


# Each tiling with its speed relative to the first one's. How often a loaded byte is reused determines the speed.
_BYTES: dict[Config, float] = {
    Config(128, 256, 128, 8, 3): 1.0,
    Config(128, 128, 128, 8, 4): 0.85,
    Config(64, 256, 128, 4, 4): 0.8,
    Config(64, 128, 128, 4, 4): 0.65,
    Config(64, 64, 128, 4, 5): 0.45,
    Config(16, 128, 128, 4, 5): 0.12,
    Config(16, 64, 128, 4, 6): 0.08,
    Config(16, 32, 256, 4, 6): 0.05,
}
_HALVES: dict[Config, float] = {
    Config(128, 128, 128, 8, 3): 1.0,
    Config(64, 128, 128, 4, 4): 0.75,
    Config(64, 64, 128, 4, 4): 0.5,
    Config(16, 128, 128, 4, 5): 0.15,
    Config(16, 64, 128, 4, 5): 0.1,
    Config(16, 32, 128, 4, 6): 0.06,
}
# With groups, a second set of sums takes registers.
_GROUPS = {config: rate for config, rate in _HALVES.items() if config.block_m * config.block_n < 128 * 128}
_GROUPS[Config(128, 64, 128, 8, 4)] = 0.7


def candidates(kind: str, m: int) -> list[Config]:
    """The tilings that are worth trying for a product of `m` rows; `kind` as for :func:`choose`."""
    few = m <= _SMALL
    return [config for config in _rates(kind) if (config.block_m == 16) == few]


def _rates(kind: str) -> dict[Config, float]:
    if "-g" in kind:
        return _GROUPS
    return _HALVES if kind == "int4" else _BYTES


_tried: ContextVar[Config | None] = ContextVar("fxquant_tried_config", default=None)


@contextmanager
def trying(config: Config) -> Iterator[None]:
    """Use this tiling for every product inside the context; for tuning."""
    token = _tried.set(config)
    try:
        yield
    finally:
        _tried.reset(token)


def choose(kind: str, m: int, n: int, k: int, device: str) -> Config:
    """The tiling for a product `[m, k] x [k, n]`.

    Args:
        kind: ``int8``, ``fp8`` or ``int4``, followed by ``-gGROUP`` if weights are in groups.
        m: Rows.
        n: Output channels.
        k: Input channels.
        device: Name of the device.
    """
    return _tried.get() or _choose(kind, m, n, k, device)


@functools.lru_cache(maxsize=4096)
def _choose(kind: str, m: int, n: int, k: int, device: str) -> Config:
    found = _tuned().get(key(kind, m, n, k, device))
    if found is not None:
        return found
    rates = _rates(kind)
    return min(candidates(kind, m), key=lambda config: _time(config, m, n) / rates[config])


def key(kind: str, m: int, n: int, k: int, device: str) -> str:
    """The key of a product in a tuned table; the number of rows is rounded up to a power of two."""
    return f"{device}/{kind}/{1 << max(0, m - 1).bit_length()}x{k}x{n}"


def step_of(config: Config, group_size: int) -> int:
    """Input channels per step of the product. No step crosses the end of a group."""
    step = config.block_k
    while group_size and group_size % step:
        step //= 2
    return step


def _time(config: Config, m: int, n: int) -> float:
    """Relative time of all tiles, assuming that all tilings run at the same speed."""
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    return -(-tiles // _MULTIPROCESSORS) * config.block_m * config.block_n


@functools.cache
def _tuned() -> dict[str, Config]:
    found: dict[str, Config] = {}
    for file in tuned_files():
        if file.exists():
            found |= {name: Config(**entry) for name, entry in json.loads(file.read_text(encoding="utf-8")).items()}
    return found
