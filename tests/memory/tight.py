"""A bound that is always near, so that memory is given back all the time, and files even for small tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from fxquant.memory import bound, mappings
from fxquant.memory.bound import Bound, limit_memory


@contextmanager
def tight(folder: Path) -> Iterator[Bound]:
    """Within this context memory is bounded, and every look at the resident set gives memory back."""
    with (
        mock.patch.object(mappings, "_SMALLEST", 64),
        mock.patch.object(bound, "_PATIENCE", 0.02),
        limit_memory("64GB", folder) as found,
    ):
        assert found is not None
        found._margin = found.limit
        yield found
