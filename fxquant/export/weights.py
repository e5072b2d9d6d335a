"""The weights of a quantized model under the names of its float model, for formats that hold weights and no graph.

Such a format is read by code of the model's class. So the graph must be that of the class: factors and shifts must have
been absorbed in place, and only linears may hold codes. Tables and convolutions are written as floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxquant.errors import BackendError, ConfigurationError
from fxquant.export.limits import format_of_weight, refuse
from fxquant.ir.arguments import args
from fxquant.ir.meta import LAYER, NAMES
from fxquant.ir.places import place_of
from fxquant.ir.tensors import get_tensor, read_tensors
from fxquant.numerics.formats import Scales, bits_of, is_integer
from fxquant.numerics.packing import unpack
from fxquant.numerics.weights import dequantize_weight
from fxquant.runtime.float_model import check_storage
from fxquant.runtime.given import quantized_model
from fxquant.runtime.lora import refuse_loaded
from fxquant.runtime.model import GraphModel

IN_PLACE = (
    "remove-no-ops,assign-precision{precision=w8a8} ; balance-channels{salience=max dearest=in-place},"
    "absorb-affines{dearest=in-place},quantize-linears{symmetric=True},quantize-embeddings"
)
"""A recipe whose result every format holds."""

_ops = torch.ops.fxquant
_QUANTIZED = (_ops.linear.default, _ops.conv2d.default, _ops.dequantize_weight.default)
_SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")


@dataclass(frozen=True)
class Codes:
    """The weight of one linear.

    Attributes:
        codes: Codes from 0, uint8 ``[out, in]``.
        scales: Scales and zero points, ``[rows, groups]``; ``rows`` is ``out`` if no output channels share a scale.
        format: Name of the number format.
        group_size: Input channels per group; 0 for one group per row.
    """

    codes: Tensor
    scales: Scales
    format: str
    group_size: int

    @property
    def scale(self) -> Tensor:
        """The scales as they are stored."""
        return self.scales.scale

    @property
    def zero_point(self) -> Tensor:
        """The code of 0, uint8 ``[out, groups]``, of integers."""
        assert self.scales.zero_point is not None
        return self.scales.zero_point

    @property
    def unfit(self) -> str | None:
        """Why a form of integers with a scale per row or group cannot hold this; None if it can."""
        if not is_integer(self.format):
            return f"weights in the format {self.format}"
        return None if len(self.scale) == len(self.codes) else "scales that several output channels share"

    @property
    def symmetric(self) -> bool:
        """Whether 0 is the middle code everywhere."""
        return bool((self.zero_point == self.middle).all())

    @property
    def signed(self) -> Tensor:
        """The codes from -128 to 127, int8; symmetric grids have their 0 at 0."""
        return (self.codes.to(torch.int16) - self.middle).to(torch.int8)

    @property
    def signed_zero_point(self) -> Tensor:
        """The code of 0 among :attr:`signed`, int8."""
        return (self.zero_point.to(torch.int16) - self.middle).to(torch.int8)

    @property
    def middle(self) -> int:
        """The middle code."""
        return int(2 ** (bits_of(self.format) - 1))


@dataclass(frozen=True)
class ClassWeights:
    """What the class of a model reads.

    Attributes:
        codes: Weights of linears, by layer.
        floats: All other tensors of the state dict, by name.
    """

    codes: dict[str, Codes]
    floats: dict[str, Tensor]


def codes_for(
    model: nn.Module, asked: str, format_name: str, original: nn.Module | None = None
) -> tuple[GraphModel, ClassWeights]:
    """The quantized model of a call, and its tensors under the names of its class, for a format that holds weights.

    Args:
        model: What the caller gave.
        asked: The function that was called, for messages.
        format_name: Name of the format, for messages.
        original: The float model, from which tensors come that no call of the quantized one read.

    Raises:
        ConfigurationError: If the model is not quantized, or its graph is not that of the class.
        AdapterError: If it has LoRAs.
        BackendError: If it was lowered to another backend.
    """
    made, _ = quantized_model(model, asked)
    refuse_loaded(made, format_name)
    require_codes(made, format_name)
    return made, class_weights(made, format_name, original)


def rows_of(found: ClassWeights, format_name: str) -> dict[str, Tensor]:
    """The tensors of a format with int8 weights (``[out, in]``) and a float32 scale per row (``[out, 1]``), by name.

    Raises:
        ConfigurationError: As :func:`refuse_grids`.
    """
    refuse_grids(found, format_name)
    tensors = dict(found.floats)
    for name, weight in found.codes.items():
        tensors[f"{name}.weight"] = weight.signed
        tensors[f"{name}.weight_scale"] = weight.scale.float()
    return tensors


def require_codes(model: GraphModel, format_name: str) -> None:
    """Refuse a model whose backend repacked the codes of its weights.

    Raises:
        BackendError: Says how to load it instead.
    """
    if model.backend is not None and model.backend.name != "fake-quant":
        raise BackendError(
            f"this model was lowered to the backend {model.backend.name}, and {format_name} needs its codes; load it "
            'with fxquant.load(folder, backend="fake-quant"), or compile it with that backend'
        )


def refuse_grids(found: ClassWeights, format_name: str) -> None:
    """Refuse weights that do not have one scale per row and their 0 at 0.

    Raises:
        ConfigurationError: Lists the layers, and a recipe that fits.
    """
    reasons: dict[str, list[str]] = {}
    for name, weight in found.codes.items():
        if weight.unfit is not None:
            reasons.setdefault(weight.unfit, []).append(name)
        elif weight.group_size:
            reasons.setdefault(f"weights in groups of {weight.group_size}", []).append(name)
        elif not weight.symmetric:
            reasons.setdefault("weight grids that are not symmetric about 0", []).append(name)
    refuse(format_name, reasons, f"use a recipe with symmetric weights, without groups, such as\n  {IN_PLACE}")


def refuse_floats(found: ClassWeights, format_name: str) -> None:
    """Refuse weights that are not integers with a scale for each row or group.

    Raises:
        ConfigurationError: Lists the layers, and a recipe that fits.
    """
    reasons: dict[str, list[str]] = {}
    for name, weight in found.codes.items():
        if weight.unfit is not None:
            reasons.setdefault(weight.unfit, []).append(name)
    refuse(format_name, reasons, f"use a recipe with integers and a scale per channel or group, such as\n  {IN_PLACE}")


def class_weights(model: GraphModel, format_name: str, original: nn.Module | None = None) -> ClassWeights:
    """The tensors of a quantized model under the names of its class.

    Args:
        model: A quantized model with the backend ``fake-quant``.
        format_name: Name of the format, for messages.
        original: The float model, from which tensors come that no call of the quantized one read.

    Raises:
        ConfigurationError: If the graph is not that of the class: a factor is multiplied at run time, a tensor was
            added or copied, a bias depends on the timestep. The message lists the layers, and a recipe that fits. Or
            if tensors were not read and there is no original, or it is of another class.
    """
    codes: dict[str, Codes] = {}
    floats: dict[str, Tensor] = {}
    reasons: dict[str, list[str]] = {}
    wanted = {name: tensor.shape for name, tensor in model.architecture.skeleton.state_dict().items()}
    for captured in model.captured:
        module = captured.module
        for name, tensor in _float_tensors(module, wanted):
            floats[name] = tensor
        for layer, found in _layers(module):
            codes[layer] = found
        for reason, layer in _unfit(module, wanted):
            own = reasons.setdefault(reason, [])
            own += [] if layer in own else [layer]
    refuse(format_name, reasons, f"use a recipe that changes only parameters that the class has, such as\n  {IN_PLACE}")
    for layer in [layer for layer in codes if f"{layer}.weight" not in wanted]:
        raise ConfigurationError(f"{format_name}: layer {layer!r} is not a module of {_name(model)} with a weight")
    _share(model, codes, floats)
    missing = [n for n in wanted if n not in floats and n.removesuffix(".weight") not in codes]
    if missing and original is None:
        raise ConfigurationError(
            f"{format_name} needs all {len(wanted)} tensors of {_name(model)}, and no call read {len(missing)} of "
            f"them, such as {missing[0]!r}; calibrate with calls that run these parts. If no call does, because the "
            "class does not use them, give the float model, which has them: original=model (--original FOLDER)"
        )
    if original is not None:
        floats |= _unread(original, {name: wanted[name] for name in missing}, model)
    return ClassWeights(codes, floats)


def _unread(original: nn.Module, missing: Mapping[str, torch.Size], model: GraphModel) -> dict[str, Tensor]:
    """These tensors of the float model."""
    if type(original) is not type(model.architecture.skeleton):
        raise ConfigurationError(
            f"original is a {type(original).__name__}, and the quantized model was a {_name(model)}; give the float "
            "model that was quantized"
        )
    check_storage(original)
    held = original.state_dict()
    other = next((name for name, shape in missing.items() if name not in held or held[name].shape != shape), None)
    if other is not None:
        raise ConfigurationError(f"original has no {other!r} of this shape; give the float model that was quantized")
    return {name: held[name].detach().cpu() for name in missing}


def _share(model: GraphModel, codes: dict[str, Codes], floats: dict[str, Tensor]) -> None:
    """Give each name of a shared parameter what graphs hold under another of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.architecture.skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        layers = [name.removesuffix(".weight") for name in shared]
        code = next((codes[layer] for layer in layers if layer in codes), None)
        value = next((floats[name] for name in shared if name in floats), None)
        for name, layer in zip(shared, layers, strict=True):
            if name in floats or layer in codes:
                continue
            if code is not None:
                codes[layer] = code
            elif value is not None:
                floats[name] = value


def _name(model: GraphModel) -> str:
    return type(model.architecture.skeleton).__name__


def _float_tensors(module: fx.GraphModule, wanted: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a graph reads as floats, and tables and convolutions as floats."""
    for name, tensor in read_tensors(module).items():
        if name in wanted:
            yield name, tensor.detach()
    for node in module.graph.nodes:
        if node.target is _ops.conv2d.default:
            name = _float_name(args(node).node("wq"))
            yield name, _dequantized(module, node).reshape(wanted[name])
        if node.target is _ops.dequantize_weight.default and args(node).node("wq").op != "get_attr":
            table, one = args(node).node("wq"), args(node)  # Rows of a table of codes.
            wq, *scales = (
                None
                if getattr(one, name) is None
                else get_tensor(module, str(args(one.node(name)).node("weight").target))
                for name in _GRID
            )
            assert wq is not None and scales[0] is not None
            grid = Scales(scales[0], scales[1]), one.format, one.group_size, one.in_features, one.dtype
            yield _float_name(args(table).node("weight")), dequantize_weight(wq, *grid)


_GRID = ("wq", "scale", "zero_point")


def _float_name(packed: fx.Node) -> str:
    """Name of the weight whose codes a node reads."""
    return str(packed.target).removesuffix("_packed")


def _place(node: fx.Node) -> str:
    return str(node.meta.get(LAYER, place_of(node)))


def _dequantized(module: fx.GraphModule, node: fx.Node) -> Tensor:
    wq, scales = _stored(module, node, ("wq", "w_scale", "w_zero_point"))
    return dequantize_weight(wq, scales, args(node).w_format, 0, math.prod(args(node).kernel), torch.float32)


def _stored(module: fx.GraphModule, node: fx.Node, names: Sequence[str]) -> tuple[Tensor, Scales]:
    """Packed codes and scales of an op, given the names of its arguments."""
    wq, scale, *more = (
        None if getattr(args(node), name) is None else get_tensor(module, str(args(node).node(name).target))
        for name in names
    )
    assert wq is not None and scale is not None
    return wq, Scales(scale, *more)


def _layers(module: fx.GraphModule) -> Iterator[tuple[str, Codes]]:
    for node in module.graph.nodes:
        if node.target is _ops.linear.default:
            names = ("wq", "w_scale", "w_zero_point", "w_global")
            inputs = int(args(node).node("xq").meta["val"].shape[-1])
        elif node.target is _ops.dequantize_weight.default and args(node).node("wq").op == "get_attr":
            names, inputs = (*_GRID, "global_scale"), int(args(node).in_features)
        else:
            continue
        target = str(args(node).node("wq").target)
        wq, scales = _stored(module, node, names)
        format = format_of_weight(node)
        codes = Codes(unpack(wq, bits_of(format), inputs), scales, format, args(node).group_size)
        yield target.removesuffix(".weight_packed"), codes


def _unfit(module: fx.GraphModule, wanted: Mapping[str, torch.Size]) -> Iterator[tuple[str, str]]:
    """Reasons why the code of the class would not compute what a graph computes, each with a layer."""
    for node in module.graph.nodes:
        if node.target is _ops.channel_affine.default:
            yield "a factor is multiplied at run time", _place(node)
        elif node.target is _ops.matmul.default:
            yield "a product of attention has 8 bits", _place(node)
        elif node.target is _ops.low_rank.default:
            yield "a branch of low rank is added at run time", _place(node)
        elif node.target is _ops.hadamard.default:
            yield "its input is rotated at run time", _place(node)
        elif node.op == "get_attr":
            name, held = str(node.target), get_tensor(module, str(node.target))
            owner, _, last = name.rpartition(".")
            if last in _SUFFIXES or last.startswith("constant_") or _belongs_to_op(node):
                continue
            if name in wanted and held.shape != wanted[name]:
                yield "a tensor has another shape", name
            elif name not in wanted and not _is_buffer(name, wanted, node):
                yield "a tensor was added or copied", owner or name


def _belongs_to_op(node: fx.Node) -> bool:
    """Whether a tensor is read only by ops that are refused themselves."""
    return {user.target for user in node.users} <= {_ops.low_rank.default, _ops.hadamard.default}


def _is_buffer(name: str, wanted: Mapping[str, torch.Size], node: fx.Node) -> bool:
    """Whether a tensor belongs to the model but not to its state dict."""
    module = node.graph.owning_module
    return bool(module is not None and module.meta.get(NAMES, {}).get(name, False))
