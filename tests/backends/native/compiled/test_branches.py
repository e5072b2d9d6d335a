"""Branches of low rank in the compiled kernels: against float64, and in graphs against the quantized graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxquant.backends.native import Native, machine
from fxquant.backends.native.compiled import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.native.compiled import weights
from fxquant.errors import BackendError
from fxquant.ir.tensors import read_tensors
from fxquant.numerics.packing import pack
from fxquant.numerics.sqnr import sqnr_db
from fxquant.pipeline.pipeline import Pipeline
from fxquant.planning.decisions import ActivationRange, LayerPlan
from fxquant.planning.plan import Plan
from tests.support import captured, count, outputs

pytestmark = pytest.mark.skipif(machine.missing_kernels() is not None, reason="there are no compiled kernels here")
native, reference = torch.ops.fxquant_native, torch.ops.fxquant

needs_bf16 = pytest.mark.skipif(not machine.has_bf16_products(), reason="no AVX-512 BF16")
BF16 = [False, pytest.param(True, marks=needs_bf16)]
RANKS = [1, 8, 16, 32, 33, 64]


def grid() -> tuple[Tensor, Tensor]:
    return torch.tensor(0.02), torch.tensor(120, dtype=torch.uint8)


def least_db(bf16: bool) -> float:
    return 40.0 if bf16 else 120.0


@pytest.mark.parametrize("bf16", BF16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("inner", [5, 32, 75])
def test_inner_values_and_codes(rows: int, inner: int, dtype: torch.dtype, bf16: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, rows, inner).to(dtype)
    downs = [torch.randn(rank, inner) for rank in RANKS]
    codes, found = native.quantize_down(x, *grid(), 255, downs, bf16)
    scale, _ = grid()
    assert torch.equal(codes, (x.float() / scale).round().add(120).clamp(0, 255).to(torch.uint8))
    assert found.dtype == (torch.bfloat16 if bf16 else torch.float32)
    begin = 0
    for down in downs:
        rank = down.shape[0]
        assert sqnr_db(x.double() @ down.double().t(), found[..., begin : begin + rank].double()) > least_db(bf16)
        begin += -(-rank // 4) * 4
    assert found.shape[-1] == begin


@pytest.mark.parametrize("bf16", BF16)
def test_inner_values_of_many_channels_and_rows(bf16: bool) -> None:
    torch.manual_seed(0)
    x, downs = torch.randn(25, 2050), [torch.randn(rank, 2050) for rank in (40, 5)]
    _, found = native.quantize_down(x, *grid(), 255, downs, bf16)
    right = torch.cat([x.double() @ down.double().t() for down in downs], -1)
    assert sqnr_db(right, found[:, :45].double()) > (40.0 if bf16 else 110.0)


@needs_bf16
@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("channels", [5, 32, 75, 2048])
def test_inner_values_of_bfloat16_rows(channels: int, rows: int) -> None:
    torch.manual_seed(0)
    x, downs = torch.randn(2, rows, channels).bfloat16(), [torch.randn(rank, channels) for rank in RANKS]
    _, right = native.quantize_down(x, *grid(), 255, downs, True)
    assert torch.equal(native.down(x, downs), right)


def test_inner_values_of_other_rows_are_refused() -> None:
    with pytest.raises(RuntimeError, match="down reads rows of bfloat16"):
        native.down(torch.randn(3, 8), [torch.randn(2, 8)])


@pytest.mark.parametrize("bf16", BF16)
def test_inner_values_behind_a_norm(bf16: bool) -> None:
    torch.manual_seed(0)
    x, factor, shift = torch.randn(2, 13, 40), torch.randn(2, 1, 40), torch.randn(2, 1, 40)
    downs = [torch.randn(3, 40), torch.randn(8, 40)]
    given = (x, True, 1e-6, None, None, factor, 1.0, shift, *grid(), 255)
    codes, found = native.norm_quantize_down(*given, downs, bf16)
    assert torch.equal(codes, native.norm_quantize(*given))
    y = functional.layer_norm(x.double(), [40], eps=1e-6) * (factor.double() + 1) + shift.double()
    assert sqnr_db(y @ downs[1].double().t(), found[..., 4:].double()) > least_db(bf16)


@pytest.mark.parametrize("bf16", BF16)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("rows", "out"), [(1, 1), (3, 33), (17, 64), (25, 40)])
def test_branches_are_added_before_what_follows(rows: int, out: int, rank: int, bf16: bool) -> None:
    torch.manual_seed(0)
    codes, packed = torch.randint(0, 256, (2, rows, 24), dtype=torch.uint8), torch.randint(0, 256, (out, 24))
    held = pack(packed.to(torch.uint8), 8)
    w_scale, w_zero = torch.rand(out, 1) * 0.05, torch.full((out, 1), 128, dtype=torch.uint8)
    weight = (weights.panels(held, 8, 24, False), w_scale, w_zero, weights.sums(held, 8, 24))
    columns = -(-rank // 4) * 4
    inner = torch.randn(2, rows, columns + 4).to(torch.bfloat16 if bf16 else torch.float32)
    inner[..., 4 + rank :] = 0
    up, strength = torch.randn(out, rank), torch.tensor(0.5, dtype=torch.float64)
    bias, gate, residual = torch.randn(out), torch.randn(2, 1, out), torch.randn(2, rows, out)
    product = (codes.double() - 120) * 0.02 @ ((packed.double() - 128) * w_scale.double()).t()
    right = product + 0.5 * inner[..., 4 : 4 + rank].double() @ up.double().t()

    def run(bias: Tensor | None, activation: str, *rest: object) -> Tensor:
        given = (codes, *grid(), *weight, bias, 8, out, activation, *rest)
        result: Tensor = native.vnni_linear(*given, torch.float32, inner, up, 4, strength)
        return result

    def near(found: Tensor, right: Tensor) -> None:
        assert sqnr_db(right, found.double()) > (50.0 if bf16 else 95.0)

    near(run(None, "none", None, None, None, None, 255), right)
    near(run(bias, "none", gate, residual, None, None, 255), (right + bias) * gate + residual)
    near(run(bias, "silu", None, None, None, None, 255), functional.silu(right + bias))
    written = run(bias, "gelu_tanh", None, None, torch.tensor(0.1), torch.tensor(9, dtype=torch.uint8), 255)
    values = functional.gelu(right + bias, approximate="tanh") / 0.1
    codes_out = values.round().add(9).clamp(0, 255)
    assert (written.double() - codes_out).abs().max() <= (1 + 0.02 * values.abs().max() if bf16 else 1)
    given = (codes, *grid(), *weight, bias, 8, out, "gelu_tanh", None, None)
    branch = (torch.float32, inner, up, 4, strength)
    both = native.vnni_linear_values(*given, torch.tensor(0.1), torch.tensor(9, dtype=torch.uint8), 255, *branch)
    assert torch.equal(both[0], written)
    assert torch.equal(both[1], native.vnni_linear(*given, None, None, 255, *branch).bfloat16())
    with pytest.raises(RuntimeError, match="values are written beside codes"):
        native.vnni_linear_values(*given, None, None, 255, *branch)


class Layers(nn.Module):
    """A modulated block in which three linears read one value, and one reads the result of a GELU."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(40, 40, bias=bias) for bias in (True, False, True))
        self.up, self.down = nn.Linear(40, 72), nn.Linear(72, 40)
        self.to(dtype)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = c.chunk(3, 1)
        y = functional.layer_norm(x, [40], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        z = functional.silu(self.q(y)) * self.k(y) + self.v(y)
        z = self.down(functional.gelu(self.up(z), approximate="tanh"))
        return x + gate[:, None] * z


def quantized(model: nn.Module, x: Tensor, c: Tensor, rank: int = 4) -> tuple[torch.fx.GraphModule, Plan]:
    plan = Plan("", "", None)
    for name, layer in model.named_children():
        wide = ActivationRange(-6.0, 6.0, "minmax")
        plan.layers[name] = LayerPlan("linear", "block", list(layer.weight.shape), 8, 8, activation=wide)  # type: ignore[union-attr,arg-type]
    module = captured(model, x, c).module
    Pipeline.parse(f"split-low-rank{{rank={rank}}},quantize-linears").run(module, plan)
    return module, plan


@pytest.mark.parametrize("branches", ["bf16", "float"])
@pytest.mark.parametrize("rank", [1, 7, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_agree_with_the_quantized_graph(dtype: torch.dtype, rank: int, branches: str) -> None:
    x, c = torch.randn(2, 5, 40).to(dtype), torch.randn(2, 120).to(dtype)
    module, plan = quantized(Layers(dtype), x, c, rank)
    (right,), before = outputs(module, x, c), {name: held.clone() for name, held in read_tensors(module).items()}
    backend = Native("compiled", branches=branches)
    backend.finish(module, plan)
    (found,) = outputs(module, x, c)
    assert sqnr_db(right.float(), found.float()) > 38.0
    assert count(module, native.norm_quantize_down.default) == 1
    # The GELU is in the linear before the last, which writes values beside codes if the branch reads bfloat16.
    values = int(branches == "bf16" and machine.has_bf16_products())
    assert count(module, native.vnni_linear_values.default) == count(module, native.down.default) == values
    assert count(module, native.quantize_down.default) == 2 - values
    assert count(module, reference.low_rank.default) == 0
    assert count(module, torch.ops.aten.gelu.default) == 0
    back = backend.stored(module)
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], held) for name, held in before.items())


def test_separate_branches_stay_ops_of_their_own() -> None:
    x, c = torch.randn(2, 5, 40), torch.randn(2, 120)
    module, plan = quantized(Layers(), x, c)
    (right,) = outputs(module, x, c)
    Native("compiled", branches="separate").finish(module, plan)
    assert count(module, reference.low_rank.default) == 5
    assert count(module, native.quantize_down.default) + count(module, native.norm_quantize_down.default) == 0
    assert sqnr_db(right, outputs(module, x, c)[0]) > 38.0


class Attention(nn.Module):
    """An attention whose result one linear reads; with ``shared``, the result is an output too."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.shared = shared

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        q, k, v = (layer(x + c).view(x.shape[0], -1, 2, 16).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.out(y) + y if self.shared else self.out(y)


@needs_bf16
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("branches", ["bf16", "float"])
def test_an_attention_before_a_branch_reads_bfloat16(shared: bool, branches: str) -> None:
    x, c = torch.randn(2, 5, 32), torch.randn(2, 1, 32)
    module, plan = quantized(Attention(shared), x, c)
    (right,) = outputs(module, x, c)
    Native("compiled", branches=branches).finish(module, plan)
    writes_codes = branches == "bf16" and not shared
    ops = {True: native.bf16_attention_values.default, False: native.bf16_attention.default}
    assert [count(module, ops[kind]) for kind in (writes_codes, not writes_codes)] == [1, 0]
    assert count(module, native.down.default) == writes_codes
    written = [node.meta["val"] for node in module.graph.nodes if node.target is ops[False]]
    assert all(value.dtype == torch.float32 for value in written)
    linears = [node for node in module.graph.nodes if node.target is native.vnni_linear.default]
    written = sorted(str(node.meta["val"].dtype) for node in linears)
    narrow = 0 if shared else 3  # A result that more than the quantization reads keeps its dtype throughout.
    assert written == ["torch.bfloat16"] * narrow + ["torch.float32"] * (4 - narrow)
    assert sqnr_db(right, outputs(module, x, c)[0]) > 38.0


def test_a_branch_whose_linear_is_read_elsewhere_stays() -> None:
    x, c = torch.randn(2, 5, 40), torch.randn(2, 120)
    module, plan = quantized(Layers(), x, c)
    branch = next(node for node in module.graph.nodes if node.target is reference.low_rank.default)
    reader = next(iter(branch.users))
    with module.graph.inserting_before(reader):
        total = module.graph.call_function(torch.ops.aten.add.Tensor, (branch, branch.args[0]))
    total.meta = dict(branch.meta)
    reader.replace_input_with(branch, total)
    module.recompile()
    (right,) = outputs(module, x, c)
    Native("compiled").finish(module, plan)
    assert count(module, reference.low_rank.default) == 1
    assert sqnr_db(right, outputs(module, x, c)[0]) > 38.0


def test_unknown_products_of_branches_are_refused() -> None:
    with pytest.raises(BackendError, match="branches='int4' is not known; choose bf16, float or separate"):
        Native(branches="int4")
