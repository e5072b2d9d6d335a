"""What tests of this backend need of the processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fxquant.backends.torchao import parts

UNFIT = parts.unfit()
"""Why this processor cannot run the integer products, or None if it can."""


@pytest.fixture(scope="module", autouse=True)
def _on_any_processor(request: pytest.FixtureRequest) -> Iterator[None]:
    """Graphs are the same on every processor, and uncompiled they multiply floats, which any of them does rightly."""
    if UNFIT is not None and request.module.__name__.endswith("test_compiled"):
        pytest.skip(UNFIT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "unfit", lambda: None)
        yield
