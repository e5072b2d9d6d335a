"""Salience of channels before and after balancing: the largest magnitudes of inputs and weights, over timesteps.

PTQ4DiT (arXiv 2405.16005) shows these figures. Inputs come from the statistics of a calibration; weights from a
quantized model, a checkpoint or the float model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fxquant.disk.files import blaming
from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.inspect.plans import checkpoint_folder
from fxquant.ir.tensors import weights_of
from fxquant.numerics.formats import Scales
from fxquant.numerics.weights import dequantize_weight
from fxquant.planning.context import PassContext
from fxquant.planning.layer_inputs import layer_input
from fxquant.planning.plan import Plan
from fxquant.planning.uses import unnumbered
from fxquant.runtime.model import GraphModel
from fxquant.runtime.wrappers import unwrapped
from fxquant.statistics.collection import Statistics
from fxquant.storage.agreement import check_headers
from fxquant.storage.weights import headers_of, weight_names

_CODES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale")


@dataclass(frozen=True, eq=False)
class Salience:
    """The salience of the input channels of one layer, C channels at T timesteps.

    Attributes:
        layer: Name of the layer.
        timesteps: The timesteps, ascending.
        before: Largest magnitude of each channel of the input, float64 ``[T, C]``.
        after: The same for the shifted and balanced input; None if the plan has neither for the layer.
        weight_before: Largest magnitude of each column of the weight, float64 ``[C]``; None if no weight was given.
        weight_after: The same for the balanced weight; None without a weight or a balance.
    """

    layer: str
    timesteps: list[float]
    before: Tensor
    after: Tensor | None
    weight_before: Tensor | None
    weight_after: Tensor | None


def salience(plan: Plan, statistics: Statistics, layer: str, weights: Mapping[str, Tensor] | None = None) -> Salience:
    """The salience of one layer's channels.

    Args:
        plan: What was decided.
        statistics: Statistics of the calibration.
        layer: Name of a linear whose input was observed.
        weights: What :func:`weight_salience` returns.

    Raises:
        CalibrationError: If the plan has no such layer, calibration never reached its input, or the statistics are of
            another model or of other timesteps.
    """
    found = plan.layer(layer)
    observed = statistics[found.observed or layer]
    _check_origin(plan, statistics, layer)
    factor = plan.vectors.get(layer)
    is_moved = factor is not None or f"{layer}.shift" in plan.vectors
    balanced = None if weights is None else weights.get(layer)
    before = balanced if balanced is None or factor is None else balanced / factor.double()
    return Salience(
        layer,
        observed.timesteps.tolist(),
        observed.absmax.double(),
        layer_input(PassContext(plan, statistics), layer).absmax if is_moved else None,
        before,
        None if factor is None else balanced,
    )


def _check_origin(plan: Plan, statistics: Statistics, layer: str) -> None:
    """Refuse statistics of another model, or of a calibration at other timesteps than those of the plan."""
    found = plan.layer(layer)
    channels, expected = statistics[found.observed or layer].absmax.shape[-1], found.shape[1]
    advice = "give the file that fxquant quantize --keep-statistics wrote for this model"
    if channels != expected:
        raise CalibrationError(
            f"the statistics belong to another model: the input of {layer} has {channels} channels in them, and "
            f"{expected} in the plan; {advice}"
        )
    if missing := sorted(set(plan.timesteps) - set(statistics.timesteps.tolist())):
        raise CalibrationError(
            f"the statistics belong to another calibration: the model was calibrated at timestep {missing[0]:g}, which "
            f"they do not hold; {advice}"
        )


def layers_with_salience(plan: Plan, statistics: Statistics) -> list[str]:
    """One linear for each observed input: the one that the statistics are named after, or the first that reads it."""
    first: dict[str, str] = {}
    for name, layer in plan.layers.items():
        key = layer.observed or name
        if layer.kind == "linear" and key in statistics and (key not in first or name == key):
            first[key] = name
    return list(first.values())


def weight_salience(source: nn.Module | str | Path, plan: Plan) -> dict[str, Tensor]:
    """Largest magnitude of each column of the linears' weights as they were quantized, float64 ``[C]`` by layer.

    Args:
        source: A quantized model, the folder of a checkpoint, or the float model that was quantized. The weights of the
            float model are balanced here; those of the others are what their codes stand for, rounded. Those also hold
            the factors that the rows of a weight absorbed for another layer.
        plan: What was decided.

    Raises:
        CheckpointError: If the folder holds no checkpoint, or its tensors cannot be read.
        ConfigurationError: If the source is none of these.
    """
    if not isinstance(source, (str, Path)):
        return _largest(_weights(source, plan))
    folder = checkpoint_folder(source)
    paths = [folder / name for name in weight_names(path.name for path in folder.iterdir())]
    with blaming(paths[0]), ExitStack() as stack:
        check_headers(plan, headers_of(paths))
        files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
        held = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        return _largest(_dequantized(plan, lambda name: held[name].get_tensor(name) if name in held else None))


def _largest(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: weight.detach().double().abs().amax(0).cpu() for name, weight in weights}


def _weights(source: nn.Module, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    model = unwrapped(source)
    if isinstance(model, GraphModel):
        tensors = {} if model.backend is None else model.stored_tensors()
        yield from _dequantized(plan, tensors.get)
    elif isinstance(model, nn.Module):
        yield from _balanced(plan, weights_of(model))
    else:
        raise ConfigurationError(f"weights come from a model or from the folder of a checkpoint, not {source!r}")


def _dequantized(plan: Plan, read: Callable[[str], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    for name, layer in plan.layers.items():
        if layer.kind != "linear":
            continue
        stem = unnumbered(name)
        codes, scale, zero_point, global_scale = (read(f"{stem}.{part}") for part in _CODES)
        format = layer.format_of_weight
        if codes is not None and scale is not None and format is not None:
            scales = Scales(scale, zero_point, global_scale)
            yield (
                name,
                dequantize_weight(codes, scales, format.name, layer.group_size, layer.shape[1], torch.float32),
            )
        elif (weight := read(f"{stem}.weight")) is not None and weight.dim() == 2:
            yield name, weight


def _balanced(plan: Plan, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, layer in plan.layers.items():
        weight = weights.get(f"{unnumbered(name)}.weight")
        if layer.kind == "linear" and weight is not None and weight.dim() == 2:
            factor = plan.vectors.get(name)
            yield name, weight if factor is None else weight.double() * factor.to(weight.device, torch.float64)
