"""Defines the operators of lowered graphs as PyTorch custom operators `torch.ops.fxquant_native.*`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxquant.numerics import grids

library = torch.library.Library("fxquant_native", "DEF")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that kernels read and write."""

BUILT: set[str] = set()
"""Full names of the ops that only a compiled library runs."""


_PROCESSORS = ("CPU", "MkldnnCPU")  # A prepacked weight among the arguments dispatches to the second.


def define_kernel(
    schema: str,
    kernel: Callable[..., Tensor | tuple[Tensor, ...]] | None,
    fake: Callable[..., Tensor | tuple[Tensor, ...]],
    keys: tuple[str, ...] = _PROCESSORS,
) -> None:
    """Define an op that stays a single op in graphs.

    Args:
        schema: The schema of the op.
        kernel: The function that runs the op; None if a compiled library registers it.
        fake: Function that gives the shape and dtype of the result.
        keys: Dispatch keys for which the kernel runs.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if kernel is None:
        BUILT.add(f"fxquant_native::{name}")
    else:
        for key in keys:
            library.impl(name, kernel, key)
    torch.library.register_fake(f"fxquant_native::{name}", fake, lib=library)


def define_composite(schema: str, kernel: Callable[..., Tensor]) -> None:
    """Define an op that decomposes into ATen ops when a graph is compiled."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(schema.partition("(")[0], kernel, "CompositeImplicitAutograd")


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmax: int) -> Tensor:
    """`fxquant::quantize` to uint8 codes of 0 to `qmax`, bit for bit, as ops that can be fused."""
    return grids.quantize(x, scale, zero_point, 0, qmax).to(torch.uint8)


define_composite("quantize(Tensor x, Tensor scale, Tensor zero_point, int qmax) -> Tensor", quantize)


def fake_weight_only_linear(x: Tensor, *arguments: Any) -> Tensor:
    """The result of a linear of float activations, without values; its last argument is the output channels."""
    out_features = arguments[-1]
    return x.new_empty((*x.shape[:-1], out_features))
