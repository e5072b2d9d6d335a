"""What a search is to reach: a size, a quality or a speed."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from fxquant.errors import ConfigurationError, check_type


def check_target(size: Any, sqnr: Any, speed: Any) -> str:
    """The target in words.

    Raises:
        ConfigurationError: If not exactly one is given, or it is not a positive number.
    """
    given = {name: value for name, value in (("size", size), ("sqnr", sqnr), ("speed", speed)) if value is not None}
    if len(given) != 1:
        what = " and ".join(given) or "none"
        raise ConfigurationError(f"give exactly one of size, sqnr and speed, not {what}")
    ((name, value),) = given.items()
    check_type(name, value, Real, "a number")
    if not math.isfinite(value) or (name != "sqnr" and value <= 0):
        raise ConfigurationError(f"{name}={value} is not a target; give a positive number")
    if name == "size":
        return f"size {value:.1%} of float" if value <= 1 else f"size {value:,.0f} bytes"
    return f"SQNR {value:g} dB" if name == "sqnr" else f"calls {value:g} times faster"
