"""What tests need of the processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fxquant.backends.torchao import parts


@pytest.fixture(scope="module")
def torchao_on_any_processor() -> Iterator[None]:
    """The backend ``torchao`` converts also where its fused products would saturate.

    Its graphs are the same on every processor, and until ``torch.compile`` fuses them with the compiler ``inductor``
    they multiply floats, which any processor does rightly.
    """
    with pytest.MonkeyPatch.context() as patch:
        if parts.unfit() is not None:
            patch.setattr(parts, "unfit", lambda: None)
        yield
