"""Fixtures for all test folders."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

if gc.isenabled():
    gc.disable()  # Until all is imported, where it would take a fifth of the time.

# Traces of models of a few layers take two thirds of the time without it; it pays from about eight layers on.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this variable when it is first imported, for example by diffusers.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Compile the host code of packages in half the time. The kernels are compiled as ever, so outputs are the same.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")

from diffusers import DiTPipeline, DiTTransformer2DModel

from tests.processors import torchao_on_any_processor
from tests.sharing import shared_memos, shared_traces
from tests.tiny import make_dit, make_pipeline

__all__ = ["default_dtype", "shared_memos", "shared_traces", "tiny_dit", "tiny_pipeline", "torchao_on_any_processor"]


def pytest_collection_finish() -> None:
    """Leave what was imported out of later garbage collections, which take a twelfth of the time otherwise."""
    gc.set_threshold(10_000, 20, 20)  # Rarer than by default, with which a twentieth of the time is left.
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture
def tiny_dit() -> DiTTransformer2DModel:
    """A fresh DiT that compiles in a second."""
    return make_dit()


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    """A function that sets the default dtype of torch until the test ends."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.fixture
def tiny_pipeline() -> DiTPipeline:
    """A fresh pipeline around a tiny DiT."""
    return make_pipeline()
