"""Lowers a quantized graph to the Triton kernels, and converts their tensors back to those of checkpoints."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.derived_tensors import derived
from fxquant.backends.native import fusions, weight_only
from fxquant.backends.native.activations import lower_tokens
from fxquant.backends.native.attention import lower_codes
from fxquant.backends.native.gpu import attention_ops, block_lowering, branches, float_weights, rotations, weights
from fxquant.backends.native.gpu import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.native.gpu.arguments import FP8
from fxquant.backends.native.gpu.weight_only import fits
from fxquant.backends.native.library import FLOATS
from fxquant.backends.native.sharing import share
from fxquant.ir.arguments import Arguments, args, source_of
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.tensors import drop_unread_tensors, read_tensors
from fxquant.numerics.formats import bits_of, is_integer, top_of
from fxquant.planning.decisions import LayerPlan

aten, reference, native = torch.ops.aten, torch.ops.fxquant, torch.ops.fxquant_native

_KERNELS = fusions.Kernels(
    native.triton_linear.default,
    native.triton_norm_quantize.default,
    native.triton_quantize.default,
    (native.triton_attention.default,),
    quantize_tokens=native.triton_quantize_tokens.default,
    norm_quantize_tokens=native.triton_norm_quantize_tokens.default,
)
_LINEARS = (
    native.triton_linear.default,
    native.triton_linear_sums.default,
    native.triton_weight_only_linear.default,
    native.triton_float_weight_linear.default,
)
_WITH_SUMS = {
    native.triton_linear.default: native.triton_linear_sums.default,
    native.triton_quantize.default: native.triton_quantize_sums.default,
    native.triton_norm_quantize.default: native.triton_norm_quantize_sums.default,
}
_FP8 = "fp8"
_ROWS, _SUMS, _OFFSET = "_rows", "_sums", "_offset"
_TOKEN_SUMS = 3  # Position of the sums among the results of kernels that compute a grid per token.
_FLOATS = "_fp8"


@dataclass(frozen=True)
class Options:
    """Options that users choose.

    Attributes:
        packed: Store weights of up to 4 bits in half a byte each.
        branches: Add branches of low rank in the linear beside them.
    """

    packed: bool = True
    branches: bool = True


def lower(module: fx.GraphModule, others: Mapping[str, Tensor], options: Options) -> None:
    """Rewrite a quantized graph in place.

    Before::

        codes = fxquant.quantize(x, s, z, 0, 255, uint8)
        y = fxquant.linear(codes, s, z, W_packed, W_scale, W_zero_point, bias, "int8", "int4", group, dtype)

    After::

        codes = fxquant_native.triton_quantize(x, s, z, 255, int8)
        y = fxquant_native.triton_linear(codes, s, z, W_rows, W_scale, W_zero_point, W_sums, bias, bits, out, "none",
                                         None, None, None, None, 255, dtype, group, None, None)

    Codes of the format ``fp8`` are made and multiplied by the same ops, as 8-bit floats without zero points. A linear
    with a dequantized weight becomes ``triton_weight_only_linear``, or ``triton_float_weight_linear`` in a float
    format. Operations before and after these are fused into the kernels where possible: see
    :mod:`fxquant.backends.native.fusions`, :mod:`fxquant.backends.native.gpu.rotations` and
    :mod:`fxquant.backends.native.gpu.branches`. Codes that any other op reads stay reference codes.
    """
    rewriter = Rewriter(module, "lower to native")
    share(module.graph, rewriter)
    for node in list(module.graph.nodes):
        if node.target is reference.matmul.default:
            lower_codes(
                node,
                rewriter,
                native.triton_attention.default,
                native.signed.default,
                attention_ops.MOST_CHANNELS,
            )
    module.graph.eliminate_dead_code()
    block_lowering.lower(module.graph, rewriter, others)
    for node in list(module.graph.nodes):
        if node.target is reference.quantize.default:
            _lower_quantize(node, rewriter)
    module.graph.eliminate_dead_code()
    kernels = _weight_only_kernels(rewriter, others, options)
    for node in list(module.graph.nodes):
        if node.target is reference.linear.default:
            _lower_linear(node, rewriter, others, options)
        elif node.target is aten.linear.default:
            weight_only.lower_linear(node, rewriter, kernels)
        elif node.target is reference.dequantize_weight.default:
            weight_only.lower_lookup(node, rewriter)
    module.graph.eliminate_dead_code()
    if options.branches:
        branches.lower(module.graph, rewriter)
    fusions.fuse(module.graph, rewriter, others, _KERNELS)
    rotations.lower(module.graph, rewriter, _KERNELS)
    for node in list(module.graph.nodes):
        if node.target is native.triton_row_sums.default:
            _fuse_row_sums(node, rewriter)
    module.graph.eliminate_dead_code()
    drop_unread_tensors(module)


def stored(module: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors of a lowered graph, with packed codes instead of rows and without derived tensors."""
    found = read_tensors(module)
    for node in module.graph.nodes:
        if node.target is native.scaled_linear.default:
            block_lowering.stored(node, found)
        if node.target not in _LINEARS:
            continue
        given = args(node)
        name = str(given.node("weight").target)
        if name in found and name.endswith(_FLOATS):
            found[name.removesuffix(_FLOATS)] = found.pop(name).view(torch.uint8)
        elif name in found:
            packed, inner = name.removesuffix(_ROWS), int(source_of(node).meta["val"].shape[-1])
            floats = node.target is native.triton_float_weight_linear.default
            zeros = None if floats else found[str(given.node("w_zero_point").target)]
            bits = bits_of(given.format) if floats else given.bits
            found[packed] = weights.unpacked(found.pop(name), zeros, bits, inner, given.group_size)
            for suffix in (_SUMS, _OFFSET):
                found.pop(f"{packed}{suffix}", None)
    return {name: tensor for name, tensor in found.items() if not name.endswith(fusions.DIVIDED)}


def refuse(layer: LayerPlan) -> str | None:
    """Why the kernels cannot run a linear with quantized activations as planned, and what to use instead."""
    assert layer.weight_bits is not None and layer.format_of_weight is not None and layer.format_of_input is not None
    formats = layer.format_of_weight.name, layer.format_of_input.name
    if not set(formats).isdisjoint(block_lowering.FORMAT_NAMES):
        return block_lowering.refuse(layer)
    if _FP8 in formats:
        if formats != (_FP8, _FP8):
            return (
                f"its kernel multiplies fp8 by fp8, not {formats[1]} by {formats[0]}; choose wfp8afp8, or backend "
                "'fake-quant'"
            )
        if layer.group_size:
            return "its kernel takes one fp8 scale per output channel, not per group; choose wfp8afp8 without -g"
        return None
    if layer.group_size and not weights.fits_groups(layer.group_size, layer.weight_bits):
        return (
            f"its kernel takes groups of a multiple of {weights.LEAST_GROUP} inputs and weights of up to 7 bits, not "
            f"groups of {layer.group_size} and {layer.weight_bits} bits; use groups such as w4a8-g64, no groups, or "
            "backend 'fake-quant'"
        )
    if layer.timesteps is not None and layer.timesteps.bits is not None:
        return (
            "its input has bits that differ from bin to bin of timesteps, which the Triton kernels do not know; leave "
            "out bin-bits, or use 'fake-quant'"
        )
    if layer.shape[1] > weights.MAX_FEATURES:
        return f"sums over {layer.shape[1]} inputs do not fit 32 bits; keep the layer float, or use 'fake-quant'"
    return None


def kernel(layer: LayerPlan, options: Options) -> str:
    """Name of the kernel that runs a linear with quantized activations."""
    assert layer.weight_bits is not None
    if layer.weight_format == _FP8:
        return "native triton e4m3 x e4m3"
    if layer.weight_format in block_lowering.FORMAT_NAMES:
        return f"torch scaled_mm {layer.weight_format} x {layer.weight_format}"
    return f"native triton s8 x {_weight_name(layer.weight_bits, layer.group_size, options)}"


def weight_only_kernel(layer: LayerPlan, options: Options) -> str:
    """Name of the kernel or fallback that runs a linear with float activations."""
    format = layer.format_of_weight
    assert format is not None
    if float_weights.fits(format.name, layer.group_size):
        groups = f" in groups of {layer.group_size}" if layer.group_size and not format.block else ""
        return f"native triton weight-only {format.name}{groups}, float32 sums"
    if not is_integer(format.name) or not fits(layer.group_size):
        return "dequantize + aten float"
    return f"native triton weight-only {_weight_name(format.bits, layer.group_size, options)}, float32 sums"


def _weight_name(bits: int, group_size: int, options: Options) -> str:
    stored = "u4" if weights.in_halves(bits, options.packed) else "s8"
    return f"{stored} in groups of {group_size}" if group_size else stored


def _lower_quantize(node: fx.Node, rewriter: Rewriter) -> None:
    """Make signed codes or 8-bit floats for linears, and reference codes for all other readers."""
    given = args(node)
    floats = given.format == _FP8  # Only linears read these; a highest code means nothing for them.
    x, grid = given.node("x"), (given.scale, given.zero_point)
    qmax, dtype = (255, FP8) if floats else (top_of(given.format), torch.int8)
    linears = [reader for reader in node.users if _multiplies(reader, node)]
    signed = [reader for reader in node.users if reader.target is native.signed.default]
    lower_tokens(node, rewriter, _KERNELS.quantize_tokens, qmax, dtype)
    if not node.users:
        return
    with rewriter.before(node):
        if linears or signed:
            if x.meta["val"].dtype not in FLOATS:
                x = rewriter.call(aten.to.dtype, (x, torch.float32), [node], layer=True)
            codes = rewriter.call(native.triton_quantize.default, (x, *grid, qmax, dtype), [node], layer=True)
            for reader in linears:
                rewriter.redirect(reader, node, codes)
            for reader in signed:
                rewriter.replace(reader, codes)
        if node.users:
            rewriter.replace(node, rewriter.call(native.quantize.default, (given.x, *grid, qmax), [node], layer=True))


def _multiplies(reader: fx.Node, codes: fx.Node) -> bool:
    return reader.target is reference.linear.default and args(reader).xq is codes


def _lower_linear(node: fx.Node, rewriter: Rewriter, others: Mapping[str, Tensor], options: Options) -> None:
    given = args(node)
    codes, packed, w_scale, w_zero_point = given.node("xq"), given.node("wq"), given.node("w_scale"), given.w_zero_point
    bits, group_size, dtype = bits_of(given.w_format), given.group_size, given.out_dtype
    out, inner = int(packed.meta["val"].shape[0]), int(codes.meta["val"].shape[-1])
    kernel_dtype = dtype if dtype in FLOATS else torch.float32

    def make(suffix: str, value: Any) -> fx.Node:
        made = derived(packed, suffix, rewriter, others, value)
        assert made is not None
        return made

    def grid() -> tuple[Tensor, Tensor, Tensor, int, int, int]:
        tensors = (rewriter.tensor(part) for part in (packed, w_scale, w_zero_point))
        return (*tensors, bits, inner, group_size)

    x_sums, offset = None, None
    with rewriter.before(node):
        if codes.meta["val"].dtype == FP8:
            weight, sums = make(_FLOATS, lambda: rewriter.tensor(packed).view(FP8)), None
        else:
            if codes.meta["val"].dtype != torch.int8:
                codes = rewriter.call(native.signed.default, (codes,), [node], layer=True)
            weight = _rows(packed, w_zero_point, bits, inner, group_size, rewriter, others, options)
            sums = make(_SUMS, lambda: weights.sums(*grid()))
            zeros = rewriter.tensor(w_zero_point)
            offset = derived(packed, _OFFSET, rewriter, others, lambda: weights.offset(zeros, bits))
            if offset is not None:
                x_sums = _sums_of(codes, rewriter)
        factors = (codes, given.x_scale, given.x_zero_point, weight, w_scale, w_zero_point)
        nothing = (None, None, None, None, 255, kernel_dtype, group_size, offset, x_sums)
        arguments = (*factors, sums, given.bias, bits, out, "none", *nothing)
        new = rewriter.call(native.triton_linear.default, arguments, [node], layer=True)
        if kernel_dtype != dtype:
            new = rewriter.call(aten.to.dtype, (new, dtype), [node], layer=True)
    rewriter.replace(node, new)
    if not packed.users:
        rewriter.forget(packed)  # So that memory never holds both forms of all weights of a model.


def _rows(
    packed: fx.Node,
    zero_point: fx.Node | None,
    bits: int,
    inner: int,
    group_size: int,
    rewriter: Rewriter,
    others: Mapping[str, Tensor],
    options: Options,
) -> fx.Node:
    """The weight in the form that kernels read."""
    halves = weights.in_halves(bits, options.packed)
    tensors = rewriter.tensor(packed), None if zero_point is None else rewriter.tensor(zero_point)
    node = derived(
        packed, _ROWS, rewriter, others, lambda: weights.kernel_codes(*tensors, bits, inner, halves, group_size)
    )
    assert node is not None
    return node


def _weight_only_kernels(
    rewriter: Rewriter, others: Mapping[str, Tensor], options: Options
) -> list[weight_only.Kernel]:
    def rows(given: Arguments) -> fx.Node:
        layout = bits_of(given.format), given.in_features, given.group_size
        return _rows(given.node("wq"), given.zero_point, *layout, rewriter, others, options)

    return [
        weight_only.Kernel(
            native.triton_weight_only_linear.default,
            lambda format, group_size: is_integer(format) and fits(group_size),
            lambda given: (rows(given), given.scale, given.zero_point),
        ),
        weight_only.Kernel(
            native.triton_float_weight_linear.default,
            float_weights.fits,
            lambda given: (rows(given), given.scale, given.global_scale),
        ),
    ]


def _sums_of(codes: fx.Node, rewriter: Rewriter) -> fx.Node:
    """Sums of the rows of inputs; layers that read the same codes share them."""
    key = "row sums", codes
    if key not in rewriter.memo:
        with rewriter.after(codes):
            rewriter.memo[key] = rewriter.call(native.triton_row_sums.default, (codes,), [codes], layer=True)
    node: fx.Node = rewriter.memo[key]
    return node


def _fuse_row_sums(node: fx.Node, rewriter: Rewriter) -> None:
    """Let the kernel that makes codes also sum them; a separate kernel would read them once more."""
    codes = args(node).node("xq")
    if codes.target is operator.getitem:
        source = source_of(codes)
        if source.target in (_KERNELS.quantize_tokens, _KERNELS.norm_quantize_tokens):
            with rewriter.before(node):
                rewriter.replace(node, rewriter.call(operator.getitem, (source, _TOKEN_SUMS), [node], layer=True))
    elif codes.target in _WITH_SUMS:
        with rewriter.before(codes):
            both = rewriter.call(_WITH_SUMS[codes.target], codes.args, [codes], layer=True)
            made, sums = (rewriter.call(operator.getitem, (both, number), [codes], layer=True) for number in range(2))
        rewriter.replace(node, sums)
        rewriter.replace(codes, made)
