"""Modules that keep features in a list between calls, as the VAEs of Wan and Qwen-Image do for the chunks of a clip.

Such a module gets a list and a counter and writes into both: ``decoder(x, feat_cache=features, feat_idx=[0])``. A graph
writes into nothing. So the module is traced in a *functional* form, which takes the features and returns the new ones
beside its output, and the drop-in writes these into the caller's list.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

_LIST, _COUNTER = "feat_cache", "feat_idx"


def keeps_features(module: nn.Module) -> bool:
    """Whether a module writes features into a list that its caller hands to it."""
    return {_LIST, _COUNTER} <= inspect.signature(type(module).forward).parameters.keys()


def is_functional(module: nn.Module) -> bool:
    """Whether a module is in the functional form."""
    return isinstance(module, _Functional)


def functional(module: nn.Module) -> nn.Module:
    """The functional form of a module that keeps features; another module as it is. The tensors are shared."""
    if is_functional(module) or not keeps_features(module):
        return module
    made = copy.copy(module)
    made.__class__ = _functional_class(type(module))
    return made


_CLASSES: dict[type, type[nn.Module]] = {}


def _functional_class(cls: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return _CLASSES.setdefault(cls, type(cls.__name__, (_Functional, cls), names))


class _Functional(nn.Module):
    """Takes the features of earlier calls, and returns its output with the features for the next call."""

    def forward(self, x: Any, feat_cache: Any = None, first_chunk: bool = False) -> Any:
        known = inspect.signature(super().forward).parameters
        options = {"first_chunk": first_chunk} if "first_chunk" in known else {}
        features = None if feat_cache is None else list(feat_cache)
        output = super().forward(x, feat_cache=features, feat_idx=[0], **options)
        return output, features


def stateful(forward: Callable[..., Any], number: Callable[[], int] = lambda: 0) -> Callable[..., Any]:
    """The form of a functional module that its callers expect: it writes the features into their list.

    Args:
        forward: The functional form.
        number: Returns the number of features, for callers whose list is empty before the first chunk: Qwen-Image's VAE
            counts the layers of a module, and a graph has none.
    """
    return functools.wraps(forward)(functools.partial(_call, forward, number))


def _call(
    forward: Callable[..., Any],
    number: Callable[[], int],
    x: Any,
    feat_cache: Any = None,
    feat_idx: Any = None,
    **options: Any,
) -> Any:
    if feat_cache is None:
        return forward(x, None, **options)[0]
    output, features = forward(x, list(feat_cache) or [None] * number(), **options)
    feat_cache[:] = features
    if feat_idx is not None:
        feat_idx[0] = len(features)
    return output


def number_of_features(names: Iterable[str]) -> int:
    """The number of features among the inputs of a call, from the names of the inputs."""
    return sum(name.startswith(f"{_LIST}.") for name in names)


class Stateful(nn.Module):
    """A functional module in the form that its callers expect."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, and write the features into the caller's list."""
        return stateful(self.inner)(*args, **kwargs)
