"""What tests of this backend need of the processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fxquant.backends.torchao import parts


@pytest.fixture(scope="module", autouse=True)
def _on_any_processor() -> Iterator[None]:
    """Graphs are the same on every processor, and uncompiled they multiply floats, which any of them does rightly."""
    with pytest.MonkeyPatch.context() as patch:
        if parts.unfit() is not None:
            patch.setattr(parts, "unfit", lambda: None)
        yield
