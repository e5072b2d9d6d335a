"""Empties, before a trace, the caches that calls of a model fill and that its class makes empty.

A trace on loading finds these caches empty too. A model that was called keeps tables in attributes that were None at
first, or entries in dicts. Its graph would read these tables, whereas the graph of the model that loading builds
computes them. It makes no difference which of the two is traced if a call gives the same bits from either state, and
leaves the same state behind. This is tested with each kind of call.
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
"""Values of attributes, by the name of the module or plain object that has the attribute and the attribute's name."""

_MISSING = object()  # In place of the value of an attribute that does not exist.
_MOST_TRIED = 4
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class Caches:
    """The caches of a model, and their state in the copy of it that is traced.

    Args:
        model: The model.
        skeleton: The copy of the model that is traced.
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
        """Empty the caches of the copy that a call fills again. The other caches keep their values from the model.

        Args:
            called: The model after the call.
            output: The leaves of the output of the call.
            run: Runs the call on a model whose attributes have the given values before the call. Returns that model
                and the leaves of its output.
        """
        if not self._constructed:
            return
        again = dict(self._constructed)
        for _ in range(_MOST_TRIED):
            if not again:
                break
            try:
                model, found = run(again)
            except Exception as error:  # It needs something that was set after the model was constructed.
                log.info("the model does not run in the state that its class makes: %s", error)
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
    """Set these attributes of a model and of the plain objects in it."""
    held = dict(holders(model))
    for (name, key), value in places.items():
        if value is _MISSING:
            vars(held[name]).pop(key, None)
        else:
            vars(held[name])[key] = pytree.tree_map(lambda leaf: leaf, value)  # In new containers.


def _as_constructed(model: nn.Module, timestep: str | None) -> Places:
    """The values that the class gives to the attributes that calls may have changed.

    These are attributes that hold tensors where the class makes none. If a module or object has such an attribute, its
    other attributes that differ from those that the class makes count too, such as the size that a table is for.
    """
    if not kept_tensors(model) or not is_rebuilt(model):
        return {}
    try:
        made = dict(holders(rebuilt(model, timestep).skeleton))
    except CheckpointError:  # Saving reports the reason.
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
    """Whether two states are equal, except that dicts of the first may have more entries, from other calls."""
    if isinstance(full, dict) and isinstance(part, dict):
        return all(key in full and _contains(full[key], value) for key, value in part.items())
    if isinstance(full, list) and isinstance(part, list):
        return len(full) == len(part) and all(map(_contains, full, part))
    return is_equal(full, part)
