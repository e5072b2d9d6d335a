"""Balanced float models: the same class, keys and function, and smaller ratios of activations."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import AlreadyCompiledError, CalibrationError, ConfigurationError, ProofError, QualityWarning
from fxquant.export import balance as module
from fxquant.ir.doubles import as_wide, in_float64
from fxquant.ir.tensors import bind
from tests.export.small import Small, small_call
from tests.test_two_kinds_of_call import C, Two, call
from tests.tiny import calibrate, inputs, make_dit, make_pipeline, run
from tests.zoo.models import ENTRIES

STEPS = (900, 400, 20)
REPQ = "repq-w8a8"


def balanced(model: nn.Module, calls: list[dict[str, Any]], **options: Any) -> Any:
    def calibrate() -> None:
        for one in calls:
            model(**one)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fxquant.balance(model, calibrate=calibrate, **options)


def outputs(model: nn.Module, calls: list[dict[str, Any]]) -> list[Tensor]:
    with torch.no_grad():
        found = [model(**one) for one in calls]
    return [one if isinstance(one, Tensor) else one[0] for one in found]


def error(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(left, right, strict=True))


def exact_outputs(models: list[nn.Module], calls: list[dict[str, Any]], timestep: str) -> list[list[Tensor]]:
    """Outputs of float64 models of one class, with float64 also where their code computes in float32."""
    traced = fxquant.trace(models[0], timestep=timestep)
    with torch.no_grad():
        for one in calls:
            traced(**one)
        captured = traced.captured[0]
        leaves = [traced.architecture.canonical((), one).leaves for one in calls]
        inputs = [[as_wide(value, torch.float64) for value in captured.inputs(each)] for each in leaves]
        exact, found = in_float64(captured.module), []
        for model in models:
            bind(exact, {name: parameter.detach() for name, parameter in model.named_parameters()})
            found.append([output for each in inputs for output in exact(*each)])
    return found


def by_name(report: Any) -> dict[str, Any]:
    return {layer.name: layer for layer in report.layers}


# --- the same function, in float64 ---

CLASSES = {
    "DiTTransformer2DModel": {"attn1.to_q", "attn1.to_out.0", "ff.net.0.proj"},
    "PixArtTransformer2DModel": {"attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ff.net.0.proj"},
    "SD3Transformer2DModel": {"attn.to_q", "attn.to_out.0", "ff.net.0.proj"},
    "FluxTransformer2DModel": {"attn.to_q", "attn.to_out.0", "ff.net.0.proj"},
    "WanTransformer3DModel": {"attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ffn.net.0.proj"},
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["smoothquant-w8a8", pytest.param(REPQ, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "name",
    # FLUX has two streams as SD3 has, DiT one as PixArt, and experts of Wan are balanced in test_balance_pipeline.py.
    [name if name[:3] in ("DiT", "Flu") else pytest.param(name, marks=pytest.mark.exhaustive) for name in CLASSES],
)
def test_computes_the_same_in_float64(name: str, recipe: str) -> None:
    entry = next(entry for entry in ENTRIES if entry.name == name)
    model = entry.model(torch.float64)
    calls = [entry.call(seed=seed, step=step, dtype=torch.float64) for seed, step in enumerate(STEPS)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = balanced(model, calls, recipe=recipe, timestep=entry.timestep)
    assert type(made) is type(model)
    assert made.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # The caller's own.
    others = [entry.call(seed=seed, step=step, dtype=torch.float64) for seed, step in enumerate((700, 100), 5)]
    assert error(*exact_outputs([model, made], others, entry.timestep)) < 1e-12
    layers = {layer.name for layer in made.balance_report.layers if layer.balanced}
    assert all(any(one.endswith(end) for one in layers) for end in CLASSES[name]), layers
    changed = {key for key, value in made.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(made.balance_report.parameters) != set()


# --- several kinds of call ---


ORDERED = {("value", "-e"), ("parameter", "e-"), ("modulated", "-e"), ("layer", "e-")}


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        pytest.param(kind, order, marks=[pytest.mark.exhaustive] * ((kind, order) not in ORDERED))
        for kind in (
            "value",
            "parameter",
            "modulated",
            "layer",
            "norm",
            "weightless",
            "table",
            "convolved",
            "elsewhere",
        )
        for order in ("-e", "e-")
    ],
)
def test_right_for_both_kinds_of_call(kind: str, order: str) -> None:
    model = Two(kind)
    calls = [call(one, seed=seed, step=step) for one in order for seed, step in enumerate(STEPS)]
    made = balanced(model, calls, recipe=REPQ)
    others = [call(one, seed=7, step=500) for one in "-e"]
    assert error(outputs(made, others), outputs(model, others)) < 1e-12
    assert by_name(made.balance_report)["blocks.0.to_out"].balanced == (0 if kind == "value" else C)


def test_a_value_that_another_kind_of_call_reads_stays() -> None:
    model = Two("norm")
    assert by_name(balanced(model, [call("-", step=500)]).balance_report)["blocks.0.to_q"].balanced == C
    both = balanced(model, [call("-", step=500), call("e", step=500)])
    found = by_name(both.balance_report)["blocks.0.to_q"]
    assert found.balanced == 0 and "kind of call" in str(found.reason)
    assert found.ratio_after == found.ratio_before


def test_warns_of_parameters_that_calibration_did_not_read() -> None:
    model = Two("layer")
    with pytest.warns(QualityWarning, match=r"4 parameters .* such as 'blocks.0.table'"):
        made: Any = fxquant.balance(model, calibrate=lambda: model(**call("-", step=500)))
    assert {"blocks.0.late.weight", "blocks.0.late.bias"} < set(made.balance_report.unread)


# --- parameters with several names ---


class Norm(nn.Module):
    """A block whose linear reads a norm, or a product with a tensor that is not a parameter."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at, self.constant = at, torch.rand(C, dtype=torch.float64) + 0.5
        self.register_buffer("buffer", torch.rand(C) + 0.5)
        self.norm, self.fc = nn.LayerNorm(C), nn.Linear(C, C)
        nn.init.normal_(self.norm.weight, 1.0, 0.5)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.fc(self.norm(h) if self.at == "norm" else torch.tanh(h) * getattr(self, self.at))


class Tied(nn.Module):
    """A model with such a block; if tied, the weight of the block's norm is also read under another name."""

    def __init__(self, tied: bool, at: str = "norm") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.out, self.last = nn.Linear(4, C), nn.Linear(C, 4), nn.LayerNorm(C)
        self.blocks = nn.ModuleList([Norm(at)])
        if tied:
            self.last.weight = self.blocks[0].norm.weight  # type: ignore[union-attr,assignment]
        self.double().eval()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.inp(x) + timestep[:, None, None] / 1000
        return self.out(torch.tanh(self.last(self.blocks[0](h))))


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_with_several_names(tied: bool) -> None:
    model, calls = Tied(tied), [call("-", seed=1, step=500)]
    made = balanced(model, calls)
    assert error(outputs(made, calls), outputs(model, calls)) < 1e-12
    assert by_name(made.balance_report)["blocks.0.fc"].balanced == (0 if tied else C)


def test_a_parameter_that_is_read_under_another_name_was_read() -> None:
    model = Small(tied=True)
    made = balanced(model, [small_call()])
    assert made.balance_report.unread == ()
    assert "is also read by" in str(by_name(made.balance_report)["blocks.0.first"].reason)


@pytest.mark.parametrize("at", ["constant", "buffer"])
def test_tensors_that_are_not_parameters_stay(at: str) -> None:
    model, calls = Tied(False, at), [call("-", seed=1, step=500)]
    made = balanced(model, calls)
    assert error(outputs(made, calls), outputs(model, calls)) == 0
    found = by_name(made.balance_report)["blocks.0.fc"]
    assert found.balanced == 0 and f"{at} is not a parameter" in str(found.reason)


# --- the result ---


def test_bfloat16_with_keys_and_files(tmp_path: Path) -> None:
    model = make_dit(1).to(torch.bfloat16)

    def in_bfloat16() -> None:
        for step in STEPS:
            one = inputs(timestep=step)
            model(**{**one, "hidden_states": one["hidden_states"].bfloat16()})

    made: Any = fxquant.balance(model, calibrate=in_bfloat16)
    assert made.dtype is torch.bfloat16 and 0 < made.balance_report.error < 0.1
    made.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in again.state_dict().items())


def test_a_pipeline_and_statistics_of_an_earlier_calibration() -> None:
    pipe = make_pipeline()
    statistics = fxquant.Statistics(keep_calls=8)
    made: Any = fxquant.balance(
        pipe, calibrate=lambda: pipe(class_labels=[1, 2], num_inference_steps=3), statistics=statistics
    )
    again: Any = fxquant.balance(pipe.transformer, statistics=statistics)
    assert torch.equal(run(made), run(again))
    assert (run(made) - run(pipe.transformer)).abs().max() < 1e-5
    assert made.balance_report.layers == again.balance_report.layers


def test_the_report_says_what_was_done() -> None:
    model = make_dit(1)
    made: Any = fxquant.balance(model, calibrate=calibrate(model))
    text, data = str(made.balance_report), made.balance_report.to_json()
    assert "transformer_blocks.*.attn1.to_q" in text and "ff.net.2: gelu is nonlinear" in text
    assert data["layers"][0]["name"] == "transformer_blocks.0.attn1.to_q"
    salient = by_name(made.balance_report)["transformer_blocks.0.ff.net.0.proj"]
    assert salient.ratio_after < salient.ratio_before
    assert salient.into == ("transformer_blocks.0.norm1.linear",)


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"recipe": "rtn-w8a8"}, ConfigurationError, "rtn-w8a8 balances nothing; use one that does"),
        ({"recipe": "htg-w8a8"}, ConfigurationError, "tables over the timesteps.*use repq-w8a8"),
        ({"measure": 0}, ConfigurationError, "measure=0"),
        ({"calibrate": None}, CalibrationError, "pass calibrate="),
        ({"calibrate": lambda: None}, CalibrationError, "without calling the model"),
    ],
)
def test_refuses_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = make_dit()
    with pytest.raises(kind, match=message):
        fxquant.balance(model, **{"calibrate": calibrate(model), **options})


def test_refuses_models_that_are_not_float_models() -> None:
    model = make_dit()
    with pytest.raises(AlreadyCompiledError):
        fxquant.balance(fxquant.trace(model), calibrate=calibrate(model))
    model.transformer_blocks[0].attn1.fused_projections = True
    with pytest.raises(ConfigurationError, match=r"transformer_blocks\.0\.attn1.*unfuse_qkv_projections"):
        fxquant.balance(model, calibrate=calibrate(model))


def test_refuses_a_result_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = make_dit(), module._with_parameters
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def forgetful(model: nn.Module, found: Any) -> nn.Module:
        found.changed.pop("transformer_blocks.0.attn1.to_q.weight")
        return real(model, found)

    monkeypatch.setattr(module, "_with_parameters", forgetful)
    with pytest.raises(ProofError, match="computes something else: at timestep"):
        fxquant.balance(model, calibrate=calibrate(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "balance_report")
