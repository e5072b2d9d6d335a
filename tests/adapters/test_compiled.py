"""Backends run models with LoRAs, and a swap compiles nothing again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

import fxquant
from fxquant.backends.torchao import parts
from fxquant.numerics.sqnr import sqnr_db
from tests.adapters.loras import composed, lora
from tests.tiny import calibrate, make_dit, run

UNFIT = parts.unfit()
pytestmark = pytest.mark.usefixtures("torchao_on_any_processor")
MODEL = make_dit()
FIRST, SECOND = lora(MODEL), lora(MODEL, rank=2, seed=4)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "recipe"),
    [
        pytest.param("native", "smoothquant-w8a8", marks=pytest.mark.exhaustive),
        ("native", "htg-w4a8"),
        ("torchao", "ptq4dit-w8a8"),
        ("torchao", "rtn-w4a16"),
        ("fake-quant", "dynamic-w8a8"),
    ],
)
def test_every_backend_adds_the_branches(backend: str, recipe: str) -> None:
    made = fxquant.compile(MODEL, recipe=recipe, backend=backend, calibrate=calibrate(MODEL), measure=0)
    reference = fxquant.compile(MODEL, recipe=recipe, calibrate=calibrate(MODEL), measure=0)
    before = run(made)
    for model in (made, reference):
        model.load_lora_adapter(FIRST, adapter_name="a")
    assert sqnr_db(run(reference), before) < 32
    assert sqnr_db(run(reference), run(made)) > 55
    made.disable_lora()
    assert torch.equal(run(made), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["native", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("torchao", "fake-quant"))]
)
def test_a_swap_compiles_nothing(backend: str) -> None:
    if backend == "torchao" and (reason := UNFIT):
        pytest.skip(f"no integer products: {reason}")
    made = fxquant.compile(MODEL, recipe="smoothquant-w8a8", backend=backend, calibrate=calibrate(MODEL), measure=0)
    made.compile()
    run(made)
    made.load_lora_adapter(FIRST, adapter_name="a")
    run(made)
    compiled = counters["stats"]["unique_graphs"]
    made.load_lora_adapter(SECOND, adapter_name="a", hotswap=True)
    assert sqnr_db(run(composed(MODEL, SECOND)), run(made)) > 35
    made.set_adapters("a", 0.0)
    assert sqnr_db(run(MODEL), run(made)) > 35
    made.disable_lora()
    run(made)
    made.enable_lora()
    run(made, batch=2)
    assert counters["stats"]["unique_graphs"] == compiled == 2
