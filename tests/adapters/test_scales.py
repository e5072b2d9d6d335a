"""Scales of LoRAs: from call to call, in several threads, in inference mode, and without LoRAs."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.adapters.turns import Turns
from fxquant.errors import AdapterError
from fxquant.numerics.sqnr import sqnr_db
from fxquant.runtime.lora import adapters_of
from fxquant.runtime.model import GraphModel
from tests.adapters.loras import composed, lora, with_methods
from tests.tiny import calibrate, inputs, make_dit, run

MODEL = make_dit()
ADAPTER = lora(MODEL)


@pytest.fixture(scope="module")
def base() -> GraphModel:
    return fxquant.compile(MODEL, recipe="smoothquant-w8a8", calibrate=calibrate(MODEL), measure=0)


@pytest.fixture(scope="module")
def loaded(base: GraphModel) -> GraphModel:
    made = copy.copy(base)
    made.load_lora_adapter(ADAPTER, adapter_name="a")
    return made


@torch.no_grad()
def scaled(model: Any, scale: Any) -> Tensor:
    sample: Tensor = model(**inputs(), cross_attention_kwargs={"scale": scale}).sample
    return sample


@pytest.mark.parametrize("how", ["eager", "compiled", "in pieces", "offloaded"])
def test_threads_with_different_scales(loaded: GraphModel, how: str) -> None:
    made = copy.deepcopy(loaded)
    if how == "compiled":
        made.compile(backend="eager")
    elif how == "in pieces":
        made = _two_blocks()
        made.compile_repeated_blocks(backend="eager")
    elif how == "offloaded":
        made.enable_group_offload("cpu")
    expected = {scale: scaled(made, scale) for scale in (0.0, 0.5, 1.0, 2.0)}
    wrong: list[float] = []
    threads: list[threading.Thread] = []

    def call(scale: float) -> None:
        wrong.extend(scale for _ in range(8) if not torch.equal(scaled(made, scale), expected[scale]))

    for scale in expected:
        threads.append(threading.Thread(target=call, args=(scale,)))
        threads[-1].start()
    made.set_adapters("a", 1.0)  # Waits for the calls that run.
    for thread in threads:
        thread.join()
    assert not wrong


def _two_blocks() -> GraphModel:
    model = make_dit(layers=2)
    made = fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), measure=0)
    made.load_lora_adapter(lora(model), adapter_name="a")
    return made


def test_calls_of_one_scale_overlap_and_others_wait() -> None:
    turns, log = Turns(), list[float]()
    turns.take(0.5, log.append)
    turns.take(0.5, log.append)

    def call() -> None:
        turns.take(2.0, log.append)
        turns.give()

    other = threading.Thread(target=call)
    other.start()
    turns.give()
    other.join(0.05)
    assert other.is_alive() and log == [0.5]
    turns.give()
    other.join(10)
    assert not other.is_alive() and log == [0.5, 2.0]


def test_a_call_that_fails_ends_its_turn(loaded: GraphModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made = copy.copy(loaded)
    adapters = adapters_of(made)
    assert adapters is not None
    expected = run(made)

    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(adapters.captured[0].module, "forward", fail)
        with pytest.raises(MemoryError):
            scaled(made, 0.5)
    made.set_adapters("a", 1.0)  # Would wait for ever.
    assert torch.equal(run(made), expected)


def test_what_is_done_in_inference_mode_holds_outside_of_it(base: GraphModel) -> None:
    made, second = copy.copy(base), lora(MODEL, rank=2, seed=1)
    with torch.inference_mode():
        made.load_lora_adapter(ADAPTER, adapter_name="a")
        scaled(made, 0.5)
        run(made, size=4)
    assert sqnr_db(run(composed(MODEL, ADAPTER)), run(made)) > 45
    made.load_lora_adapter(second, adapter_name="a", hotswap=True)
    assert sqnr_db(run(composed(MODEL, second)), run(made)) > 45
    assert sqnr_db(run(composed(MODEL, second), size=4), run(made, size=4)) > 30
    made.set_adapters("a", 0.0)
    assert torch.equal(scaled(made, 3.0), run(made))


def test_without_loras_a_scale_is_not_another_kind_of_call(base: GraphModel) -> None:
    """As on float models, which read it for LoRAs only."""
    made = copy.copy(base)
    for scale in (0.5, 0.7):
        assert torch.equal(scaled(made, scale), run(base))
    made.load_lora_adapter(ADAPTER, adapter_name="a")
    made.disable_lora()
    assert torch.equal(scaled(made, 0.5), run(base))
    assert len(made.graphs) == 1


@pytest.mark.parametrize("scale", [None, "much", float("nan"), [1.0, 2.0], torch.ones(2)])
def test_a_scale_that_is_not_a_number(loaded: GraphModel, scale: Any) -> None:
    with pytest.raises(AdapterError, match=r"cross_attention_kwargs\['scale'\] scales LoRAs.*finite number"):
        scaled(loaded, scale)


def test_an_adapter_that_is_named_twice_is_added_twice(loaded: GraphModel) -> None:
    """As peft does, with the last of its weights."""
    made, model = copy.copy(loaded), with_methods(MODEL)
    model.load_lora_adapter(dict(ADAPTER), adapter_name="a")
    for one in (made, model):
        one.set_adapters(["a", "a"], [0.9, 0.25])
    assert sqnr_db(run(model), run(made)) > 45


def test_weights_of_a_rank_stabilized_lora_after_loading(base: GraphModel, tmp_path: Path) -> None:
    """Its scale is alpha by the root of the rank; set_adapters needs it again after the model was saved."""
    paths = sorted({key.split(".lora_")[0].removeprefix("transformer.") for key in ADAPTER})
    metadata = {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": paths, "peft_type": "LORA"}
    options = {"adapter_name": "a", "metadata": {f"transformer.{key}": value for key, value in metadata.items()}}
    made, model = copy.copy(base), with_methods(MODEL)
    for one in (made, model):
        one.load_lora_adapter(dict(ADAPTER), **options)
    fxquant.save(made, tmp_path / "made")
    again = fxquant.load(tmp_path / "made")
    assert torch.equal(run(again), run(made))
    again.save_lora_adapter(tmp_path / "adapter", adapter_name="a")
    for one in (again, made, model):
        one.set_adapters("a", 0.4)
    assert torch.equal(run(again), run(made))
    assert sqnr_db(run(model), run(made)) > 45
    again.unload_lora()
    again.load_lora_adapter(tmp_path / "adapter", prefix=None, adapter_name="b")
    again.set_adapters("b", 0.4)
    assert torch.equal(run(again), run(made))
