"""Empties tables in ``functools.lru_cache``, so that a trace computes them in its graph and leaves no fake tensors.

A trace that finds such a cache empty fills it with tensors without values, which the float model would read in all
later calls. A trace that finds the cache full makes the table a constant. The graph then depends on what ran before in
the process, and loading in a new process would trace another graph.
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

_FUNCTIONS = frozenset({functools._lru_cache_wrapper, staticmethod, classmethod})


class Memos:
    """The caches of functions in this process, as they were when this object was made."""

    def __init__(self) -> None:
        self._memos = _all()
        self._modules = len(sys.modules)
        self._hits = {id(memo): memo.cache_info().hits for memo in self._memos}

    def read(self) -> list[Memo]:
        """The caches that have returned a result since then, and that hold tensors from before the trace."""
        used = [memo for memo in self._memos if memo.cache_info().hits > self._hits[id(memo)]]
        return [memo for memo in used if any(isinstance(held, Tensor) and not is_fake(held) for held in _held(memo))]

    def forget_traced(self) -> None:
        """Empty the caches that hold tensors of a trace."""
        for memo in self._memos if len(sys.modules) == self._modules else _all():
            if memo.cache_info().currsize and any(isinstance(held, Tensor) and is_fake(held) for held in _held(memo)):
                memo.cache_clear()


def _all() -> list[Memo]:
    """The caches of functions and methods in Python modules and in their classes.

    The garbage collector knows all caches, but its list also references tuples that other threads are still filling.
    These threads then raise SystemError.
    """
    found: dict[int, Memo] = {}

    def attributes(holder: types.ModuleType | type) -> list[Any]:
        """The attributes of a module or class. Those that are caches are added to ``found``."""
        values = list(vars(holder).values())
        # Types are compared because isinstance would access __class__ of arbitrary objects. All are compared at once
        # because a process has hundreds of thousands of attributes.
        if not _FUNCTIONS.isdisjoint(map(type, values)):
            for one in values:
                function = one.__func__ if type(one) in (staticmethod, classmethod) else one
                if type(function) is functools._lru_cache_wrapper:
                    found[id(function)] = function
        return values

    for name, module in list(sys.modules.items()):
        for value in attributes(module) if isinstance(module, types.ModuleType) else ():
            if type(value) is type and value.__module__ == name:
                attributes(value)
    return list(found.values())


def _held(memo: Memo) -> Iterator[Any]:
    """What a cache holds: results, arguments, and anything else that the garbage collector finds there."""
    for found in gc.get_referents(memo):
        yield from pytree.tree_leaves(list(found.values()) if type(found) is dict else found)
