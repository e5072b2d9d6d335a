"""Which layers, at which timesteps, cause the error of the output."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import fxquant
from fxquant.errors import CalibrationError, CheckpointError, ConfigurationError, DamagedFileWarning, UnknownNameError
from fxquant.inspect.errors import measure as measuring
from fxquant.numerics.grids import affine_parameters, fake_quantize
from fxquant.numerics.weights import quantize_weight
from fxquant.planning.attribution import Attribution, kept_attribution, to_db
from fxquant.runtime.model import GraphModel
from fxquant.statistics.collection import Statistics
from tests.tiny import STEPS, calibrate, inputs, make_dit, run

BAD = "transformer_blocks.1.attn1.to_v"
Made = tuple[GraphModel, nn.Module, Statistics]
EXACT: dict[str, Any] = {"samples": 4, "measure": None}


def made(recipe: str, layers: str = "default", overrides: str = "") -> Made:
    model, statistics = make_dit(layers=2), Statistics(keep_calls=6)
    chosen = fxquant.make_recipe(recipe, layers)
    if overrides:
        chosen = chosen.with_options("assign-precision", overrides=overrides)
    quantized = fxquant.compile(model, recipe=chosen, calibrate=calibrate(model), statistics=statistics)
    return quantized, model, statistics


@pytest.fixture(scope="module")
def one_bad() -> Made:
    """One layer has 2 bits, all others have 8."""
    return made("rtn-w8a8", overrides=f"{BAD}=w2a8")


@pytest.fixture(scope="module")
def found(one_bad: Made) -> Attribution:
    return fxquant.attribute(*one_bad, probes=64, **EXACT)


@pytest.mark.slow
def test_the_worst_layer_is_named(found: Attribution) -> None:
    worst = found.worst(1)[0]
    assert worst.name == BAD
    assert found.share(BAD) == pytest.approx(1, abs=0.05)
    cell = found.worst_cell()
    assert cell is not None and cell[0] == BAD and cell[1] == worst.worst_timestep
    assert found.summary().splitlines()[1].startswith(f"worst layer: {BAD}")
    assert found.explained() == pytest.approx(1, abs=0.1)


def test_the_estimates_alone_name_it_too(one_bad: Made) -> None:
    estimated = fxquant.attribute(*one_bad, probes=4, measure=0)
    assert estimated.worst(1)[0].name == BAD
    assert {value for layer in estimated.layers.values() for value in layer.measured} == {None}


def test_estimates_are_within_their_bounds(found: Attribution) -> None:
    """64 random vectors and 4 samples: the standard deviation of a cell is at most sqrt(2 / 64), four times that here.

    Samples only help where they contribute equally. The layer with 2 bits is left out: its error is not small.
    """
    ratios = []
    for layer in found.layers.values():
        if layer.name == BAD:
            continue
        for estimated, measured in zip(layer.estimated, layer.measured, strict=True):
            assert estimated is not None and measured is not None
            assert estimated == pytest.approx(measured, rel=4 * math.sqrt(2 / 64)), layer.name
            ratios.append(estimated / measured)
    assert len(ratios) == 3 * (len(found.layers) - 1)
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.05)


def test_the_output_error_is_that_of_the_model(found: Attribution, one_bad: Made) -> None:
    quantized, model, _ = one_bad
    for seed, step in enumerate(STEPS):
        exact, actual = (run(each, timestep=step, seed=seed) for each in (model, quantized))
        error = float((actual - exact).square().sum() / exact.square().sum())
        assert found.output[found.timesteps.index(step)] == pytest.approx(error, rel=1e-3)


def test_local_errors_are_those_computed_by_hand(found: Attribution, one_bad: Made) -> None:
    quantized, model, _ = one_bad
    linear, plan = model.get_submodule(BAD), quantized.plan.layers[BAD]  # type: ignore[union-attr]
    assert isinstance(linear, nn.Linear) and plan.activation is not None
    codes = quantize_weight(linear.weight.detach(), bits=2)
    rounded = codes.dequantize(torch.float32)
    ends = (torch.tensor(end, dtype=torch.float64) for end in (plan.activation.low, plan.activation.high))
    grid = affine_parameters(*ends, 8)
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        for seed, step in enumerate(STEPS):
            hook = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
            model(**inputs(timestep=step, seed=seed))
            hook.remove()
            x = seen.pop()
            y = linear(x)
            for weight, value, part in (
                (rounded, fake_quantize(x, *grid, 8), "local"),
                (rounded, x, "weights"),
            ):
                error = functional.linear(value, weight, linear.bias) - y
                expected = float(error.square().sum() / y.square().sum())
                actual = getattr(found.of(BAD), part)[found.timesteps.index(step)]
                assert actual == pytest.approx(expected, rel=1e-4)


def test_measured_contributions_are_those_of_a_model_with_one_quantized_layer(
    found: Attribution, one_bad: Made
) -> None:
    quantized, model, statistics = one_bad
    plan = copy.deepcopy(quantized.plan)
    assert plan is not None
    for name, layer in plan.layers.items():
        if name != BAD:
            layer.weight_bits = layer.activation_bits = layer.activation = None
    alone = fxquant.compile(model, plan=plan, statistics=statistics)
    for seed, step in enumerate(STEPS):
        exact, actual = (run(each, timestep=step, seed=seed) for each in (model, alone))
        error = float((actual - exact).square().sum() / exact.square().sum())
        assert found.of(BAD).measured[found.timesteps.index(step)] == pytest.approx(error, rel=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*autograd kernel:UserWarning")
@pytest.mark.parametrize("recipe", ["svdquant-w4a8", "svdquant-rotated-w4a8"])
def test_estimates_reach_through_branches_and_rotations(recipe: str) -> None:
    chosen = fxquant.make_recipe(recipe).with_options("split-low-rank", rank=4)
    found = fxquant.attribute(*made(str(chosen)), timesteps=1, probes=64, **EXACT)
    ratios = [
        layer.estimated[0] / layer.measured[0]
        for layer in found.layers.values()
        if layer.estimated[0] is not None and layer.measured[0]
    ]
    assert len(ratios) == len(found.layers)
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.1)
    assert min(ratios) > 0.4 and max(ratios) < 2.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "layers"),
    [("ptq4dit-w4a8", "all"), ("dynamic-w8a8", "default"), ("htg-w6a8", "default"), ("rtn-w4a16-g4", "blocks")],
)
def test_every_kind_of_layer(recipe: str, layers: str) -> None:
    """Attention, embeddings, convolutions, ranges by token and timestep, shifts and weights only."""
    quantized, model, statistics = made(recipe, layers)
    found = fxquant.attribute(quantized, model, statistics, timesteps=1, probes=64, **EXACT)
    plan = quantized.plan
    assert plan is not None
    names = [name for name, layer in plan.layers.items() if layer.weight_bits is not None]
    names += [name for name, attention in plan.attentions.items() if attention.bits is not None]
    assert set(found.layers) == set(names)
    assert not found.left_out
    assert found.explained() == pytest.approx(1, abs=0.3)
    for layer in found.layers.values():
        assert layer.local[0] is not None and 0 < layer.local[0] < 0.1
        assert layer.estimated[0] == pytest.approx(layer.measured[0], rel=1)
        is_attention = layer.name in plan.attentions
        stays_float = not is_attention and (
            plan.layers[layer.name].activation_bits is None or plan.layers[layer.name].kind == "embedding"
        )
        assert (layer.weights[0] is None) == is_attention
        assert (layer.inputs[0] is None) == stays_float


@pytest.mark.slow
def test_two_kinds_of_call() -> None:
    """The errors of both kinds are summed."""
    model, statistics = make_dit(), Statistics(keep_calls=4)

    def both() -> None:
        with torch.no_grad():
            for size in (8, 4):
                model(**inputs(size=size))

    quantized = fxquant.compile(model, recipe="rtn-w4a8", calibrate=both, statistics=statistics)
    found = fxquant.attribute(quantized, model, statistics, probes=0, samples=4, measure=0)
    errors = signals = 0.0
    for size in (8, 4):
        exact, actual = (run(each, size=size) for each in (model, quantized))
        errors += float((actual - exact).square().sum())
        signals += float(exact.square().sum())
    assert found.output[0] == pytest.approx(errors / signals, rel=1e-3)


def test_a_function_runs_the_model(one_bad: Made, found: Attribution) -> None:
    quantized, model, _ = one_bad
    again = fxquant.attribute(quantized, model, calibrate(model), probes=64, **EXACT)
    assert again.output == found.output
    assert "forward" not in vars(model)

    def fail() -> None:
        raise ValueError("no such prompt")

    with pytest.raises(CalibrationError, match="ValueError: no such prompt"):
        fxquant.attribute(quantized, model, fail)
    with pytest.raises(CalibrationError, match="made no call like those of calibration"):
        fxquant.attribute(quantized, model, lambda: None)


@pytest.mark.slow
def test_another_backend_and_a_loaded_model(one_bad: Made, found: Attribution, tmp_path: Path) -> None:
    quantized, model, statistics = one_bad
    fxquant.save(quantized, tmp_path / "model")
    loaded = fxquant.load(tmp_path / "model", backend="native")
    again = fxquant.attribute(loaded, model, statistics, probes=64, **EXACT)
    assert again.output == found.output
    assert again.matrix() == found.matrix()


def test_an_error_that_belongs_to_no_layer_is_said(
    one_bad: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As if a pass of another package had changed what the graph computes without quantized layers."""
    assert "what belongs to no layer" not in fxquant.attribute(*one_bad, timesteps=1, probes=0, measure=0).left_out
    pairs = measuring.make_pairs

    def changed(*args: Any) -> Any:
        made = pairs(*args)
        made[0].weights[BAD] = made[0].weights[BAD] * 2
        return made

    monkeypatch.setattr(measuring, "make_pairs", changed)
    found = fxquant.attribute(*one_bad, timesteps=1, probes=0, measure=0, resume=tmp_path)
    assert "differs from the float model" in found.left_out["what belongs to no layer"]
    again = fxquant.attribute(*one_bad, timesteps=1, probes=0, measure=0, resume=tmp_path)  # Nothing is left to run.
    assert again.left_out == found.left_out


def test_without_contributions_layers_are_sorted_by_their_own_errors(one_bad: Made) -> None:
    found = fxquant.attribute(*one_bad, timesteps=1, probes=0, measure=0)
    assert found.worst(1)[0].name == BAD and found.rows(1)[0]["layer"] == BAD
    assert "neither estimated nor measured" in found.method


class TestBudget:
    def test_what_does_not_fit_is_listed(self, one_bad: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter(range(0, 10**6, 10))
        monkeypatch.setattr(measuring.time, "monotonic", lambda: float(next(clock)))
        found = fxquant.attribute(*one_bad, budget=60, measure=0)
        assert len(found.timesteps) == 1
        assert next(iter(found.left_out.values())) == "the budget of 60 s was spent"
        assert "500" in next(iter(found.left_out)) and "not measured: timesteps" in found.table()

    def test_a_resumed_run_lists_what_the_first_one_left_out(
        self, one_bad: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        clock = iter(range(0, 10**6, 10))
        monkeypatch.setattr(measuring.time, "monotonic", lambda: float(next(clock)))
        short = fxquant.attribute(*one_bad, timesteps=1, probes=1, measure=None, budget=1, resume=tmp_path)
        again = fxquant.attribute(*one_bad, timesteps=1, probes=1, measure=None, budget=1, resume=tmp_path)
        assert "estimates only at timesteps" in short.left_out["some contributions"]
        assert again.left_out == short.left_out

    def test_the_order_is_even_at_any_time(self) -> None:
        steps = [float(step) for step in range(8, 0, -1)]
        job = measuring._Job(fxquant.Plan("", "", None), Statistics().calls, steps, 1, 1, None, 0, 0.0, None)
        assert job.left() == [8.0, 4.0, 6.0, 2.0, 7.0, 3.0, 5.0, 1.0]

    @pytest.mark.slow
    def test_an_interrupted_run_continues(self, one_bad: Made, tmp_path: Path) -> None:
        shown: list[tuple[str, int, int]] = []

        class Stop(Exception):
            pass

        def stop(what: str, done: int, total: int) -> None:
            shown.append((what, done, total))
            if done == 2 and what != "done":
                raise Stop

        whole = fxquant.attribute(*one_bad, measure=1)
        with pytest.raises(Stop):
            fxquant.attribute(*one_bad, measure=1, resume=tmp_path, progress=stop)
        assert [done for _, done, _ in shown] == [0, 1, 2]
        rest: list[str] = []
        again = fxquant.attribute(*one_bad, measure=1, resume=tmp_path, progress=lambda what, *_: rest.append(what))
        assert len(rest) == 2
        assert again.output == pytest.approx(whole.output)
        assert again.of(BAD).estimated == pytest.approx(whole.of(BAD).estimated)
        rest.clear()
        fxquant.attribute(*one_bad, measure=1, seed=1, resume=tmp_path, progress=lambda what, *_: rest.append(what))
        assert len(rest) == 4  # Another seed: nothing is taken from the folder.


@torch.library.custom_op("tests::no_formula", mutates_args=())
def no_formula(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


class TestRefusals:
    @pytest.mark.parametrize("op", [lambda x: torch.igamma(x.abs(), x.abs()), no_formula])
    def test_an_op_without_a_derivative(self, one_bad: Made, monkeypatch: pytest.MonkeyPatch, op: Any) -> None:
        """As if the graph held one: of torch, or of another library."""
        grad = torch.autograd.grad

        def through_op(*args: Any, **options: Any) -> Any:
            x = torch.ones(2, requires_grad=True)
            grad([op(x)], [x], [torch.ones(2)])
            return grad(*args, **options)

        monkeypatch.setattr(torch.autograd, "grad", through_op)
        with pytest.raises(ConfigurationError, match=r"no derivative \(.*probes=0, measure=None"):
            fxquant.attribute(*one_bad, timesteps=1, measure=0)

    def test_too_little_memory_is_not_taken_for_that(self, one_bad: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **options: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(torch.autograd, "grad", fail)
        with pytest.raises(torch.OutOfMemoryError):
            fxquant.attribute(*one_bad, timesteps=1, measure=0)

    def test_another_weight_of_a_layer_that_stayed_float(self, one_bad: Made) -> None:
        quantized, model, _ = one_bad
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter("proj_out_2.weight").mul_(2)
        with pytest.raises(ConfigurationError, match="the weight of proj_out_2 in the float model is not"):
            fxquant.attribute(quantized, other, calibrate(other))

    def test_another_model(self, one_bad: Made) -> None:
        quantized, _, statistics = one_bad
        other = make_dit(layers=2)
        for parameter in other.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        with pytest.raises(CalibrationError, match="other weights"):
            fxquant.attribute(quantized, other, statistics)
        with pytest.raises(ConfigurationError, match="not those that were quantized"):
            fxquant.attribute(quantized, other, calibrate(other))

    def test_no_calls(self, one_bad: Made) -> None:
        quantized, model, _ = one_bad
        with pytest.raises(ConfigurationError, match="kept no calls"):
            fxquant.attribute(quantized, model, Statistics())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"timesteps": 0}, "timesteps=0"),
            ({"timesteps": [123.0]}, "no call was kept at timestep 123; there are calls at 900, 500, 100"),
            ({"samples": 0}, "samples=0"),
            ({"probes": -1}, "probes=-1"),
            ({"budget": 0}, "budget=0"),
        ],
    )
    def test_options(self, one_bad: Made, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            fxquant.attribute(*one_bad, **options)

    def test_float_models(self, one_bad: Made) -> None:
        quantized, model, statistics = one_bad
        with pytest.raises(ConfigurationError):
            fxquant.attribute(model, model, statistics)
        with pytest.raises(TypeError):
            fxquant.attribute(quantized, quantized, statistics)


class TestKept:
    def test_with_the_checkpoint(self, one_bad: Made, found: Attribution, tmp_path: Path) -> None:
        quantized, _, _ = one_bad
        bare = copy.deepcopy(quantized)
        assert bare.plan is not None
        bare.plan.attribution = None
        assert quantized.plan == bare.plan and quantized.plan is not None
        quantized.plan.attribution = found
        fxquant.save(quantized, tmp_path / "model")
        for plan in (fxquant.load(tmp_path / "model").plan, fxquant.Plan.load(tmp_path / "model")):
            assert plan is not None and plan.attribution == found
        fxquant.save(quantized, tmp_path / "model", overwrite=True)
        (tmp_path / "model" / "errors.json").unlink()
        assert fxquant.load(tmp_path / "model").plan.attribution is None  # type: ignore[union-attr]

    def test_of_another_plan(self, found: Attribution, tmp_path: Path) -> None:
        found.save(tmp_path, "0" * 64)
        assert Attribution.load(tmp_path, "0" * 64) == found
        assert Attribution.load(tmp_path, "1" * 64) is None
        assert Attribution.load(tmp_path / "nowhere", "0" * 64) is None

    def test_a_plan_that_is_applied_again_has_none(self, one_bad: Made, found: Attribution) -> None:
        quantized, model, _ = one_bad
        plan = copy.deepcopy(quantized.plan)
        assert plan is not None
        plan.attribution = found
        assert fxquant.compile(model, plan=plan).plan.attribution is None  # type: ignore[union-attr]
        assert plan.attribution is found
        assert plan.undecided(plan.recipe).attribution is None

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"samples": 5}, "does not match its digest"),
            ({"local": [[0.1]]}, "one row per layer"),
            ({"output": [0.1, -1.0, 0.1]}, "greater than or equal to 0"),
            ({"extra": 1}, "no such entry"),
            ({"layers": "x"}, "valid list"),
            ({"plan": "../x"}, "match pattern"),
        ],
    )
    def test_damage(self, found: Attribution, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        found.save(tmp_path, "0" * 64)
        path = tmp_path / "errors.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(CheckpointError, match=message) as caught:
            Attribution.load(tmp_path, "0" * 64)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', None], ids=str)
    def test_damage_leaves_the_checkpoint_usable(
        self, one_bad: Made, found: Attribution, tmp_path: Path, text: str | None
    ) -> None:
        quantized = copy.deepcopy(one_bad[0])
        assert quantized.plan is not None
        quantized.plan.attribution = found
        fxquant.save(quantized, tmp_path / "model")
        path = tmp_path / "model" / "errors.json"
        path.write_text(text if text is not None else path.read_text().replace('"samples": ', '"samples": 1'))
        readers: list[Callable[[], Any]] = [
            lambda: fxquant.load(tmp_path / "model").plan,
            lambda: fxquant.Plan.load(tmp_path / "model"),
            lambda: fxquant.report(tmp_path / "model"),
            lambda: fxquant.rewrite_history(tmp_path / "model"),
            lambda: fxquant.explain(tmp_path / "model", BAD),
        ]
        for read in readers if text == "" else readers[:3]:
            with pytest.warns(DamagedFileWarning, match=f"left out.*{path}.*Remove .*measure again") as caught:
                result = read()
            assert len({str(warning.message) for warning in caught if warning.category is DamagedFileWarning}) == 1
            assert getattr(result, "attribution", None) is None and getattr(result, "errors", None) is None

    @pytest.mark.parametrize("kind", ["a folder", "a device", "a broken link"])
    def test_what_is_not_a_file_is_named_and_not_read(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "errors.json"
        if kind == "a folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero" if kind == "a device" else tmp_path / "nowhere")
        with pytest.warns(DamagedFileWarning, match=f"{path} is not a file"):
            assert kept_attribution(tmp_path, "0" * 64) is None

    def test_a_file_of_a_later_version_does_not_prevent_loading(self, found: Attribution, tmp_path: Path) -> None:
        found.save(tmp_path, "0" * 64)
        path = tmp_path / "errors.json"
        path.write_text(json.dumps({"format": 2, "something": "else"}))
        assert Attribution.load(tmp_path, "0" * 64) is None


class TestShown:
    def test_report(self, one_bad: Made, found: Attribution) -> None:
        quantized, _, _ = one_bad
        plan = copy.deepcopy(quantized.plan)
        assert plan is not None
        plan.attribution = found
        report = fxquant.report(plan)
        assert f"worst layer  {BAD} at timestep" in report.summary()
        assert max(map(len, report.table().splitlines())) <= 140
        data = json.loads(json.dumps(report.to_json(), allow_nan=False))["attribution"]
        assert data["worst"][0]["layer"] == BAD
        assert len(data["local"]) == len(data["layers"]) and len(data["local"][0]) == len(data["timesteps"]) == 3
        plan.attribution = None
        assert "attribution" not in fxquant.report(plan).to_json()

    def test_the_error_of_one_layer(self, found: Attribution) -> None:
        layer = found.of(BAD)
        assert layer.contribution == layer.measured
        assert layer.local_db == to_db(sum(value or 0.0 for value in layer.local) / 3)
        with pytest.raises(UnknownNameError, match="nothing"):
            found.of("nothing")


def test_time_is_recorded(one_bad: Made) -> None:
    began = time.monotonic()
    found = fxquant.attribute(*one_bad, timesteps=1, probes=1, measure=0)
    assert 0 < found.seconds <= time.monotonic() - began + 0.01
