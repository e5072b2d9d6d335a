"""Attention quantized as PTQ4DiT does, against a simulation of it that knows nothing of graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.ir.attention import find_attentions
from fxquant.ir.ops import recording
from fxquant.ir.tensors import copy_graph
from fxquant.numerics.grids import affine_parameters, fake_quantize
from fxquant.numerics.sqnr import sqnr_db
from fxquant.passes.quantize_attention import QuantizeAttention
from fxquant.pipeline.pipeline import Pipeline
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics
from tests.support import captured, count, golden, outputs, text

MATMUL = torch.ops.fxquant.matmul.default


class Attend(nn.Module):
    """Attention of its inputs, by a function of q, k, v and a mask."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor, timestep: Tensor, mask: Tensor) -> Any:
        return self.function(q, k, v, mask)


def values(dtype: torch.dtype = torch.float64, kv_heads: int = 4, mask: Tensor | None = None) -> dict[str, Tensor]:
    """q ``[2, 4, 6, 8]``, k and v ``[2, kv_heads, 5, 8]``, two timesteps and a mask ``[2, 1, 6, 5]``."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)

    found = {"q": draw(4, 6, 8), "k": draw(kv_heads, 5, 8), "v": draw(kv_heads, 5, 8) + 0.5}
    return found | {"timestep": torch.tensor([7.0, 3.0]), "mask": draw(1, 6, 5) if mask is None else mask}


def attended(
    model: nn.Module, inputs: dict[str, Tensor], options: str = "", precision: str = "precision=w8a8"
) -> tuple[fx.GraphModule, Plan, str]:
    """A graph whose attentions were calibrated on one call and quantized, the plan, and the text of before."""
    module = captured(model, **inputs).module
    plan = Plan("", "", "timestep")
    before = text(module)
    Pipeline.parse(f"assign-precision{{{precision} attention=quantized}}").run(module, plan)
    observed = copy_graph(module)
    Pipeline.parse("insert-observers").run(observed, plan)
    context = PassContext(plan, Statistics())
    with recording(context.statistics.record):
        seen = outputs(observed, *inputs.values())
    assert all(map(torch.equal, seen, outputs(module, *inputs.values())))
    Pipeline.parse(f"quantize-attention{options}").run(module, context)
    return module, plan, before


def simulated(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, change: Callable[[Tensor], Tensor] = lambda scores: scores, **_: Any
) -> Tensor:
    """Attention of fake-quantized values; ``change`` masks the scores."""
    (entry,) = plan.attentions.values()

    def coded(x: Tensor, side: str) -> Tensor:
        found = entry.ranges[side]
        return fake_quantize(x, *affine_parameters(found.low, found.high, entry.bits), entry.bits)

    heads = q.shape[1] // k.shape[1]
    k, v = (coded(x, side).repeat_interleave(heads, 1) for x, side in ((k, "k"), (v, "v")))
    scores = torch.einsum("bhnd,bhmd->bhnm", coded(q, "q"), k)
    step = torch.tensor(1 / (2**entry.softmax_bits - 1)).double()  # Scales are kept in float32.
    probabilities = (change(scores).softmax(-1).nan_to_num() / step).round() * step
    return torch.einsum("bhnm,bhmd->bhnd", probabilities, v)


def test_before_and_after() -> None:
    model = Attend(lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    module, plan, before = attended(model, values(torch.float32))
    assert before == golden(
        """
        q: float32[B, 4, 6, 8]
        k: float32[B, 4, 5, 8]
        v: float32[B, 4, 5, 8]
        timestep: float32[B]
        mask: float32[B, 1, 6, 5]
        scaled_dot_product_attention: float32[B, 4, 6, 8] = scaled_dot_product_attention(q, k, v, mask)
        return scaled_dot_product_attention
        """
    )
    assert text(module) == golden(
        """
        q: float32[B, 4, 6, 8]
        k: float32[B, 4, 5, 8]
        v: float32[B, 4, 5, 8]
        timestep: float32[B]
        mask: float32[B, 1, 6, 5]
        mul_tensor: float32[B, 4, 6, 8] = mul.Tensor(q, 0.35355339059327373)
        quantize_default: uint8[B, 4, 6, 8] = fxquant::quantize(mul_tensor, @attention.q_scale, @attention.q_zero_point, int8)
        quantize_default_1: uint8[B, 4, 5, 8] = fxquant::quantize(k, @attention.k_scale, @attention.k_zero_point, int8)
        quantize_default_2: uint8[B, 4, 5, 8] = fxquant::quantize(v, @attention.v_scale, @attention.v_zero_point, int8)
        transpose_int: uint8[B, 4, 8, 5] = transpose.int(quantize_default_1, -2, -1)
        matmul_default: float32[B, 4, 6, 5] = fxquant::matmul(quantize_default, @attention.q_scale, @attention.q_zero_point, transpose_int, @attention.k_scale, @attention.k_zero_point, int8, int8, float32)
        add_tensor: float32[B, 4, 6, 5] = add.Tensor(matmul_default, mask)
        _safe_softmax_default: float32[B, 4, 6, 5] = _safe_softmax(add_tensor, -1)
        quantize_default_3: uint8[B, 4, 6, 5] = fxquant::quantize(_safe_softmax_default, @attention.softmax_scale, @attention.softmax_zero_point, int8)
        matmul_default_1: float32[B, 4, 6, 8] = fxquant::matmul(quantize_default_3, @attention.softmax_scale, @attention.softmax_zero_point, quantize_default_2, @attention.v_scale, @attention.v_zero_point, int8, int8, float32)
        return matmul_default_1
        """  # noqa: E501
    )
    assert plan.attentions["attention"].bits == plan.attentions["attention"].softmax_bits == 8


def explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q * 0.25) @ k.transpose(-2, -1) + mask
    return F.dropout(scores.float().softmax(dim=-1), 0.1, training=False).to(q.dtype) @ v


def batched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As older processors of diffusers compute it, heads folded into the batch."""
    heads = q.shape[1]
    folded = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v, mask.expand(-1, heads, -1, -1))]
    scores = torch.baddbmm(folded[3], folded[0], folded[1].transpose(-1, -2), beta=1, alpha=0.25)
    return torch.bmm(scores.softmax(-1), folded[2]).unflatten(0, (-1, heads))


HALF_MASKED = torch.rand(2, 1, 6, 5, generator=torch.Generator().manual_seed(1)) > 0.4
HALF_MASKED[0, 0, 2] = False  # A row that sees no key at all is 0.
CAUSAL = torch.ones(6, 5, dtype=torch.bool).tril()
Case = tuple[Callable[..., Tensor], dict[str, Any], float, Callable[[Tensor, Tensor], Tensor]]
CASES: dict[str, Case] = {
    "plain": (lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v), {}, 8**-0.5, lambda s, m: s),
    "scale": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, scale=0.5), {}, 0.5, lambda s, m: s),
    "added mask": (F.scaled_dot_product_attention, {}, 8**-0.5, lambda s, m: s + m),
    "mask": (
        F.scaled_dot_product_attention,
        {"mask": HALF_MASKED},
        8**-0.5,
        lambda s, m: s.masked_fill(~m, -math.inf),
    ),
    "causal": (
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        {},
        8**-0.5,
        lambda s, m: s.masked_fill(~CAUSAL, -math.inf),
    ),
    "grouped queries": (
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
        {"kv_heads": 2},
        8**-0.5,
        lambda s, m: s + m,
    ),
    "explicit": (explicit, {}, 0.25, lambda s, m: s + m),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", ["", "{activation-range=mse softmax-bits=6}"])
def test_equals_the_simulation(name: str, options: str) -> None:
    function, inputs, scale, change = CASES[name]
    given = values(**inputs)
    module, plan, _ = attended(Attend(function), given, options)
    assert count(module, MATMUL) == 2
    (actual,), (expected,) = outputs(module, *given.values()), [function(*(given[n] for n in ("q", "k", "v", "mask")))]
    reference = simulated(plan, **{**given, "q": given["q"] * scale}, change=lambda s: change(s, given["mask"]))
    torch.testing.assert_close(actual, reference, rtol=0, atol=1e-9 if name != "explicit" else 1e-6)
    assert sqnr_db(expected, actual) > (32 if not options else 20)
    (entry,) = plan.attentions.values()
    if not options:  # Min-max over what calibration saw.
        q = given["q"] * scale
        assert (entry.ranges["q"].low, entry.ranges["q"].high) == pytest.approx((float(q.min()), float(q.max())))
        assert (entry.ranges["v"].low, entry.ranges["v"].high) == pytest.approx(
            (min(float(given["v"].min()), 0.0), float(given["v"].max()))
        )
        assert all(30 < db < 60 for db in entry.sqnr_db.values())


def test_heads_folded_into_the_batch() -> None:
    given = values()
    module, plan, _ = attended(Attend(batched), given)
    (actual,) = outputs(module, *given.values())
    # q is multiplied by alpha behind the product, which moves no code.
    expected = simulated(plan, **given, change=lambda scores: scores * 0.25 + given["mask"])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_precision_are_kept_in_float32(dtype: torch.dtype) -> None:
    given = values(dtype)
    module, _, _ = attended(Attend(F.scaled_dot_product_attention), given)
    found = {node.name: node.meta["val"].dtype for node in module.graph.nodes if node.op == "call_function"}
    assert found["matmul_default"] == found["_safe_softmax_default"] == torch.float32
    (actual,) = outputs(module, *given.values())
    assert actual.dtype == dtype
    exact = F.scaled_dot_product_attention(*(given[name].double() for name in ("q", "k", "v", "mask")))
    assert sqnr_db(exact, actual) > 32


def test_one_value_may_be_key_and_value() -> None:
    given = values()
    module, plan, _ = attended(Attend(lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, k)), given)
    entry = plan.attentions["attention"]
    assert entry.observed == {"q": "attention:q", "k": "attention:k", "v": "attention:k"}
    assert entry.ranges["k"] == entry.ranges["v"]
    scaled = {**given, "q": given["q"] * 8**-0.5, "v": given["k"]}
    torch.testing.assert_close(outputs(module, *given.values())[0], simulated(plan, **scaled), rtol=0, atol=1e-9)


def other_axis(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-2) @ v


def scores_needed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-2, -1)
    return scores.softmax(-1) @ v, scores.sum()


def laid_out_anew(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    p = (q @ k.transpose(-2, -1)).softmax(-1)
    return p.reshape(p.shape[0], 4, 5, 6) @ q


def two_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) + q @ v.transpose(-2, -1)).softmax(-1) @ v


MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "dropout": (
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5),
        "it drops out a share of 0.5 of its probabilities",
    ),
    "another axis": (other_axis, "its softmax runs over axis -2, not over the keys"),
    "scores needed": (scores_needed, "matmul, from its scores, is also read by sum_1"),
    "laid out anew": (laid_out_anew, "its probabilities are laid out anew between the softmax and the product"),
    "two products": (two_products, "its scores come from 2 matrix products that are known, not from one"),
    "no product": (lambda q, k, v, m: m.softmax(-1) @ v, "its scores come from 0 matrix products that are known"),
}


@pytest.mark.parametrize("name", MISSES)
def test_what_cannot_be_quantized_stays_and_says_why(name: str) -> None:
    function, reason = MISSES[name]
    given = values()
    module = captured(Attend(function), **given).module
    plan, before = Plan("", "", "timestep"), text(module)
    Pipeline.parse("assign-precision{attention=quantized},insert-observers,quantize-attention").run(module, plan)
    assert text(module) == before
    (entry,) = plan.attentions.values()
    assert entry.bits is None
    assert entry.reason is not None
    assert reason in entry.reason


class Linear(nn.Module):
    """Linear attention, a router and an einsum: products and a softmax that are no softmax attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gate = nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.qkv(x).chunk(3, -1)
        routed = self.gate(x).softmax(-1).topk(1).values
        return F.relu(q) @ (F.relu(k).transpose(1, 2) @ v) * routed, torch.einsum("bnd,bmd->bnm", q, k)


def test_other_products_are_listed_too() -> None:
    module = captured(Linear(), x=torch.randn(2, 5, 8), timestep=torch.zeros(2)).module
    reasons = {found.name: found.reason for found in find_attentions(module.graph)}
    product = "it is a product of two activations, but no softmax attention"
    written = "it is written as an einsum; matmul, bmm and scaled_dot_product_attention are known"
    assert reasons == {"attention": product, "attention@2": product, "attention@3": written}


@pytest.mark.parametrize(
    ("precision", "reason"),
    [
        ("precision=w8a16", "its activations are to stay float"),
        ("overrides=att*=w8a16", "its activations are to stay float"),
        ("overrides=att*=float", "its activations are to stay float"),
    ],
)
def test_float_activations_keep_attention_in_float(precision: str, reason: str) -> None:
    module, plan, before = attended(Attend(F.scaled_dot_product_attention), values(), precision=precision)
    assert text(module) == before
    assert plan.attentions["attention"].reason == reason


def test_overrides_decide_by_name() -> None:
    _, plan, _ = attended(Attend(F.scaled_dot_product_attention), values(), precision="overrides=attention=w8a5")
    assert plan.attentions["attention"].bits == 5


def test_the_recipe_decides_whether_attention_is_quantized() -> None:
    module, plan = captured(Attend(F.scaled_dot_product_attention), **values()).module, Plan("", "", "timestep")
    Pipeline.parse("assign-precision{layers=all}").run(module, plan)
    assert plan.attentions["attention"].reason == "the recipe keeps attention in float"


def test_a_query_that_is_the_same_for_all_samples_cannot_be_told_apart_by_timestep() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 2, 3, 8))

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.query, x, x)

    module, plan = (
        captured(Pooled(), x=torch.randn(2, 2, 5, 8), timestep=torch.zeros(2)).module,
        Plan("", "", "timestep"),
    )
    Pipeline.parse("assign-precision{attention=quantized}").run(module, plan)
    assert plan.attentions["attention"].reason == "the leading axis of its q is not the batch"


def test_what_is_planned_and_cannot_be_matched_is_an_error() -> None:
    _, plan, _ = attended(Attend(F.scaled_dot_product_attention), values())
    module = captured(Attend(other_axis), **values()).module
    with pytest.raises(ConfigurationError, match=r"'attention' is to be quantized.*runs over axis -2.*overrides"):
        Pipeline.parse("quantize-attention").run(module, plan)


def test_without_statistics_there_are_no_ranges() -> None:
    module, plan = captured(Attend(F.scaled_dot_product_attention), **values()).module, Plan("", "", "timestep")
    with pytest.raises(CalibrationError, match="attention 'attention' needs ranges of q, k and v"):
        Pipeline.parse("assign-precision{attention=quantized},quantize-attention").run(module, plan)
    with pytest.raises(CalibrationError, match="calibration never reached layer 'attention:q'"):
        Pipeline.parse("quantize-attention").run(module, PassContext(plan, Statistics()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{activation-range=dynamic}", "v cannot have a range for each"),
        ("{softmax-bits=9}", "9 bits for the softmax"),
    ],
)
def test_bad_options_are_refused_at_once(options: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Pipeline.parse(f"quantize-attention{options}")
    assert str(QuantizeAttention()) == "quantize-attention"
