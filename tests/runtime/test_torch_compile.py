"""``torch.compile``: how often it compiles, and what it leaves alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import fxquant
from fxquant.errors import SpeedWarning
from fxquant.numerics.sqnr import sqnr_db
from fxquant.runtime import torch_compile
from fxquant.runtime.model import GraphModel
from tests.tiny import calibrate, inputs, make_dit, run
from tests.zoo.audit import STEPS
from tests.zoo.models import CAPTURED, Entry
from tests.zoo.test_zoo import run as run_zoo

ORDERS = [(1, 2, 3, 4, 5, 6, 7, 8), (8, 7, 6, 5, 4, 3, 2, 1), (4, 1)]
ZOO = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel",
       "SanaTransformer2DModel", "WanTransformer3DModel", "HunyuanDiT2DModel")  # fmt: skip
ENTRIES = [entry for entry in CAPTURED if entry.name in ZOO and entry.variant in ("", "-Sigma")]
ZOO_SAMPLE = {("Flux2D", "aot_eager")}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    model = make_dit()
    return fxquant.compile(model, recipe="htg-w8a8", calibrate=calibrate(model), measure=0)


def counting(model: nn.Module, backend: str = "aot_eager", **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True, **options), counter


# --- one graph for all batch sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "dynamic"),
    [
        pytest.param(
            order,
            dynamic,
            marks=[pytest.mark.exhaustive] * (order != ORDERS[0 if dynamic is None else -1]),
            id=f"{order[0]}-{order[-1]}-{dynamic}",
        )
        for dynamic in (None, True)
        for order in ORDERS
    ],
)
def test_it_compiles_once_for_all_batch_sizes(quantized: GraphModel, order: tuple[int, ...], dynamic: Any) -> None:
    made, counter = counting(quantized, dynamic=dynamic)
    for batch in order:
        assert torch.equal(
            run(made, batch=batch, timestep=None, seed=batch), run(quantized, batch=batch, timestep=None, seed=batch)
        )
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("entry", "backend"),
    [
        pytest.param(
            entry,
            backend,
            marks=[] if (entry.id, backend) in ZOO_SAMPLE else [pytest.mark.exhaustive],
            id=f"{entry.id}-{backend}",
        )
        for entry in ENTRIES
        for backend in ("eager", "aot_eager")
    ],
)
def test_models_of_the_zoo_compile_once(entry: Entry, backend: str) -> None:
    model = entry.model()
    made = fxquant.compile(
        model,
        recipe="ptq4dit-w8a8",
        calibrate=lambda: [run_zoo(model, entry.call(step=s, seed=i)) for i, s in enumerate(STEPS)],
        timestep=entry.timestep,
        measure=0,
    )
    compiled, counter = counting(made, backend)
    for batch in (1, 3, 2):
        call = entry.call(batch, seed=batch)
        assert torch.equal(run_zoo(compiled, call), run_zoo(made, call))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "order"),
    [
        pytest.param("fake-quant", ORDERS[1], id="8-1-fake-quant"),
        # Blocks of the native backend: test_compiling.py.
        pytest.param("native", ORDERS[2], id="4-1-native", marks=pytest.mark.exhaustive),
        pytest.param("fake-quant", ORDERS[2], id="4-1-fake-quant", marks=pytest.mark.exhaustive),
        pytest.param("native", ORDERS[1], id="8-1-native", marks=pytest.mark.exhaustive),
    ],
)
def test_inductor_compiles_once(backend: str, order: tuple[int, ...]) -> None:
    model = make_dit()
    made = fxquant.compile(model, recipe="htg-w8a8", backend=backend, calibrate=calibrate(model), measure=0)
    compiled, counter = counting(made, "inductor")
    for batch in order:
        call = {"batch": batch, "timestep": None, "seed": batch}
        assert sqnr_db(run(made, **call), run(compiled, **call)) > 45.0
    assert counter.frame_count == 1


def test_a_call_of_another_size_is_captured_and_compiled(quantized: GraphModel) -> None:
    """Also where graphs must not break: capturing happens before compilation begins."""
    plain = copy.deepcopy(quantized)
    made, counter = counting(copy.deepcopy(quantized), "eager")
    for size in (8, 4, 8):
        for batch in (1, 2):
            assert torch.equal(run(made, size=size, batch=batch), run(plain, size=size, batch=batch))
    assert counter.frame_count == 2


# --- what is left alone ---------------------------------------------------------------------------------------------


def test_the_inputs_of_the_caller_are_not_marked(quantized: GraphModel) -> None:
    made, _ = counting(quantized)
    call = inputs()
    with torch.no_grad():
        made(**call)
    assert not any(name.startswith("_dynamo") for tensor in call.values() for name in vars(tensor))


def test_who_wants_static_sizes_gets_them(quantized: GraphModel) -> None:
    made, counter = counting(quantized, "eager", dynamic=False)
    for batch in (1, 2, 3):
        run(made, batch=batch)
    assert counter.frame_count == 3


def test_within_a_larger_function_the_graph_does_not_break(quantized: GraphModel) -> None:
    def step(x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        sample: Tensor = quantized(x + 1, timestep, labels).sample
        return sample * 2

    counter = CompileCounterWithBackend("aot_eager")
    whole = torch.compile(step, backend=counter, fullgraph=True)
    with torch.no_grad():
        x, timestep, labels = inputs().values()
        assert torch.equal(whole(x, timestep, labels), step(x, timestep, labels))
    assert counter.frame_count == 1


def test_after_a_reset_it_compiles_again(quantized: GraphModel) -> None:
    for batch in (1, 2):
        made, counter = counting(quantized, "eager")
        run(made, batch=batch)
        torch._dynamo.reset()
        run(made, batch=3)
        assert counter.frame_count == 2


def test_the_module_compiles_itself(quantized: GraphModel) -> None:
    made, counter = copy.deepcopy(quantized), CompileCounterWithBackend("aot_eager")
    made.compile(backend=counter, fullgraph=True)
    for batch in (1, 2):
        assert torch.equal(run(made, batch=batch), run(quantized, batch=batch))
    assert counter.frame_count == 1


def test_gradients_pass_through_a_traced_model() -> None:
    traced, model = fxquant.trace(make_dit()), make_dit()
    traced(**inputs())
    made, _ = counting(traced)
    made(**inputs()).sample.sum().backward()
    model(**inputs()).sample.sum().backward()
    expected, found = model.pos_embed.proj.weight.grad, traced.graphs[0].pos_embed.proj.weight.grad
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6)


class Branching(nn.Module):
    """A kernel of its own that asks for the batch size while it is traced."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.ops.fxquant_test.picky(x) * timestep[:, None]


def test_what_cannot_be_open_is_compiled_as_torch_does() -> None:
    library = torch.library.Library("fxquant_test", "FRAGMENT")
    library.define("picky(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("picky", lambda x: x + 1, "CPU")
    torch.library.register_fake(
        "fxquant_test::picky", lambda x: x.new_empty(x.shape) if x.shape[0] > 5 else torch.empty_like(x), lib=library
    )
    model = Branching().eval()
    traced = fxquant.trace(model)
    made, counter = counting(traced)
    for batch in (2, 3, 1):
        x, timestep = torch.randn(batch, 3), torch.ones(batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(made(x, timestep), x + 1)
        assert [w.category for w in caught if w.category is SpeedWarning] == [SpeedWarning] * (batch == 2)
    assert 1 < counter.frame_count <= 3
    library._destroy()


# --- convolutions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(3, 6, 3, padding=1), (3, 9)),
        (lambda: nn.Conv2d(4, 6, 2, stride=2, bias=False), (4, 8, 8)),
        (lambda: nn.Conv2d(6, 6, 3, padding=(1, 2), groups=6, dilation=(1, 2)), (6, 8, 9)),
        (lambda: nn.Conv3d(2, 4, (1, 2, 2), stride=(1, 2, 2)), (2, 3, 4, 4)),
    ],
)
def test_convolutions_are_torchs(make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    traced = fxquant.trace(make().eval().requires_grad_(False), timestep=None)
    made, counter = counting(traced)
    for batch in (1, 2, 3):
        x = torch.randn(batch, *shape)
        assert torch.equal(made(x), traced(x))
        assert torch.equal(made(x.contiguous(memory_format=torch.preserve_format)), traced(x))
    assert counter.frame_count == 1


def test_the_convolution_is_an_honest_op() -> None:
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    arguments = (x, torch.randn(8, 2, 3, 3), torch.randn(8), [2, 1], [1, 0], [1, 1], 2)
    opcheck(torch.ops.fxquant.convolution.default, arguments, test_utils=("test_schema", "test_faketensor"))
    assert torch.ops.fxquant.convolution(*arguments).is_contiguous()
    assert torch_compile.convolution(x.bfloat16(), *arguments[1:]).dtype == torch.float32
