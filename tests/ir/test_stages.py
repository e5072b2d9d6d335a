"""What verification finds, and that it names node, layer and pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant.errors import VerificationError
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stage_order import is_own
from fxquant.ir.stages import SPECS, Stage, in_order, is_replayed, verify
from fxquant.ir.tensors import set_tensor
from fxquant.pipeline.pipeline import Pipeline
from tests.passes.models import Patches, patches, planned
from tests.support import captured, nodes_of

OPS = torch.ops.fxquant


def quantized(group: int = 0) -> fx.GraphModule:
    module = captured(Patches(), **patches()).module
    plan = planned(
        conv=("conv", [4, 8], None, None, 0), q=("linear", [4, 4], 8, 8, group), k=("linear", [2, 4], 8, 8, 0)
    )
    Pipeline.parse("quantize-linears").run(module, plan)
    return module


def first(module: fx.GraphModule, op: object) -> fx.Node:
    return nodes_of(module, op)[0]


def set_argument(node: fx.Node, position: int, value: object) -> None:
    node.args = (*node.args[:position], value, *node.args[position + 1 :])  # type: ignore[assignment]


def retyped(module: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """Give a parameter another tensor, metadata included."""
    Rewriter(module, "breaks-things").put(node, value)


def other_op(module: fx.GraphModule) -> None:
    node = first(module, OPS.quantize.default)
    with Rewriter(module, "breaks-things").before(node) as _:
        step = next(n for n in module.graph.nodes if n.name == "timestep")
        observed = Rewriter(module, "breaks-things").call(
            OPS.observe.default, (node.args[0], step, "k", -1), [node.args[0]]
        )
    set_argument(node, 0, observed)


def wrong_shape(module: fx.GraphModule) -> None:
    node = first(module, torch.ops.aten.transpose.int)
    set_argument(node, 1, 0)


def wrong_record(module: fx.GraphModule) -> None:
    node = first(module, OPS.linear.default)
    node.meta["val"] = node.meta["val"].to(torch.float64)


def no_record(module: fx.GraphModule) -> None:
    del first(module, torch.ops.aten.transpose.int).meta["val"]


def missing_tensor(module: fx.GraphModule) -> None:
    del module.q.bias


def other_tensor(module: fx.GraphModule) -> None:
    set_tensor(module, "q.bias", torch.ones(5))


def other_grid(module: fx.GraphModule) -> None:
    one, two = nodes_of(module, OPS.linear.default)
    scale = Rewriter(module, "breaks-things").constant("other", torch.tensor(1.0), [one])
    set_argument(two, 1, scale)


def weight_scale(module: fx.GraphModule) -> None:
    retyped(module, first(module, OPS.linear.default).args[4], torch.ones(3, 1))


def zero_point_shape(module: fx.GraphModule) -> None:
    retyped(module, first(module, OPS.quantize.default).args[2], torch.zeros(1, dtype=torch.uint8))


def integer_scale(module: fx.GraphModule) -> None:
    retyped(module, first(module, OPS.quantize.default).args[1], torch.tensor(1))


def other_format(module: fx.GraphModule) -> None:
    set_argument(first(module, OPS.quantize.default), 3, "int4")


def odd_groups(module: fx.GraphModule) -> None:
    set_argument(first(module, OPS.linear.default), 9, 3)


def float_input(module: fx.GraphModule) -> None:
    node = first(module, OPS.linear.default)
    set_argument(node, 0, node.args[0].args[0])


def unknown_format(module: fx.GraphModule) -> None:
    set_argument(first(module, OPS.linear.default), 8, "int9")


def attention() -> fx.GraphModule:
    """Attention with the codes of transposed keys, and grids that follow them."""

    class Product(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return q @ k

    module = captured(Product(), q=torch.randn(2, 5, 8), k=torch.randn(2, 6, 8).transpose(1, 2)).module
    (node,) = nodes_of(module, torch.ops.aten.matmul.default)
    rewriter = Rewriter(module, "test")
    factors: list[object] = []
    with rewriter.before(node):
        for side, value, shape in (("q", node.args[0], ()), ("k", node.args[1], (1, 1, 6))):
            scale = rewriter.constant(f"{side}_scale", torch.ones(shape), [node])
            zero_point = rewriter.constant(f"{side}_zero_point", torch.zeros(shape, dtype=torch.uint8), [node])
            grid: tuple[object, ...] = (scale, zero_point)
            if side == "k":  # Quantized as [batch, tokens, channels], a number a token.
                grid = tuple(rewriter.call(torch.ops.aten.transpose.int, (part, 1, 2), [node]) for part in grid)
            laid_out = rewriter.call(torch.ops.aten.transpose.int, (value, 1, 2), [node]) if side == "k" else value
            codes = rewriter.call(OPS.quantize.default, (laid_out, *grid, "int8"), [node])
            if side == "k":
                codes = rewriter.call(torch.ops.aten.transpose.int, (codes, 1, 2), [node])
            factors += [codes, scale, zero_point]
        new = rewriter.call(OPS.matmul.default, (*factors, "int8", "int8", torch.float32), [node])
    rewriter.replace(node, new)
    return module


def other_key_grid(module: fx.GraphModule) -> None:
    node = first(module, OPS.matmul.default)
    set_argument(node, 4, Rewriter(module, "breaks-things").constant("other", torch.ones(1, 1, 6), [node]))


def float_factor(module: fx.GraphModule) -> None:
    node = first(module, OPS.matmul.default)
    set_argument(node, 0, node.args[0].args[0])


def other_zero_points(module: fx.GraphModule) -> None:
    node = first(module, OPS.matmul.default)
    value = torch.zeros(1, 1, 1, dtype=torch.uint8)
    set_argument(node, 2, Rewriter(module, "breaks-things").constant("other", value, [node]))


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (other_key_grid, r"its right scale and zero point are not those that quantize_default_1 quantized with"),
        (float_factor, r"left factor .* integer codes"),
        (other_zero_points, r"left scale .* and left zero point .* differ in shape"),
    ],
)
def test_what_verification_finds_of_products(breaks: Callable[[fx.GraphModule], None], message: str) -> None:
    module = attention()
    verify(module, SPECS[Stage.QUANTIZED])
    breaks(module)
    with pytest.raises(VerificationError, match=message):
        verify(module, SPECS[Stage.QUANTIZED])


BROKEN: dict[str, tuple[Callable[[fx.GraphModule], None], str]] = {
    "an op of another stage": (other_op, r"op fxquant.observe.default does not belong in a graph of stage 'quantized'"),
    "a wrong shape": (wrong_shape, r"node transpose: it yields float32\[4, 4, s\d+\], but is recorded as"),
    "a wrong dtype": (wrong_record, r"node linear_default \(layer q\), made by .*float32.*but is recorded as float64"),
    "nothing recorded": (no_record, r"transpose: its shape and dtype are not recorded"),
    "a missing tensor": (missing_tensor, r"there is no tensor 'q.bias'"),
    "another tensor": (other_tensor, r"q.bias is float32\[5\], but recorded as float32\[4\]"),
    "another input grid": (other_grid, r"its input scale and zero point are not those that transpose_codes quantized"),
    "weight scales": (weight_scale, r"layer q.*scale of this weight is \[out, groups\] = \(4, 1\), not \(3, 1\)"),
    "a zero point of another shape": (zero_point_shape, r"float32\[\] and zero point uint8\[1\] differ in shape"),
    "an integer scale": (integer_scale, r"the scale is int64\[\], not floating-point"),
    "an input of another format": (other_format, r"layer q.*its input is int4, and it reads int8"),
    "groups that do not divide": (odd_groups, r"layer q.*group_size=3 does not divide the 4 input channels"),
    "a float input": (float_input, r"its input is float32\[s\d+, 4, 4\], not integer codes"),
    "an unknown format": (unknown_format, r"layer q.*unknown format 'int9'"),
}


def test_a_sound_graph_passes() -> None:
    for group in (0, 2):
        verify(quantized(group), SPECS[Stage.QUANTIZED])


@pytest.mark.parametrize("name", BROKEN)
def test_what_verification_finds(name: str) -> None:
    breaks, message = BROKEN[name]
    module = quantized()
    breaks(module)
    with pytest.raises(VerificationError, match=message):
        verify(module, SPECS[Stage.QUANTIZED])


def test_the_message_names_the_passes_that_made_a_node() -> None:
    module = quantized()
    node = first(module, OPS.linear.default)
    node.meta["val"] = node.meta["val"].double()
    with pytest.raises(VerificationError, match=r"made by quantize-linears\(linear\)"):
        verify(module, SPECS[Stage.QUANTIZED])


def test_factors_have_to_broadcast() -> None:
    module = captured(Patches(), **patches()).module
    rewriter, node = Rewriter(module, "test"), first(module, torch.ops.aten.transpose.int)
    with rewriter.after(node):
        scale = rewriter.constant("scale", torch.ones(4), [node])
        affine = rewriter.call(OPS.channel_affine.default, (node, scale, None), [node])
    verify(module, SPECS[Stage.TRANSFORMED])
    for shape in ((5,), (1, 1, 1, 4)):
        rewriter.put(scale, torch.ones(shape))
        with pytest.raises(VerificationError, match="scale"):
            verify(module, SPECS[Stage.TRANSFORMED])
    assert affine


def test_a_module_call_belongs_nowhere() -> None:
    module = fx.symbolic_trace(nn.Sequential(nn.Tanh()))
    with torch._subclasses.FakeTensorMode():
        for node in module.graph.nodes:
            node.meta["val"] = torch.ones(2, 3)
    with pytest.raises(VerificationError, match="a call_module node does not belong in any stage"):
        verify(module, SPECS[Stage.CAPTURED])


def test_an_op_that_writes_in_place_belongs_nowhere() -> None:
    module = captured(Patches(), **patches()).module
    rewriter, node = Rewriter(module, "test"), first(module, torch.ops.aten.transpose.int)
    with rewriter.after(node):
        rewriter.call(torch.ops.aten.relu_.default, (node,), [node])
    with pytest.raises(VerificationError, match=r"relu_.default writes into its input"):
        verify(module, SPECS[Stage.CAPTURED])


def test_stages_in_order() -> None:
    own = [str(stage) for stage in in_order() if is_own(stage)]
    assert own == ["captured", "observed", "transformed", "quantized", "lowered"]
    assert not is_replayed(quantized())
