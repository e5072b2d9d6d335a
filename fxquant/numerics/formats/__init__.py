"""Number formats: integers, floats and block formats, as objects that passes, ops and backends share.

A format knows its grid of values, how values are encoded and decoded, and how codes and scales are stored. Formats are
registered by name; other packages add theirs through the entry points ``fxquant.formats``.
"""

from fxquant.numerics.formats.format import Format, Scales
from fxquant.numerics.formats.integers import Integer
from fxquant.numerics.formats.registry import (
    FORMATS,
    INTEGERS,
    bits_of,
    format_of,
    is_integer,
    register_format,
    top_of,
)

__all__ = [
    "FORMATS",
    "INTEGERS",
    "Format",
    "Integer",
    "Scales",
    "bits_of",
    "format_of",
    "is_integer",
    "register_format",
    "top_of",
]
