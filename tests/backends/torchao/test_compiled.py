"""What ``torch.compile`` makes of lowered graphs: integer products, all of them, with the same results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import fxquant
from fxquant.backends.torchao import TorchAO, parts
from fxquant.errors import SpeedWarning
from fxquant.numerics.sqnr import sqnr_db
from fxquant.pipeline.pipeline import Pipeline
from fxquant.pipeline.recipes import Recipe, make_recipe
from fxquant.planning.plan import Plan
from fxquant.runtime.model import GraphModel
from tests.backends.torchao.test_lowering import FeedForward, Patches, plan_for
from tests.support import captured
from tests.tiny import calibrate, inputs, make_dit

UNFIT = parts.unfit()
pytestmark = pytest.mark.skipif(UNFIT is not None, reason=f"no integer products: {UNFIT}")
FLOOR = 45.0  # dB against the oracle.


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def fused(call: Callable[[], Any]) -> tuple[Any, str]:
    """The result of a call, and the code that inductor wrote for it."""
    with torch.no_grad():
        result, code = run_and_get_code(call)
    return result, "\n".join(code)


def products(code: str) -> int:
    """Calls of oneDNN's integer products; their names stand in the code once more each where they are made ready."""
    return code.count("torch.ops.onednn.qlinear_pointwise") + code.count("torch.ops.onednn.qconv_pointwise")


def lowered(model: nn.Module, plan: Plan, x: Tensor, symmetric: bool = False) -> torch.fx.GraphModule:
    module = captured(model, x).module
    step = "quantize-linears" if isinstance(model, FeedForward) else "quantize-convolutions"
    Pipeline.parse(f"{step}{{symmetric={symmetric}}}" if symmetric else step).run(module, plan)
    TorchAO().finish(module, plan)
    return module


def compiled(module: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    made = torch.compile(module, fullgraph=True, dynamic=True)

    def call(x: Tensor) -> list[Tensor]:
        with TorchAO().settings():
            found: list[Tensor] = made(x)
        return found

    return call


@pytest.mark.parametrize(
    ("symmetric", "bits", "dtype"), [(True, 8, torch.float32), (False, 8, torch.float32), (False, 4, torch.bfloat16)]
)
def test_linears_are_integer_products(symmetric: bool, bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 32).to(dtype)
    module = lowered(FeedForward(32).to(dtype), plan_for(FeedForward(32), bits), x, symmetric)
    (found,), code = fused(lambda: compiled(module)(x))
    assert counters["inductor"]["qlinear_weight_prepack_matcher_count"] == 2
    assert "dequantize_per_channel" not in code
    # GELU and the quantization behind it run in the first product's kernel where nothing stands between.
    assert ("'gelu'" in code) == (symmetric or bits < 8)
    assert counters["inductor"]["qlinear_binary_matcher_count"] == 0
    with torch.no_grad():
        (expected,) = module(x)
    assert found.dtype == dtype
    assert sqnr_db(expected.double(), found.double()) > (38.0 if dtype == torch.bfloat16 else 100.0)


def test_a_convolution_is_an_integer_product() -> None:
    x = torch.randn(3, 4, 6, 6)
    module = lowered(Patches(), plan_for(Patches(), 8), x)
    (found,), _ = fused(lambda: compiled(module)(x))
    assert counters["inductor"]["qconv_weight_prepack_matcher_count"] == 1
    with torch.no_grad():
        assert sqnr_db(module(x)[0], found) > 100.0


@pytest.mark.parametrize("method", ["minmax", "dynamic"])
def test_sums_of_saturating_codes_are_those_of_int64(method: str) -> None:
    """All inputs at the top of the grid, and weights at both ends: sums of 16 bits would saturate."""
    model = FeedForward(64)
    with torch.no_grad():
        model.up.weight[:] = 1.0
        model.up.weight[::2] = -1.0
        model.up.bias.zero_()
        model.down.weight.copy_(model.up.weight.t())
    x = torch.full((2, 3, 64), 3.0)
    plan = plan_for(model, 8, method=method)
    module = lowered(model, plan, x, symmetric=True)
    kept = module.graph  # What the first linear yields, before the GELU.
    first = next(node for node in kept.nodes if node.target is torch.ops.aten.gelu.default).args[0]
    kept.output_node().args = ((first,),)
    kept.eliminate_dead_code()
    module.recompile()
    (found,), _ = fused(lambda: compiled(module)(x))
    assert counters["inductor"]["qlinear_weight_prepack_matcher_count"] == 1
    step, zero_point = 3.0 / 255, 0
    if method == "minmax":
        quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
        (step, zero_point), *_ = (node.args[1:3] for node in module.graph.nodes if node.target is quantize)
    weight = module.get_buffer("up.weight_packed_int8").long()
    assert weight.abs().min() == 127
    exact = (255 - zero_point) * weight.sum(1).double() * step * module.get_parameter("up.weight_scale").flatten()
    torch.testing.assert_close(found, exact.float().expand(2, 3, -1), rtol=3e-6, atol=0.0)


def test_a_weight_of_two_layers_is_fused_in_both() -> None:
    class Twice(FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    x = torch.randn(2, 3, 32)
    plan = plan_for(Twice(32), 8)
    plan.layers |= {f"{name}@2": layer for name, layer in plan.layers.items()}
    module = lowered(Twice(32), plan, x)
    (found,), _ = fused(lambda: compiled(module)(x))
    assert counters["inductor"]["qlinear_weight_prepack_matcher_count"] == 4
    with torch.no_grad():
        assert sqnr_db(module(x)[0], found) > 100.0


# --- whole models ---------------------------------------------------------------------------------------------------


def quantized(recipe: str | Recipe, backend: str = "torchao") -> GraphModel:
    model = make_dit()
    return fxquant.compile(model, recipe=recipe, backend=backend, calibrate=calibrate(model), measure=0)


def every_linear() -> Recipe:
    """All linears and the patch convolution, attention in float."""
    return make_recipe("rtn-w8a8", "all").with_options("assign-precision", attention="float")


@pytest.mark.slow
@pytest.mark.exhaustive  # Layers are compiled above, and whole models without inductor in runtime/test_compiling.py.
@pytest.mark.parametrize("recipe", ["static", "dynamic-w8a8"])
def test_a_model_compiles_once_for_all_batches(recipe: str) -> None:
    made = every_linear() if recipe == "static" else make_recipe(recipe)
    mine, oracle = quantized(made), quantized(made, "fake-quant")
    assert mine.plan is not None
    layers = [layer for layer in mine.plan.layers.values() if layer.activation_bits is not None]
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpeedWarning)
        mine.compile(fullgraph=True, dynamic=True)
        first, code = fused(lambda: mine(**inputs(2, timestep=None, seed=2)).sample)
    matched = ("qlinear_weight_prepack_matcher_count", "qconv_weight_prepack_matcher_count")
    assert sum(counters["inductor"][name] for name in matched) == len(layers)
    assert products(code) >= len(layers)
    assert sqnr_db(oracle(**inputs(2, timestep=None, seed=2)).sample, first) > FLOOR
    torch._dynamo.config.error_on_recompile = True
    try:
        for batch in (3, 8):
            call = inputs(batch, timestep=None, seed=batch)
            with torch.no_grad():
                assert sqnr_db(oracle(**call).sample, mine(**call).sample) > FLOOR
    finally:
        torch._dynamo.config.error_on_recompile = False


def test_torch_compile_without_frozen_weights_is_told() -> None:
    mine = quantized("rtn-w8a8")
    made = torch.compile(mine, backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.warns(SpeedWarning, match=r"not frozen.*model\.compile\(\)"):
        found = made(**inputs(2)).sample
    with torch.no_grad():
        assert torch.equal(found, mine(**inputs(2)).sample)
    torch._dynamo.reset()
    with (
        pytest.warns(SpeedWarning, match="not frozen"),  # Gradients keep inductor from freezing.
        torch._inductor.config.patch(freezing=True),
    ):
        made(**inputs(2))
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad(), torch._inductor.config.patch(freezing=True):
        warnings.simplefilter("error", SpeedWarning)
        made(**inputs(2))


def test_compile_in_place_keeps_the_models_results_for_every_backend() -> None:
    for backend in ("torchao", "fake-quant"):
        mine = quantized("rtn-w8a8", backend)
        with torch.no_grad():
            expected = mine(**inputs(2)).sample
        mine.compile(backend="eager")
        assert torch.equal(mine(**inputs(2)).sample, expected)
    assert not torch._inductor.config.freezing
