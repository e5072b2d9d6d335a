"""The trained model, traced, balanced and quantized: what the README says of it."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from torch import Tensor

import fxquant
from examples.digits import compare, generate, plant_salience
from fxquant.channels.wants import Cost

BALANCED = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj")
AFFINE = torch.ops.fxquant.channel_affine.default


@pytest.fixture(scope="module")
def planted(pipe: DiTPipeline) -> DiTTransformer2DModel:
    return plant_salience(pipe.transformer)


def test_tracing_reproduces_images_bit_for_bit(pipe: DiTPipeline) -> None:
    labels = [3, 1, 4, 1, 5]
    eager = generate(pipe, labels, seed=5, steps=3)
    with compare.transformer_of(pipe, fxquant.trace(pipe.transformer)):
        traced = generate(pipe, labels, seed=5, steps=3)
    assert torch.equal(traced, eager)


def double_inputs(batch: int, timestep: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(timestep)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=generator, dtype=torch.float64),
        "timestep": torch.full((batch,), timestep),
        "class_labels": torch.randint(0, 10, (batch,), generator=generator),
    }


@pytest.mark.exhaustive  # A DiT of two blocks: tests/channels/test_absorption.py.
@pytest.mark.parametrize("kind", ["plain", "planted"])
@torch.no_grad()
def test_absorption_is_free_and_exact_in_float64(pipe: DiTPipeline, kind: str) -> None:
    model = copy.deepcopy(pipe.transformer).double()
    model = plant_salience(model) if kind == "planted" else model

    def calibrate() -> None:
        for timestep in range(0, 1000, 200):
            model(**double_inputs(8, timestep))

    recipe = fxquant.Recipe.parse("remove-no-ops,assign-precision ; balance-channels,absorb-affines")
    rewritten = fxquant.compile(model, recipe=recipe, calibrate=calibrate, measure=0)
    for batch, timestep in ((3, 17), (5, 950)):
        expected = model(**double_inputs(batch, timestep)).sample
        actual = rewritten(**double_inputs(batch, timestep)).sample
        assert (actual - expected).abs().max() / expected.abs().max() < 1e-12
    layers = rewritten.plan.layers
    for block in range(8):
        for name in BALANCED:
            balance = layers[f"transformer_blocks.{block}.{name}"].balance
            assert balance is not None and balance.cost == str(Cost.FREE) and balance.reason is None
        assert (rewritten.plan.vectors[f"transformer_blocks.{block}.attn1.to_q"] != 1).any()
    assert not [node for node in rewritten.graphs[0].graph.nodes if node.target is AFFINE]


FEW = {"CALIBRATION_STEPS": 8, "CALIBRATION_SAMPLES": 8, "TEST_STEPS": 4, "TEST_SAMPLES": 8}


@pytest.fixture(scope="module", params=["few samples", pytest.param("as the demo", marks=pytest.mark.exhaustive)])
def numbers(request: pytest.FixtureRequest) -> Iterator[None]:
    """How many timesteps and samples models are calibrated and compared with."""
    with pytest.MonkeyPatch.context() as patch:
        for name, number in FEW.items() if request.param == "few samples" else ():
            patch.setattr(compare, name, number)
        yield


@pytest.fixture(scope="module")
def sqnr(pipe: DiTPipeline, planted: DiTTransformer2DModel, numbers: None) -> Callable[[str, str], float]:
    """Mean SQNR in dB of the predicted noise, by model and recipe."""
    models = {"plain": pipe.transformer, "planted": planted}
    calls = {name: compare.test_calls(pipe, model) for name, model in models.items()}
    noise = {name: compare.predicted_noise(model, calls[name]) for name, model in models.items()}
    calibrated = {name: compare.Calibrated(pipe, model, "default") for name, model in models.items()}
    known: dict[tuple[str, str], float] = {}

    def measure(name: str, recipe: str) -> float:
        if (name, recipe) not in known:
            quantized, _ = calibrated[name].quantize(fxquant.make_recipe(recipe))
            values = compare.noise_sqnr(quantized, noise[name], calls[name])
            known[name, recipe] = sum(values) / len(values)
        return known[name, recipe]

    return measure


@pytest.mark.slow
def test_salient_channels_break_rounding_and_ptq4dit_mends_it(sqnr: Callable[[str, str], float]) -> None:
    assert sqnr("planted", "ptq4dit-w8a8") > sqnr("planted", "rtn-w8a8") + 6
    assert sqnr("planted", "ptq4dit-w4a8") > sqnr("planted", "rtn-w4a8") + 6
    assert sqnr("planted", "ptq4dit-w4a8") > sqnr("planted", "smoothquant-w4a8")


@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param("w8a8", marks=pytest.mark.exhaustive), "w4a8"])
def test_without_salient_channels_ptq4dit_costs_nothing(sqnr: Callable[[str, str], float], precision: str) -> None:
    assert sqnr("plain", f"ptq4dit-{precision}") > sqnr("plain", f"rtn-{precision}") - 0.3


@pytest.mark.slow
def test_planting_is_undone(sqnr: Callable[[str, str], float]) -> None:
    assert sqnr("planted", "ptq4dit-w8a8") == pytest.approx(sqnr("plain", "ptq4dit-w8a8"), abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.exhaustive), "planted"])
def test_gptq_takes_down_the_wall_of_four_bits(sqnr: Callable[[str, str], float], name: str) -> None:
    assert sqnr(name, "ptq4dit-gptq-w4a8") > sqnr(name, "ptq4dit-w4a8") + 6


@pytest.mark.exhaustive  # On smaller models: test_split_low_rank.py and test_bin_ranges.py in tests/passes.
@pytest.mark.parametrize("name", ["plain", "planted"])
def test_branches_and_bins_gain_at_eight_bits(sqnr: Callable[[str, str], float], name: str) -> None:
    assert sqnr(name, "svdquant-bins-w8a8") > sqnr(name, "smoothquant-search-w8a8") + 3
