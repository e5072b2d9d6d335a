"""The noise that batches of a pipeline draw from a generator, drawn without running the model.

Batches of a calibration share one generator. A process that runs only some of them first draws, and drops, what the
batches before would have drawn. A dry run of one batch shows what that is: the pipeline runs with zeros in place of the
outputs of its models, and every draw from the generator is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxquant.calibration.attributes import instance_attribute


class Draws(TorchFunctionMode):
    """As a context, records what is drawn from a generator.

    Args:
        generator: The generator.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator
        self._drawn: list[tuple[Callable[..., Any], list[Any], Any]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function of torch, and record it if it draws from the generator."""
        given = dict(kwargs or {})
        if given.get("generator") is self._generator:
            leaves, structure = pytree.tree_flatten((tuple(args), {**given, "generator": None}))
            self._drawn.append((func, _described(leaves), structure))
        return func(*args, **given)

    def repeat(self, generator: torch.Generator) -> None:
        """Draw the same from another generator, and drop it."""
        for func, held, structure in self._drawn:
            leaves = [leaf.made() if isinstance(leaf, _Like) else leaf for leaf in held]
            args, kwargs = pytree.tree_unflatten(leaves, structure)
            func(*args, **{**kwargs, "generator": generator})


class _Like:
    """A tensor that is filled with noise, without its values."""

    def __init__(self, tensor: Tensor) -> None:
        self._shape, self._dtype, self._device = tuple(tensor.shape), tensor.dtype, tensor.device

    def __repr__(self) -> str:
        return f"{self._dtype}{self._shape}"

    def made(self) -> Tensor:
        """A tensor of the same shape."""
        return torch.empty(self._shape, dtype=self._dtype, device=self._device)


def _described(leaves: Sequence[Any]) -> list[Any]:
    return [_Like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


@contextmanager
def without_models(models: Sequence[nn.Module]) -> Iterator[None]:
    """Within this context, models return zeros. Each runs once for each kind of call, for the form of its output."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(instance_attribute(model, "forward", _stand_in(model.forward)))
        yield


def _stand_in(forward: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[str, Any] = {}

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        key = f"{structure}{_described(leaves)}"
        if key not in known:
            with torch.no_grad():
                known[key] = pytree.tree_map_only(Tensor, torch.zeros_like, forward(*args, **kwargs))
        return pytree.tree_map_only(Tensor, torch.clone, known[key])

    return stand_in
