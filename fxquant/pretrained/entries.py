"""Quantizes models with several entries, such as VAEs: their parts become graphs, and the model keeps its class."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxquant.capture.feature_caches import Stateful, functional, is_functional
from fxquant.capture.hooks import refuse_hooks
from fxquant.capture.rebuilding import config_of
from fxquant.capture.whole import MARK, Whole, made_part
from fxquant.errors import AlreadyCompiledError, ConfigurationError
from fxquant.pipeline.recipes import Recipe
from fxquant.pretrained.together import compile_together
from fxquant.runtime.float_model import dtype_of
from fxquant.runtime.offloading import meanwhile_on_its_device
from fxquant.runtime.parts import entries_of, has_entries, quantized_parts, replaced_methods
from fxquant.storage.parts import made_of_parts

REQUIRED = "decoder"
"""The part that every calibration has to call. The encoder is quantized only if it is called, as in image-to-image."""
_OF_ONE_PART = ("plan", "statistics", "resume")


@meanwhile_on_its_device
def compile_parts(
    model: Any,
    *,
    recipe: str | Recipe,
    calibrate: Callable[[], Any] | None,
    parts: Sequence[str] | None = None,
    **options: Any,
) -> Any:
    """Quantize the parts of a model that has several entries, such as a VAE with ``encode`` and ``decode``.

    The model stays a model of its class: tiling, slicing, its config and its float layers work as before. Its decoder
    becomes a graph, and its encoder does if ``calibrate`` calls it. Each part captures further graphs for the sizes of
    tiles and of other images. This serves any model whose class has a method ``decode`` that calls a module
    ``decoder``; modules of other names are not looked for.

    Args:
        model: A VAE of diffusers, such as ``pipe.vae``, in evaluation mode. It does not change.
        recipe: As for :func:`fxquant.compile`. ``rtn-w8a16`` keeps activations float and serves convolutions of images
            and of clips; ``rtn-w8a8`` those of images. A part has no timestep.
        calibrate: Encodes and decodes with the model in the way in which it will be used.
        parts: Names of the parts that are quantized; by default the decoder, and the encoder if it is called.
        options: As for :func:`fxquant.compile`. ``layers`` is ``"all"`` by default, because convolutions are almost all
            that a VAE has.

    Returns:
        A model of the same class with quantized parts, to put in the pipeline in place of ``model``. It shares with
        ``model`` what stayed float.

    Raises:
        AlreadyCompiledError: If a part is quantized already.
        ConfigurationError: If the model has no such parts, would be converted to float32 by pipelines
            (``force_upcast`` in float16), or has hooks that a graph cannot have; or if an option belongs to one part:
            ``plan``, ``statistics``, ``resume``.
        CalibrationError: If ``calibrate`` never decodes.
        FxquantError: What :func:`fxquant.compile` raises; the message begins with the name of the part.
    """
    for name in _OF_ONE_PART:
        if options.get(name) is not None:
            raise ConfigurationError(f"{name} belongs to one graph, and each part of this model is one; leave it out")
    check_entries(model)
    named = named_parts(model, parts)
    options = part_options(options) | {"recipe": recipe}
    with compilable(model, named) as models:
        made = compile_together(models, calibrate, lambda _: options, optional_of(named, parts))
    return made_of_parts(model, made)


def part_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of :func:`fxquant.compile` as a part takes them: without a timestep, and all layers by default."""
    layers = options.get("layers", "default")
    return {**options, "timestep": None, "layers": "all" if layers == "default" else layers}


def check_entries(model: Any) -> None:
    """Refuse a model whose parts cannot be quantized.

    Raises:
        AlreadyCompiledError: If they are quantized already.
        ConfigurationError: Says what to do.
    """
    if "_orig_mod" in getattr(model, "_modules", ()):  # Of torch.compile.
        raise ConfigurationError(
            "this model went through torch.compile; give the original to fxquant, and the result to torch.compile"
        )
    if not has_entries(model):
        raise ConfigurationError(
            f"a {type(model).__name__} is not a model with a method decode and a decoder; give a VAE, such as "
            "pipe.vae, and any other model to fxquant.compile"
        )
    done = quantized_parts(model)
    if done:
        raise AlreadyCompiledError(
            f"the {' and the '.join(done)} of this {type(model).__name__} were made by fxquant; give the original "
            "float model"
        )
    if getattr(model.config, "force_upcast", False) and dtype_of(model) is torch.float16:
        raise ConfigurationError(
            f"pipelines convert this {type(model).__name__} to float32 for each image, because its config says "
            "force_upcast and it is in float16, and quantized parts would be traced again each time. Load it in "
            "bfloat16 or float32: "
            'from_pretrained(..., dtype={"vae": torch.bfloat16, "default": torch.float16})'
        )
    replaced = replaced_methods(model)
    if replaced:
        name = replaced[0]
        raise ConfigurationError(
            f"the method {name!r} of this {type(model).__name__} was replaced on the object, by torch.compile or by "
            f"another function, which would call the float parts. Undo it (del model.{name}), give the model to "
            "fxquant, and replace the method of the result"
        )
    refuse_hooks(model)


def named_parts(model: nn.Module, parts: Sequence[str] | None) -> list[str]:
    """The parts to quantize by name, with those that calibration need not call first."""
    known = entries_of(model)
    if parts is not None and not [*parts]:
        raise ConfigurationError(f"parts names nothing; this {type(model).__name__} has {', '.join(known)}")
    for name in parts or ():
        if name not in known:
            raise ConfigurationError(f"this {type(model).__name__} has no part {name!r}; it has {', '.join(known)}")
    return known if parts is None else [name for name in known if name in parts]


def optional_of(names: Sequence[str], parts: Sequence[str] | None = None) -> list[str]:
    """The parts that are left out if calibration does not call them; none if the caller named the parts."""
    return [name for name in names if name != REQUIRED] if parts is None else []


@contextlib.contextmanager
def compilable(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, nn.Module]]:
    """The parts of a model in the form in which they are compiled; within this context the model calls this form.

    They say which model they belong to (:mod:`fxquant.capture.whole`), and parts that write features into lists of
    their caller return these (:mod:`fxquant.capture.feature_caches`).
    """
    before = {name: mark(model, name) for name in names}
    found = {name: functional(part) for name, part in before.items()}
    try:
        for name, part in found.items():
            model._modules[name] = Stateful(part) if is_functional(part) else part
        yield found
    finally:
        for name, part in before.items():
            model._modules[name] = part
            vars(part).pop(MARK, None)


def mark(model: nn.Module, name: str) -> nn.Module:
    """Let a part of a model say which model it belongs to, and return the part."""
    part: nn.Module = getattr(model, name)
    return made_part(part, Whole(type(model), config_of(model), name))
