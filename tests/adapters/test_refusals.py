"""Adapters that do not fit a quantized model are refused by name, and leave it as it was."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from torch import Tensor, nn

import fxquant
from fxquant.errors import AdapterError, ConfigurationError, DropInError, NonFiniteError
from fxquant.numerics.sqnr import sqnr_db
from fxquant.pipeline.pipeline import PASSES, register_pass
from fxquant.pipeline.recipes import Recipe, make_recipe
from fxquant.runtime.model import GraphModel
from tests.adapters.loras import composed, lora
from tests.pipeline import test_input_changes as changes
from tests.tiny import calibrate, make_dit, run

MODEL = make_dit()
Q = "transformer.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    return fxquant.compile(MODEL, recipe="rtn-w8a8", calibrate=calibrate(MODEL), measure=0)


def factors(path: str, inputs: int, outputs: int, rank: int = 2) -> dict[str, Tensor]:
    return {f"{path}.lora_A.weight": torch.ones(rank, inputs), f"{path}.lora_B.weight": torch.ones(outputs, rank)}


REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "another model": (
        factors("transformer.single_transformer_blocks.3.attn.to_q", 16, 16),
        "for layer 'single_transformer_blocks.3.attn.to_q', which DiTTransformer2DModel does not have",
    ),
    "a wider layer": (factors(Q, 32, 16), r"shape \[2, 32\], but layer '.*attn1.to_q' has 16 inputs.*Control-LoRAs"),
    "a smaller layer": (factors(Q, 8, 16), r"\[2, 8\], but layer '.*attn1.to_q' has 16 inputs.*another model"),
    "more outputs": (factors(Q, 16, 20), r"\[20, 2\], but layer '.*attn1.to_q' has 16 outputs"),
    "a convolution": (
        {
            "transformer.pos_embed.proj.lora_A.weight": torch.ones(2, 4, 2, 2),
            "transformer.pos_embed.proj.lora_B.weight": torch.ones(16, 2, 1, 1),
        },
        "layer 'pos_embed.proj', a PatchEmbed|layer 'pos_embed.proj', a Conv2d",
    ),
    "DoRA": (
        factors(Q, 16, 16) | {f"{Q}.lora_magnitude_vector.weight": torch.ones(16)},
        "attn1.to_q.lora_magnitude_vector.weight belongs to a DoRA",
    ),
    "biases": (factors(Q, 16, 16) | {f"{Q}.lora_B.bias": torch.ones(16)}, "to_q.lora_B.bias belongs to a LoRA with"),
    "LoKr": (
        {f"{Q}.lokr_w1": torch.ones(4, 4), f"{Q}.lokr_w2": torch.ones(4, 4)},
        r"attn1.to_q.lokr_w1 belongs to a LoKr.*pipe\.fuse_lora\(\)",
    ),
    "one factor": ({f"{Q}.lora_A.weight": torch.ones(2, 16)}, r"but no lora_B for layer '.*attn1\.to_q'"),
    "the other factor": ({f"{Q}.lora_B.weight": torch.ones(16, 2)}, r"but no lora_A for layer '.*attn1\.to_q'"),
    "two ranks": (
        {f"{Q}.lora_A.weight": torch.ones(2, 16), f"{Q}.lora_B.weight": torch.ones(16, 3)},
        r"factors of layer '.*attn1\.to_q' have ranks 2 and 3",
    ),
    "no rank": (factors(Q, 16, 16, rank=0), r"layer '.*attn1\.to_q' has rank 0"),
    "integers": ({k: v.int() for k, v in factors(Q, 16, 16).items()}, "lora_A.weight is a torch.int32 tensor on cpu"),
    "complex numbers": ({k: v.cfloat() for k, v in factors(Q, 16, 16).items()}, "is a torch.complex64 tensor"),
    "no values": ({k: v.to("meta") for k, v in factors(Q, 16, 16).items()}, "is a torch.float32 tensor on meta"),
    "no tensors": ({k: v.tolist() for k, v in factors(Q, 16, 16).items()}, "lora_A.weight is a list"),
    "a norm": (
        factors(Q, 16, 16) | {"transformer.norm_out.weight": torch.ones(16)},
        "norm_out.weight is not a factor of a LoRA.*would have no effect",
    ),
    "a difference of weights": (factors(Q, 16, 16) | {f"{Q}.diff": torch.ones(16, 16)}, "to_q.diff is not a factor"),
    "a difference of biases": (
        factors(Q, 16, 16) | {f"{Q}.diff_b": torch.ones(16)},
        "belongs to an adapter with biases",
    ),
    "the name of an adapter": (
        {key.replace(".weight", ".default.weight"): value for key, value in factors(Q, 16, 16).items()},
        "to_q.lora_A.default.weight is not a factor",
    ),
    "another alpha": (
        factors(Q, 16, 16) | {f"{Q}.alpha": torch.tensor(1.0)},
        r"to_q\.alpha is 1\.0 and the rank is 2.*network_alphas=\{'transformer\..*to_q\.alpha'",
    ),
    "unknown keys": ({f"{Q}.down_of_something": torch.ones(2, 2)}, "of no format that diffusers converts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(quantized: GraphModel, name: str) -> None:
    state_dict, message = REFUSED[name]
    before = run(quantized)
    with pytest.raises(AdapterError, match=message):
        quantized.load_lora_adapter(state_dict, adapter_name="a")
    assert not hasattr(quantized, "peft_config")
    assert torch.equal(run(quantized), before)


def test_an_alpha_that_is_the_rank_makes_no_difference(quantized: GraphModel) -> None:
    made = copy.copy(quantized)
    made.load_lora_adapter(factors(Q, 16, 16) | {f"{Q}.alpha": torch.tensor(2.0)}, adapter_name="a")
    assert not torch.equal(run(made), run(quantized))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 7}, r"peft cannot load adapter 'a'.*size mismatch.*with its metadata"),
        ({"modules_to_save": ["proj_out_2"]}, r"peft cannot load adapter 'a'.*proj_out_2"),
        ({"no_such_option": 1}, r"peft cannot load adapter 'a'"),
        ({"use_dora": True}, "adapter 'a' is a DoRA"),
        ({"lora_bias": True}, "adapter 'a' has a bias"),
        ({"init_lora_weights": "pissa_niter_4"}, r"initialized by 'pissa_niter_4', which also changes the weights"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_metadata_that_does_not_fit(quantized: GraphModel, options: dict[str, Any], message: str) -> None:
    metadata = {"r": 2, "lora_alpha": 2, "peft_type": "LORA", "target_modules": ["to_q"], **options}
    with pytest.raises(AdapterError, match=rf"(?s){message}"):
        quantized.load_lora_adapter(
            factors(Q, 16, 16), adapter_name="a", metadata={f"transformer.{k}": v for k, v in metadata.items()}
        )
    assert not hasattr(quantized, "peft_config")


def test_a_name_that_peft_does_not_take(quantized: GraphModel) -> None:
    with pytest.raises(AdapterError, match=r"cannot load adapter 'a\.b'"):
        quantized.load_lora_adapter(factors(Q, 16, 16), adapter_name="a.b")
    assert not hasattr(quantized, "peft_config")


def test_an_adapter_that_is_loaded_stays_when_another_is_refused(quantized: GraphModel) -> None:
    quantized.load_lora_adapter(lora(MODEL), adapter_name="a")
    before = run(quantized)
    with pytest.raises(AdapterError):
        quantized.load_lora_adapter(factors(Q, 8, 16), adapter_name="a", hotswap=True)
    with pytest.raises(NonFiniteError, match=r"adapters of layer '.*attn1\.to_q' hold NaN"):
        quantized.load_lora_adapter({k: v * torch.nan for k, v in factors(Q, 16, 16).items()}, adapter_name="b")
    with pytest.raises(NonFiniteError, match="weights that they were given"):
        quantized.set_adapters("a", 1e300)
    with pytest.raises(ValueError, match="already in use"):
        quantized.load_lora_adapter(lora(MODEL), adapter_name="a")
    with pytest.raises(ValueError, match="no existing adapter"):
        quantized.load_lora_adapter(lora(MODEL), adapter_name="c", hotswap=True)
    with pytest.raises(ValueError, match="could not be found"):
        quantized.set_adapter("c")
    assert [*quantized.peft_config] == ["a"]
    assert torch.equal(run(quantized), before)
    quantized.unload_lora()


def test_keys_of_another_component_change_nothing(
    quantized: GraphModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    caplog.set_level(logging.WARNING, "diffusers")  # Other tests may have made it quieter.
    quantized.load_lora_adapter(lora(MODEL, prefix="text_encoder."), adapter_name="a")
    assert "No LoRA keys associated to DiTTransformer2DModel" in caplog.text
    assert not hasattr(quantized, "peft_config")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("fuse_lora", "cannot be fused into the codes"),
        ("unfuse_lora", "cannot be fused into the codes"),
        ("add_adapter", "Train it beside the float model"),
    ],
)
def test_what_only_the_float_model_can_do(quantized: GraphModel, method: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        getattr(quantized, method)()


def test_without_an_adapter_the_messages_are_those_of_diffusers(quantized: GraphModel) -> None:
    with pytest.raises(ValueError, match="No adapter loaded"):
        quantized.active_adapters()
    with pytest.raises(ValueError, match="No adapter loaded"):
        quantized.enable_adapters()
    quantized.disable_lora()  # As on the float model, nothing to do.
    quantized.enable_lora()
    quantized.unload_lora()


def test_a_layer_that_no_graph_has() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.never = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, timestep: Tensor, more: bool = False) -> Tensor:
            h = self.proj(x) * timestep[:, None]
            return h + self.never(x) if more else h

    model = Optional().eval()
    call: Callable[[Any], Any] = lambda of: of(torch.randn(2, 8), torch.ones(2))  # noqa: E731
    made = fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=lambda: call(model), measure=0)
    before = made(torch.ones(2, 8), torch.ones(2))
    with pytest.raises(
        AdapterError, match="layer 'never' is in no graph of this model: calibration calls never ran it"
    ):
        made.load_lora_adapter(factors("transformer.never", 8, 8), adapter_name="a")
    assert torch.equal(made(torch.ones(2, 8), torch.ones(2)), before)
    made.load_lora_adapter(factors("transformer.proj", 8, 8), adapter_name="a")
    assert not torch.equal(made(torch.ones(2, 8), torch.ones(2)), before)


@pytest.mark.slow
def test_fused_projections_are_refused_by_name() -> None:
    from tests.zoo.models import ENTRIES

    entry = next(entry for entry in ENTRIES if entry.id == "SD32D-fused")
    model = entry.model()
    calls = entry.call()

    def calibrate_once() -> None:
        with torch.no_grad():
            model(**calls)

    made = fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate_once, measure=0, timestep=entry.timestep)
    path = next(name.removesuffix(".to_q") for name, _ in model.named_modules() if name.endswith(".to_q"))
    linear = model.get_submodule(f"{path}.to_q")
    assert isinstance(linear, nn.Linear)
    with pytest.raises(AdapterError, match=rf"layer '{path}\.to_q' is in no graph.* fused with others before"):
        made.load_lora_adapter(
            factors(f"transformer.{path}.to_q", linear.in_features, linear.out_features), adapter_name="a"
        )
    together = model.get_submodule(f"{path}.to_qkv")
    assert isinstance(together, nn.Linear)
    made.load_lora_adapter(
        factors(f"transformer.{path}.to_qkv", together.in_features, together.out_features), adapter_name="a"
    )


@pytest.mark.parametrize("before_calibration", [False, True])
def test_a_layer_that_a_pass_rotated(monkeypatch: pytest.MonkeyPatch, before_calibration: bool) -> None:
    """The pass changes inputs and weights by a matrix, which a LoRA of the original model does not know."""
    monkeypatch.setattr(PASSES, "_objects", dict(PASSES._objects))
    register_pass(changes.Rotate)
    plain = make_recipe("rtn-w8a8", "default")
    steps = (changes.Rotate(),)
    recipe = (
        Recipe((*plain.prepare, *steps), plain.convert)
        if before_calibration
        else Recipe(plain.prepare, (*steps, *plain.convert))
    )
    made = fxquant.compile(MODEL, recipe=recipe, calibrate=calibrate(MODEL), measure=0)
    with pytest.raises(AdapterError, match=rf"layer '{changes.UP}' was changed by test-rotate"):
        made.load_lora_adapter(lora(MODEL, targets=("net.0.proj",)), adapter_name="a")
    made.load_lora_adapter(lora(MODEL, targets=("to_q",)), adapter_name="a")  # Other layers take it.


def test_a_traced_lora_cannot_be_switched_off() -> None:
    """What was traced with a LoRA computes it. Its methods raise, and pipelines call them: it is a ModelMixin."""
    model = composed(MODEL, lora(MODEL)).eval()
    traced = fxquant.trace(model)
    assert torch.equal(run(traced), run(model))
    assert issubclass(traced.__class__, ModelMixin)
    for method in ("disable_lora", "unload_lora", "load_lora_adapter", "set_adapters", "delete_adapters"):
        with pytest.raises(
            DropInError, match=rf"{method}: only models that fxquant\.compile or fxquant\.load returned"
        ):
            getattr(traced, method)()


def test_a_float_model_with_a_lora_is_not_quantized() -> None:
    model = composed(MODEL, lora(MODEL))
    with pytest.raises(
        ConfigurationError, match=r"layer '.*' of the model holds an adapter.* load it into the quantized"
    ):
        fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model))
    model.fuse_lora()
    with pytest.raises(ConfigurationError, match="holds an adapter"):
        fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model))
    expected = run(model)
    model.unload_lora()
    made = fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), measure=0)
    assert sqnr_db(expected, run(made)) > 40


def test_a_file_that_holds_no_adapter_is_refused(quantized: GraphModel, tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"something else")
    with pytest.raises(AdapterError, match=r"cannot be read: .*header.*; copy it again"):
        quantized.load_lora_adapter(tmp_path, weight_name="adapter.safetensors", adapter_name="a")
