"""The methods that diffusers gives models for LoRAs do on a quantized model what they do on the float model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import PeftAdapterMixin
from peft import get_peft_model_state_dict

import fxquant
from fxquant.errors import NonFiniteError
from fxquant.numerics.sqnr import sqnr_db
from fxquant.runtime.lora import METHODS, adapters_of
from fxquant.runtime.model import GraphModel
from tests.adapters.loras import composed, lora, with_methods
from tests.tiny import calibrate, inputs, make_dit, run

MODEL = make_dit()
FIRST, SECOND = lora(MODEL), lora(MODEL, rank=2, seed=1, targets=("to_q", "net.2"))


@pytest.fixture
def quantized() -> GraphModel:
    return fxquant.compile(MODEL, recipe="smoothquant-w8a8", calibrate=calibrate(MODEL), measure=0)


def test_every_method_of_diffusers_is_answered(quantized: GraphModel) -> None:
    """A method that a later version adds has to work or be refused, and may not change the stand-in alone."""
    assert {name for name in dir(PeftAdapterMixin) if not name.startswith("_")} == METHODS
    assert all(callable(getattr(quantized, name)) for name in METHODS)


def test_outputs_are_as_close_as_those_of_the_base(quantized: GraphModel) -> None:
    base = sqnr_db(run(MODEL), run(quantized))
    quantized.load_lora_adapter(FIRST, adapter_name="a")
    expected = run(composed(MODEL, FIRST))
    assert sqnr_db(expected, run(MODEL)) < 30
    assert sqnr_db(expected, run(quantized)) > base - 6


def both(quantized: GraphModel) -> list[Any]:
    """The quantized model and the float one, each with two adapters."""
    models = [quantized, with_methods(MODEL)]
    for model in models:
        model.load_lora_adapter(dict(FIRST), adapter_name="a")
        model.load_lora_adapter(dict(SECOND), adapter_name="b")
    return models


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("set_adapters", (["a", "b"], [0.5, -0.8])),
        ("set_adapters", ("a", 0.3)),
        pytest.param("set_adapters", (["b"],), marks=pytest.mark.exhaustive),
        ("set_adapters", ("a", {"attn1": 0.2, "ff": 0.0})),
        pytest.param("set_adapter", ("a",), marks=pytest.mark.exhaustive),
        ("set_adapter", (["a", "b"],)),
        pytest.param("delete_adapters", ("b",), marks=pytest.mark.exhaustive),
        ("delete_adapters", (["a"],)),
        ("disable_lora", ()),
        ("disable_adapters", ()),
        ("unload_lora", ()),
    ],
)
def test_each_method_does_the_same_as_on_the_float_model(
    quantized: GraphModel, method: str, arguments: tuple[Any, ...]
) -> None:
    base = sqnr_db(run(MODEL), run(quantized))
    made, expected = both(quantized)
    for model in (made, expected):
        getattr(model, method)(*arguments)
    assert sqnr_db(run(expected), run(made)) > base - 6
    assert getattr(made, "peft_config", {}).keys() == getattr(expected, "peft_config", {}).keys()
    if hasattr(made, "peft_config"):
        assert made.active_adapters() == expected.active_adapters()


def test_switched_off_the_model_is_what_it_was_bit_for_bit(quantized: GraphModel) -> None:
    before, code = run(quantized), quantized.graphs[0].code
    tensors = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    quantized.load_lora_adapter(FIRST, adapter_name="a")
    changed = run(quantized)
    assert not torch.equal(changed, before)
    quantized.disable_lora()
    assert torch.equal(run(quantized), before)
    quantized.enable_lora()
    assert torch.equal(run(quantized), changed)
    quantized.unload_lora()
    assert torch.equal(run(quantized), before)
    assert not hasattr(quantized, "peft_config")
    quantized.load_lora_adapter(FIRST, adapter_name="a")
    assert torch.equal(run(quantized), changed)
    quantized.delete_adapters("a")
    assert torch.equal(run(quantized), before)
    assert len(quantized.graphs) == 1 and quantized.graphs[0].code == code
    after = quantized.state_dict()
    assert after.keys() == tensors.keys() and all(torch.equal(after[name], tensors[name]) for name in tensors)


def test_another_size_has_the_lora_too(quantized: GraphModel) -> None:
    quantized.load_lora_adapter(FIRST, adapter_name="a")
    run(quantized)
    expected = run(composed(MODEL, FIRST), batch=2, size=4)
    assert sqnr_db(expected, run(quantized, batch=2, size=4)) > 30
    assert len(quantized.graphs) == 1
    quantized.set_adapters("a", 0.0)
    assert sqnr_db(run(MODEL, batch=2, size=4), run(quantized, batch=2, size=4)) > 30
    quantized.disable_lora()
    run(quantized, batch=2, size=4)
    assert len(quantized.graphs) == 2


def graphs(quantized: GraphModel) -> list[int]:
    adapters = adapters_of(quantized)
    assert adapters is not None
    return [id(captured.module) for captured in adapters.captured]


def test_a_hot_swap_changes_values_only(quantized: GraphModel) -> None:
    quantized.load_lora_adapter(FIRST, adapter_name="a")
    before, first = graphs(quantized), run(quantized)
    quantized.load_lora_adapter(SECOND, adapter_name="a", hotswap=True)  # Of a lower rank, and beside fewer layers.
    assert graphs(quantized) == before
    assert sqnr_db(run(composed(MODEL, SECOND)), run(quantized)) > 30
    quantized.load_lora_adapter(FIRST, adapter_name="a", hotswap=True)
    assert graphs(quantized) == before
    assert torch.equal(run(quantized), first)


def test_a_hot_swap_to_a_higher_rank_makes_room(quantized: GraphModel) -> None:
    larger = lora(MODEL, rank=6, seed=3)
    quantized.load_lora_adapter(SECOND, adapter_name="a")
    before = graphs(quantized)
    quantized.load_lora_adapter(larger, adapter_name="a", hotswap=True)
    assert graphs(quantized) != before
    assert sqnr_db(run(composed(MODEL, larger)), run(quantized)) > 30


def test_room_that_was_asked_for_is_enough(quantized: GraphModel) -> None:
    quantized.enable_lora_hotswap(target_rank=8)
    quantized.load_lora_adapter(FIRST, adapter_name="a")
    before = graphs(quantized)
    larger = lora(MODEL, rank=8, seed=3)
    quantized.load_lora_adapter(larger, adapter_name="a", hotswap=True)
    assert graphs(quantized) == before
    assert sqnr_db(run(composed(MODEL, larger)), run(quantized)) > 30
    with pytest.raises(RuntimeError, match="before loading the first adapter"):
        quantized.enable_lora_hotswap(target_rank=16)


def test_a_hot_swap_keeps_what_is_active(quantized: GraphModel) -> None:
    both(quantized)
    quantized.set_adapters(["b"], [0.5])
    before = run(quantized)
    quantized.load_lora_adapter(lora(MODEL, seed=9), adapter_name="a", hotswap=True)
    assert quantized.active_adapters() == ["b"]
    assert torch.equal(run(quantized), before)
    quantized.disable_lora()
    plain = run(quantized)
    quantized.load_lora_adapter(FIRST, adapter_name="b", hotswap=True)
    assert torch.equal(run(quantized), plain)


def test_alphas_and_ranks_of_each_layer(quantized: GraphModel) -> None:
    paths = [key.removesuffix(".lora_A.weight") for key in FIRST if key.endswith("lora_A.weight")]
    alphas = {f"{path}.alpha": 1.0 + number for number, path in enumerate(paths)}
    mixed = FIRST | {key: value for key, value in SECOND.items() if "to_q" in key}
    quantized.load_lora_adapter(mixed, adapter_name="a", network_alphas=dict(alphas))
    expected = composed(MODEL, mixed, network_alphas=dict(alphas))
    assert sqnr_db(run(expected), run(quantized)) > 45
    assert sqnr_db(run(composed(MODEL, mixed)), run(quantized)) < 40


def test_a_written_adapter_is_read_by_both(quantized: GraphModel, tmp_path: Path) -> None:
    quantized.load_lora_adapter(FIRST, adapter_name="a")
    quantized.save_lora_adapter(tmp_path, adapter_name="a")
    quantized.save_lora_adapter(tmp_path / "upcast", adapter_name="a", upcast_before_saving=True)
    before = run(quantized)
    model = with_methods(MODEL)
    model.load_lora_adapter(tmp_path, prefix=None, adapter_name="c", use_safetensors=True)
    assert torch.equal(run(model), run(composed(MODEL, FIRST)))
    quantized.unload_lora()
    quantized.load_lora_adapter(tmp_path, prefix=None, adapter_name="c")
    assert torch.equal(run(quantized), before)
    with pytest.raises(ValueError, match="not found"):
        quantized.save_lora_adapter(tmp_path, adapter_name="other")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_lora_of_another_dtype_is_cast(quantized: GraphModel, dtype: torch.dtype) -> None:
    cast = {key: value.to(dtype) for key, value in FIRST.items()}
    quantized.load_lora_adapter(cast, adapter_name="a")
    assert run(quantized).dtype == torch.float32
    assert sqnr_db(run(composed(MODEL, cast)), run(quantized)) > 30


def test_a_model_in_bfloat16() -> None:
    model = make_dit().bfloat16()
    given = inputs()
    given["hidden_states"] = given["hidden_states"].bfloat16()

    @torch.no_grad()
    def output(of: Any) -> torch.Tensor:
        return of(**given).sample.float()

    made = fxquant.compile(model, recipe="ptq4dit-w8a8", calibrate=lambda: output(model), measure=0)
    base = sqnr_db(output(model), output(made))
    made.load_lora_adapter(FIRST, adapter_name="a")
    expected = output(composed(model, FIRST))
    assert sqnr_db(expected, output(model)) < base - 6
    assert sqnr_db(expected, output(made)) > base - 3


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_copies_have_the_adapters(quantized: GraphModel, how: Any) -> None:
    quantized.load_lora_adapter(FIRST, adapter_name="a")
    quantized.set_adapters("a", 0.5)
    before, made = run(quantized), how(quantized)
    assert torch.equal(run(made), before)
    made.unload_lora()
    assert torch.equal(run(quantized), before)
    assert not torch.equal(run(made), before)


def test_a_state_dict_that_is_loaded_serves_the_lora_too(quantized: GraphModel) -> None:
    quantized.load_lora_adapter(FIRST, adapter_name="a")
    before, held = run(quantized), {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    quantized.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in held.items()})
    assert not torch.equal(run(quantized), before)
    quantized.load_state_dict(held)
    assert torch.equal(run(quantized), before)


def test_peft_finds_the_tensors_in_the_state_dict(quantized: GraphModel) -> None:
    """Pipelines write LoRAs from what peft returns: ``save_lora_weights(..., transformer_lora_layers=...)``."""
    without = quantized.state_dict().keys()
    for name, state_dict in (("a", FIRST), ("b", SECOND)):
        quantized.load_lora_adapter(state_dict, adapter_name=name)
        found = get_peft_model_state_dict(quantized, adapter_name=name)
        expected = {key.removeprefix("transformer."): value for key, value in state_dict.items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    quantized.unload_lora()
    assert quantized.state_dict().keys() == without


def test_tensors_of_an_adapter_that_are_loaded_count(quantized: GraphModel) -> None:
    quantized.load_lora_adapter(FIRST, adapter_name="a")
    before, held = run(quantized), {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    key = next(name for name in held if ".lora_B.a" in name)
    quantized.load_state_dict({key: torch.zeros_like(held[key])}, strict=False)
    zeroed = FIRST | {f"transformer.{key.replace('.lora_B.a.', '.lora_B.')}": torch.zeros_like(held[key])}
    assert zeroed.keys() == FIRST.keys()
    assert sqnr_db(run(composed(MODEL, zeroed)), run(quantized)) > 30
    with pytest.raises(NonFiniteError, match="hold NaN"):
        quantized.load_state_dict(held | {key: held[key] * torch.nan})
    with pytest.raises(RuntimeError, match="has shape"):
        quantized.load_state_dict(held | {key: held[key][1:]})
    quantized.load_state_dict(held)
    assert torch.equal(run(quantized), before)
    quantized.unload_lora()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lora_"):
        quantized.load_state_dict(held)


def test_a_model_that_gets_other_weights_and_is_moved_keeps_its_adapters(quantized: GraphModel) -> None:
    """Graphs with branches are captured again after the weights changed, also if the model was moved before that."""
    quantized.load_lora_adapter(FIRST, adapter_name="a")
    with torch.no_grad():
        expected = quantized(**inputs(), cross_attention_kwargs={"scale": 0.5}).sample
        quantized(**inputs(), cross_attention_kwargs={"scale": 1.0})
        quantized.load_state_dict(quantized.state_dict())
        quantized.to("cpu")
        assert torch.equal(quantized(**inputs(), cross_attention_kwargs={"scale": 0.5}).sample, expected)
