"""Tables in ``functools.lru_cache``: a trace computes them in its graph, and leaves none of its tensors behind.

A trace that finds such a cache empty fills it with tensors without values, which the float model would get from there
ever after. One that finds it full makes the table a constant, so that the graph depends on what ran before in the
process: the one that loading traces in a new process would be another.
"""

from __future__ import annotations

import functools
import gc
import sys
import types
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
    """Those of modules and of classes in them, of functions or methods.

    The garbage collector knows all, but what it lists holds on to tuples that other threads are about to fill, which
    then raise SystemError.
    """
    found: dict[int, Memo] = {}
    for name, module in list(sys.modules.items()):
        for value in list(vars(module).values()) if isinstance(module, types.ModuleType) else ():
            own = type(value) is type and value.__module__ == name
            for one in [value, *list(vars(value).values())] if own else [value]:
                function = one.__func__ if type(one) in (staticmethod, classmethod) else one  # isinstance asks objects.
                if type(function) is functools._lru_cache_wrapper:
                    found[id(function)] = function
    return list(found.values())


def _held(memo: Memo) -> Iterator[Any]:
    """What a cache holds: results, and arguments, among what else the garbage collector finds there."""
    for found in gc.get_referents(memo):
        yield from pytree.tree_leaves(list(found.values()) if type(found) is dict else found)
