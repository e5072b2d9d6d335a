"""Caches that calls of a model fill and that its class makes empty. A trace gets them empty, as it does on loading.

A model that was called keeps tables in attributes that were None at first, or entries in dicts. Its graph would read
them, and that of the model which loading builds computes them. Which of the two is traced makes no difference if a call
gives the same bits from either state, and leaves the same state behind. That is tried with each kind of call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.capture.rebuilding import is_rebuilt, rebuilt
from fxquant.capture.state import attributes, frozen, holders, is_equal, is_plain_object, kept_tensors
from fxquant.errors import CheckpointError

log = logging.getLogger(__name__)

Places = dict[tuple[str, str], Any]
"""Attributes with values, by the name of the module or plain object that has them and their own."""

_MISSING = object()  # In place of the value of an attribute that is not there.
_MOST_TRIED = 4
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class Caches:
    """The caches of a model, and their state in the copy of it that is traced.

    Args:
        model: The model.
        skeleton: The copy of it.
        timestep: Name of the ``forward`` argument that holds the timestep.
    """

    def __init__(self, model: nn.Module, skeleton: nn.Module, timestep: str | None) -> None:
        self._skeleton = skeleton
        self._constructed = _as_constructed(model, timestep)
        held = dict(holders(skeleton))
        self._filled: Places = {(name, key): vars(held[name])[key] for name, key in self._constructed}

    def empty(
        self, called: nn.Module, output: Sequence[Any], run: Callable[[Places], tuple[nn.Module, Sequence[Any]]]
    ) -> None:
        """Empty those in the copy that a call fills again, and leave the others as they are in the model.

        Args:
            called: The model after the call.
            output: The leaves of what it returned.
            run: The same for a model in which these attributes had these values before the call.
        """
        if not self._constructed:
            return
        again = dict(self._constructed)
        for _ in range(_MOST_TRIED):
            if not again:
                break
            try:
                model, found = run(again)
            except Exception as error:  # Something that was put there after the model was constructed.
                log.info("the model does not run as its class makes it: %s", error)
                model, found = called, ()
            if not is_equal(list(output), list(found)):
                again.clear()
                break
            kept, made = dict(holders(called)), dict(holders(model))
            lost = [place for place in again if not _contains(_value(kept, place), _value(made, place))]
            if not lost:
                break
            for place in lost:
                del again[place]
        else:
            again.clear()
        put(self._skeleton, self._filled | again)


def put(model: nn.Module, places: Places) -> None:
    """Give attributes of a model and of plain objects in it these values."""
    held = dict(holders(model))
    for (name, key), value in places.items():
        if value is _MISSING:
            vars(held[name]).pop(key, None)
        else:
            vars(held[name])[key] = pytree.tree_map(lambda leaf: leaf, value)  # Containers of its own.


def _as_constructed(model: nn.Module, timestep: str | None) -> Places:
    """What the class puts where the model holds something that calls may have put there.

    That is in attributes with tensors where the class makes none, and in others of the same module or object that are
    not as the class makes them, such as the size that a table is for.
    """
    if not kept_tensors(model) or not is_rebuilt(model):
        return {}
    try:
        made = dict(holders(rebuilt(model, timestep).skeleton))
    except CheckpointError:  # Saving says why.
        return {}
    found: Places = {}
    for name, holder in holders(model):
        if name not in made:
            continue
        was, now = attributes(made[name]), attributes(holder)
        changed = {
            key: was.get(key, _MISSING)
            for key in now
            if _is_plain(was.get(key, _MISSING)) and not is_equal(frozen(was.get(key, _MISSING)), frozen(now[key]))
        }
        if any(_holds_tensors(now[key]) for key in changed):
            found |= {(name, key): value for key, value in changed.items()}
    return found


def _is_plain(value: Any) -> bool:
    return value is _MISSING or all(isinstance(leaf, _PLAIN) for leaf in pytree.tree_leaves(value))


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) or is_plain_object(leaf) for leaf in pytree.tree_leaves(value))


def _value(held: Mapping[str, Any], place: tuple[str, str]) -> Any:
    name, key = place
    return frozen(vars(held[name]).get(key, _MISSING)) if name in held else None


def _contains(full: Any, part: Any) -> bool:
    """Whether two states are the same, but that dicts of the first may have further entries, of other calls."""
    if isinstance(full, dict) and isinstance(part, dict):
        return all(key in full and _contains(full[key], value) for key, value in part.items())
    if isinstance(full, list) and isinstance(part, list):
        return len(full) == len(part) and all(map(_contains, full, part))
    return is_equal(full, part)
