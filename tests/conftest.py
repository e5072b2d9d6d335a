"""Fixtures that every folder of tests shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is first imported, as by diffusers.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from diffusers import DiTPipeline, DiTTransformer2DModel

from tests.tiny import make_dit, make_pipeline


@pytest.fixture
def tiny_dit() -> DiTTransformer2DModel:
    """A fresh DiT, small enough to compile in a second."""
    return make_dit()


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    """Sets the default dtype of torch until the test ends."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.fixture
def tiny_pipeline() -> DiTPipeline:
    """A fresh pipeline around such a DiT."""
    return make_pipeline()
