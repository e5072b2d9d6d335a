"""Weights of timesteps in the second moments of GPTQ."""

from __future__ import annotations

import pytest
import torch

import fxquant
from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.passes.weigh_timesteps import TimestepWeights, WeighTimesteps
from fxquant.pipeline.pipeline import parse_pass
from fxquant.runtime.model import GraphModel
from fxquant.statistics.collection import Statistics
from tests.tiny import STEPS, calibrate, inputs, make_dit

RECIPE = "remove-no-ops,assign-precision{precision=%s} ; %squantize-linears{rounding=gptq},quantize-embeddings"


def made(statistics: Statistics, options: str | None, precision: str = "w4a8") -> GraphModel:
    model = make_dit()
    step = "" if options is None else f"weigh-timesteps{{{options}}},"
    text = RECIPE % (precision, step)
    given = None if len(statistics) else calibrate(model)
    return fxquant.compile(model, recipe=fxquant.Recipe.parse(text), calibrate=given, statistics=statistics, measure=0)


def codes(model: GraphModel) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.stored_tensors().items() if "packed" in name}


@pytest.mark.parametrize("precision", ["w4a8", "w3a16"])
def test_weights_change_the_rounding_and_stay_in_the_plan(precision: str) -> None:
    statistics = Statistics(keep_calls=len(STEPS))
    plain = made(statistics, None, precision)
    weighted = made(statistics, "by=signal", precision)
    assert weighted.plan is not None and plain.plan is not None
    found = weighted.plan.decisions_of(TimestepWeights)
    rounded = {name for name, layer in weighted.plan.layers.items() if layer.role == "block" and layer.kind == "linear"}
    assert rounded <= set(found)
    for own in found.values():
        assert own.timesteps == sorted(float(step) for step in STEPS) and min(own.weights) > 0
    before, after = codes(plain), codes(weighted)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "decisions of weigh-timesteps" in str(fxquant.report(weighted))
    again = fxquant.compile(make_dit(), plan=weighted.plan, statistics=statistics)
    for name, tensor in codes(again).items():
        assert torch.equal(tensor, after[name])


@pytest.mark.slow
def test_what_errors_are_divided_by_matters() -> None:
    statistics = Statistics(keep_calls=len(STEPS))
    made(statistics, None)
    found = {}
    for by in ("output", "signal", "error"):
        plan = made(statistics, f"by={by}").plan
        assert plan is not None
        own = plan.decisions_of(TimestepWeights)["transformer_blocks.0.attn1.to_q"].weights
        found[by] = torch.tensor(own) / sum(own)
    assert not torch.allclose(found["output"], found["signal"], rtol=1e-3)
    assert not torch.allclose(found["output"], found["error"], rtol=1e-3)


def test_weights_are_mean_squares_of_gradients() -> None:
    """The last linear of the only path to the output: its gradients are computed here by autograd."""
    statistics = Statistics(keep_calls=len(STEPS))
    plan = made(statistics, "by=output probes=64 calls=9").plan
    assert plan is not None
    model, name = make_dit(), "transformer_blocks.0.ff.net.2"
    own = plan.decisions_of(TimestepWeights)[name]
    step = own.timesteps[0]
    seed = [float(one) for one in STEPS].index(step)
    held: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda _, __, y: held.append(y.requires_grad_()))
    sample = model(**inputs(timestep=step, seed=seed)).sample
    generator, squares = torch.Generator().manual_seed(0), []
    for _ in range(64):
        sign = torch.randint(0, 2, sample.shape, generator=generator) * 2.0 - 1
        (gradient,) = torch.autograd.grad(sample, held[0], sign, retain_graph=True)
        squares.append(gradient.square().sum(-1).mean())
    assert own.weights[0] == pytest.approx(float(torch.stack(squares).mean()), rel=0.15)


def test_bad_options_and_missing_calls() -> None:
    with pytest.raises(ConfigurationError, match="probes=0"):
        WeighTimesteps(probes=0)
    assert parse_pass("weigh-timesteps{by=error}").wants_samples() == 16 * 16
    statistics = Statistics()
    made(statistics, None)
    with pytest.raises(CalibrationError, match="calls"):
        made(statistics, "by=output")
