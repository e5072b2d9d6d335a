"""Refuses configs of diffusers that would fail in the middle of a generation, or be of no effect."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import ConfigurationError


@dataclass(frozen=True)
class _Kind:
    """What a field may hold: a check, and the same in words."""

    fits: Callable[[Any], bool]
    words: str

    def or_none(self) -> _Kind:
        return _Kind(lambda value: value is None or self.fits(value), f"{self.words}, or None")


_TRUTHS: tuple[type, ...] = (bool,)
"""Numbers of Python that are none here."""


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and type(value) not in _TRUTHS and not math.isnan(value)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and type(value) not in _TRUTHS and int(value) >= least


def _are_ratios(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and len(value) > 0 and bool(value.isfinite().all())


def _is_range(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_number, value)) and value[0] < value[1]


def _are_patterns(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not all(isinstance(pattern, str) for pattern in value):
        return False
    try:
        for pattern in value:
            re.compile(pattern)
    except re.error:
        return False
    return True


_NUMBER = _Kind(_is_number, "a number")
_SHARE = _Kind(lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
_FROM_0 = _Kind(lambda value: _is_count(value, 0), "a whole number from 0 on")
_FROM_1 = _Kind(lambda value: _is_count(value, 1), "a whole number from 1 on")
_RATIOS = _Kind(_are_ratios, "finite numbers, one for each step")
_RANGE = _Kind(_is_range, "two timesteps, the lower one first")
_PATTERNS = _Kind(_are_patterns, "a list of regular expressions for names of modules")
_CALLABLE = _Kind(callable, "a function that returns the timestep, such as lambda: pipe.current_timestep")
_DTYPE = _Kind(
    lambda value: isinstance(value, torch.dtype) and value.is_floating_point, "a floating-point dtype of torch"
)

_PARTS = ("spatial", "temporal", "cross")
_FIELDS: Mapping[str, Mapping[str, _Kind]] = {
    "FirstBlockCacheConfig": {"threshold": _NUMBER},
    "MagCacheConfig": {
        "threshold": _NUMBER,
        "max_skip_steps": _FROM_0,
        "retention_ratio": _SHARE,
        "num_inference_steps": _FROM_1,
        "mag_ratios": _RATIOS.or_none(),
    },
    "TaylorSeerCacheConfig": {
        "cache_interval": _FROM_1,
        "disable_cache_before_step": _FROM_0,
        "disable_cache_after_step": _FROM_0.or_none(),
        "max_order": _FROM_0,
        "taylor_factors_dtype": _DTYPE.or_none(),
        "skip_predict_identifiers": _PATTERNS.or_none(),
        "cache_identifiers": _PATTERNS.or_none(),
    },
    "PyramidAttentionBroadcastConfig": {
        **{f"{part}_attention_block_skip_range": _FROM_1.or_none() for part in _PARTS},
        **{f"{part}_attention_timestep_skip_range": _RANGE for part in _PARTS},
        **{f"{part}_attention_block_identifiers": _PATTERNS for part in _PARTS},
        "current_timestep_callback": _CALLABLE,
    },
}
"""By name of the class of diffusers: what its fields may hold."""


def check_fields(config: Any, name: str) -> None:
    """Check the values of a config.

    Args:
        config: The config.
        name: Name of the class of diffusers that it is of.

    Raises:
        ConfigurationError: Names the field, and what it may hold.
    """
    for field, kind in _FIELDS[name].items():
        value = getattr(config, field)
        if field == "mag_ratios" and config.calibrate:
            continue
        if not kind.fits(value):
            raise ConfigurationError(f"{name}({field}={value!r}) cannot be used: {field} is {kind.words}")
