"""Lowers a quantized graph to the compiled kernels, and converts their tensors back to checkpoint tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxquant.backends.derived_tensors import derived
from fxquant.backends.native import fusions, weight_only
from fxquant.backends.native.activations import lower_quantize
from fxquant.backends.native.compiled import attention, branches, rotations, weights
from fxquant.backends.native.compiled import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.native.library import FLOATS
from fxquant.backends.native.sharing import share
from fxquant.ir.arguments import Arguments, args, source_of
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.tensors import drop_unread_tensors, read_tensors
from fxquant.ir.tops import separate_tops
from fxquant.memory.mappings import trim
from fxquant.numerics.formats import bits_of, is_integer

aten, reference, native = torch.ops.aten, torch.ops.fxquant, torch.ops.fxquant_native

_KEPT = 32 << 20  # Freed memory goes back to the system after this many bytes of lowered weights.
_KERNELS = fusions.Kernels(
    native.vnni_linear.default,
    native.norm_quantize.default,
    native.quantize.default,
    (native.bf16_attention.default, native.int8_attention.default),
    native.bf16_attention.default,
    quantize_down=native.quantize_down.default,
    norm_quantize_down=native.norm_quantize_down.default,
)
_PANELS = "_panels"
_SUMS = "_sums"
_BY_GROUP = "_by_group"
_IN_PANELS = "_in_panels"
_PRODUCTS = (native.vnni_linear.default, native.vnni_linear_values.default)
_LINEARS = (*_PRODUCTS, native.weight_only_linear.default, native.float_weight_linear.default)


@dataclass(frozen=True)
class Options:
    """Options for users.

    Attributes:
        packed: Keep weights of up to 4 bits in half a byte each.
        bf16_attention: Multiply float attention in bfloat16; otherwise ATen computes it.
        bf16_branches: Multiply branches of low rank in bfloat16; otherwise in float32.
        fused_branches: Compute branches of low rank in the kernels beside them; otherwise they are ops of their own.
    """

    packed: bool = True
    bf16_attention: bool = True
    bf16_branches: bool = True
    fused_branches: bool = True


def lower(module: fx.GraphModule, others: Mapping[str, Tensor], options: Options) -> None:
    """Rewrite a quantized graph in place.

    Before::

        codes = fxquant.quantize(x, s, z, 0, 255, uint8)
        y = fxquant.linear(codes, s, z, W_packed, W_scale, W_zero_point, bias, "int8", "int4", 0, dtype)

    After::

        codes = fxquant_native.quantize(x, s, z, 255)
        y = fxquant_native.vnni_linear(codes, s, z, W_panels, W_scale, W_zero_point, W_sums, bias, bits, out, "none",
                                       None, None, None, None, 255, dtype)

    A weight in groups adds one argument, the inputs per group, and its grid is ``[groups, out]``. A linear with a
    dequantized weight becomes ``weight_only_linear``, or ``float_weight_linear`` in a float format. The ops before and
    after these are fused into the kernels if possible: see :mod:`fxquant.backends.native.fusions`,
    :mod:`fxquant.backends.native.compiled.attention` and :mod:`fxquant.backends.native.compiled.branches`.
    """
    rewriter = Rewriter(module, "lower to native")
    separate_tops(module.graph, rewriter)
    share(module.graph, rewriter)
    kernels = _weight_only_kernels(rewriter, others, options)
    lowered = 0
    for node in list(module.graph.nodes):
        if lowered > _KEPT:
            trim()
            lowered = 0
        lowered += _bytes_of_weight(node)
        if node.target is reference.quantize.default:
            lower_quantize(node, rewriter)
        elif node.target is reference.linear.default:
            _lower_linear(node, rewriter, others, options)
        elif node.target is aten.linear.default:
            weight_only.lower_linear(node, rewriter, kernels)
        elif node.target is reference.dequantize_weight.default:
            weight_only.lower_lookup(node, rewriter)
    if options.fused_branches:
        branches.lower(module.graph, rewriter, options.bf16_branches)
    attention.lower(module.graph, rewriter, options.bf16_attention)
    rotations.lower(module.graph, rewriter)
    module.graph.eliminate_dead_code()
    fusions.fuse(module.graph, rewriter, others, _KERNELS)
    branches.write_values(module.graph, rewriter)
    module.graph.eliminate_dead_code()
    drop_unread_tensors(module)


def stored(module: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors of a lowered graph, with packed codes in place of panels and without derived tensors."""
    found = read_tensors(module)
    for node in module.graph.nodes:
        if node.target not in _LINEARS:
            continue
        given, inner = args(node), int(source_of(node).meta["val"].shape[-1])
        name, floats = str(given.node("weight").target), node.target is native.float_weight_linear.default
        if name in found:
            packed, bits = name.removesuffix(_PANELS), bits_of(given.format) if floats else given.bits
            found[packed] = weights.unpacked(found.pop(name), bits, given.out_features, inner)
            found.pop(f"{packed}{_SUMS}", None)
        if floats and (scale := str(given.node("w_scale").target)) in found:
            found[scale.removesuffix(_IN_PANELS)] = weights.scales(found.pop(scale), given.out_features)
        if node.target in _PRODUCTS and given.group_size:
            for grid in (str(given.node(name).target) for name in ("w_scale", "w_zero_point")):
                if grid in found:
                    found[grid.removesuffix(_BY_GROUP)] = found.pop(grid).t().contiguous()
    return {name: tensor for name, tensor in found.items() if not name.endswith(fusions.DIVIDED)}


def _lower_linear(node: fx.Node, rewriter: Rewriter, others: Mapping[str, Tensor], options: Options) -> None:
    given = args(node)
    codes, packed, bits, dtype = given.node("xq"), given.node("wq"), bits_of(given.w_format), given.out_dtype
    group_size, inner = given.group_size, int(codes.meta["val"].shape[-1])
    weight = _panels(packed, bits, inner, group_size, rewriter, others, options)
    sums = _sums(given, bits, inner, rewriter, others)
    out = int(packed.meta["val"].shape[0])
    kernel_dtype = dtype if dtype in FLOATS else torch.float32
    grid = given.node("w_scale"), given.node("w_zero_point")
    if group_size:
        grid = _by_group(grid[0], rewriter, others), _by_group(grid[1], rewriter, others)
    factors = (codes, given.x_scale, given.x_zero_point, weight, *grid)
    groups = (None, None, 0, None, group_size) if group_size else ()
    arguments = (*factors, sums, given.bias, bits, out, "none", None, None, None, None, 255, kernel_dtype, *groups)
    with rewriter.before(node):
        new = rewriter.call(native.vnni_linear.default, arguments, [node], layer=True)
        if kernel_dtype != dtype:
            new = rewriter.call(aten.to.dtype, (new, dtype), [node], layer=True)
    rewriter.replace(node, new)
    if not packed.users:
        rewriter.forget(packed)  # So that a model never holds both forms of all weights.


def _bytes_of_weight(node: fx.Node) -> int:
    if node.target not in (reference.linear.default, reference.dequantize_weight.default):
        return 0
    value = args(node).node("wq").meta["val"]
    return int(value.numel()) if isinstance(value.shape[0], int) else 0


def fits(format: str, group_size: int) -> bool:
    """Whether a kernel for float activations takes weights of this format with this many inputs per group."""
    return group_size % 8 == 0 and (is_integer(format) or format in weight_only.FLOAT_FORMATS)


def _weight_only_kernels(
    rewriter: Rewriter, others: Mapping[str, Tensor], options: Options
) -> list[weight_only.Kernel]:
    def panels(given: Arguments) -> fx.Node:
        return _panels(
            given.node("wq"), bits_of(given.format), given.in_features, given.group_size, rewriter, others, options
        )

    def integers(given: Arguments) -> tuple[fx.Node | None, ...]:
        return panels(given), given.scale, given.zero_point

    def floats(given: Arguments) -> tuple[fx.Node | None, ...]:
        scale = given.node("scale")
        held = derived(scale, _IN_PANELS, rewriter, others, lambda: weights.scale_panels(rewriter.tensor(scale)))
        return panels(given), held, given.global_scale

    return [
        weight_only.Kernel(
            native.weight_only_linear.default,
            lambda format, group: is_integer(format) and fits(format, group),
            integers,
        ),
        weight_only.Kernel(native.float_weight_linear.default, fits, floats),
    ]


def _panels(
    packed: fx.Node,
    bits: int,
    in_features: int,
    group_size: int,
    rewriter: Rewriter,
    others: Mapping[str, Tensor],
    options: Options,
) -> fx.Node:
    codes = rewriter.tensor(packed)
    halves = weights.in_halves(bits, options.packed, group_size)
    node = derived(packed, _PANELS, rewriter, others, lambda: weights.panels(codes, bits, in_features, halves))
    assert node is not None
    return node


def _sums(linear: Arguments, bits: int, in_features: int, rewriter: Rewriter, others: Mapping[str, Tensor]) -> fx.Node:
    packed = linear.node("wq")
    codes = rewriter.tensor(packed)

    def make() -> Tensor:
        if not linear.group_size:
            return weights.sums(codes, bits, in_features)
        grid = rewriter.tensor(linear.w_scale), rewriter.tensor(linear.w_zero_point)
        return weights.group_sums(codes, *grid, bits, in_features, linear.group_size)

    node = derived(packed, _SUMS, rewriter, others, make)
    assert node is not None
    return node


def _by_group(grid: fx.Node, rewriter: Rewriter, others: Mapping[str, Tensor]) -> fx.Node:
    """The grid `[groups, out]` of a weight, of which the kernel reads adjacent outputs."""
    node = derived(grid, _BY_GROUP, rewriter, others, lambda: rewriter.tensor(grid).t().contiguous())
    assert node is not None
    return node
