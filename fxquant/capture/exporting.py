"""Calls ``torch.export``, so that traces take less time and leave no memory behind."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxquant.ir.sources import forget_sources


def export(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    """Export a model by running its code.

    Args:
        model: The model; its weights may be fake tensors.
        args: The arguments of its call by position.
        kwargs: The arguments by name.
        dynamic_shapes: As for ``torch.export.export``, or None if all sizes are fixed.

    Raises:
        Exception: Any that ``torch.export.export`` or the code of the model raises.
    """
    forget_sources()
    try:
        # With open sizes, torch takes longer to find a value in the cache of fake tensors than to make it again.
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            program = torch.export.export(model, tuple(args), dict(kwargs), strict=False, dynamic_shapes=dynamic_shapes)
    except BaseException as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for value in list(frame.f_locals.values()):
                if isinstance(value, FakeTensorMode):
                    _release(value)
        raise
    for mode in _modes(program):
        # As everywhere else, for passes: they make the same values again and again.
        mode.cache_enabled = torch._dynamo.config.fake_tensor_cache_enabled
        _release(mode)
    return program


def _modes(program: torch.export.ExportedProgram) -> Iterator[FakeTensorMode]:
    found = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            found[id(value.fake_mode)] = value.fake_mode
    yield from found.values()


def _release(mode: FakeTensorMode) -> None:
    """Let the shapes of a finished trace be freed together with its graph.

    Only ``torch.export`` itself reads the inputs that it lists there. Their sizes refer to the shapes from C++, where
    the garbage collector does not look, so the shapes and the inputs would keep each other alive for ever.
    """
    if mode.shape_env is not None and mode.shape_env.tracked_fakes is not None:
        mode.shape_env.tracked_fakes = []
