"""Tables in ``functools.lru_cache``: a trace computes them in its graph, and leaves none of its tensors behind.

A trace that finds such a cache empty fills it with tensors without values, which the float model would get from there
ever after. One that finds it full makes the table a constant, so that the graph depends on what ran before in the
process: the one that loading traces in a new process would be another.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from typing import Any, TypeAlias

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree

Memo: TypeAlias = "functools._lru_cache_wrapper[Any]"


class Memos:
    """The caches of functions in this process, from the time at which this is made."""

    def __init__(self) -> None:
        self._memos = _all()
        self._modules = len(sys.modules)
        self._hits = {id(memo): memo.cache_info().hits for memo in self._memos}

    def read(self) -> list[Memo]:
        """Those that have given a result since, and hold tensors from before the trace."""
        used = [memo for memo in self._memos if memo.cache_info().hits > self._hits[id(memo)]]
        return [memo for memo in used if any(isinstance(held, Tensor) and not is_fake(held) for held in _held(memo))]

    def forget_traced(self) -> None:
        """Empty those that hold tensors of a trace."""
        for memo in self._memos if len(sys.modules) == self._modules else _all():
            if memo.cache_info().currsize and any(isinstance(held, Tensor) and is_fake(held) for held in _held(memo)):
                memo.cache_clear()


def _all() -> list[Memo]:
    return [found for found in gc.get_objects() if type(found) is functools._lru_cache_wrapper]


def _held(memo: Memo) -> Iterator[Any]:
    """What a cache holds: results, and arguments, among what else the garbage collector finds there."""
    for found in gc.get_referents(memo):
        yield from pytree.tree_leaves(list(found.values()) if type(found) is dict else found)
