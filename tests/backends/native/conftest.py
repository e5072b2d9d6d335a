"""Makes Triton's interpreter faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fxquant.backends.native.gpu import machine


@pytest.fixture(scope="session", autouse=True)
def _patched_once() -> Iterator[None]:
    """While a kernel runs in the interpreter, replace Triton's language by numpy's once.

    The interpreter does it again for every call of a function within a kernel, which takes a third of its time.
    """
    if machine.missing(torch.device("cpu")) is not None:
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    patch_language: Callable[[Any], Any] = interpreter._patch_lang
    patched: set[frozenset[int]] = set()

    class Once:
        """What the interpreter calls when a kernel ends; it does not call it for functions within a kernel."""

        def __init__(self, scope: Any) -> None:
            self._scope = scope

        def restore(self) -> None:
            patched.clear()
            self._scope.restore()

    def once(function: Any) -> Once | None:
        seen = frozenset(
            id(value) for value in function.__globals__.values() if value is language or value is language.core
        )
        if seen in patched:
            return None
        patched.add(seen)
        return Once(patch_language(function))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield
