"""Errors of layers in every precision that they could have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import fxquant
from fxquant.allocation import job as jobs
from fxquant.allocation.candidates import with_precisions
from fxquant.calibration.kept_calls import some_inputs
from fxquant.calibration.recorded import arguments_of
from fxquant.capture.calls import CallSpec
from fxquant.errors import CheckpointError, ConfigurationError, UnknownNameError
from fxquant.inspect.errors.alternatives import Candidates
from fxquant.inspect.errors.schedule import calls_at
from fxquant.planning.precision import Precision
from fxquant.planning.sensitivities import Sensitivities
from fxquant.statistics.collection import Statistics
from fxquant.testing import example_calls, tiny_dit

CANDIDATES = ("w4a8", "w8a8", "w4a16", "float")
EXACT: dict[str, Any] = {"candidates": CANDIDATES, "recipe": "smoothquant", "timesteps": 2, "samples": 4}
LAYER = "transformer_blocks.0.attn1.to_v"


@pytest.fixture(scope="module")
def found(model: nn.Module, statistics: Statistics) -> Sensitivities:
    return fxquant.sensitivity(model, statistics=statistics, probes=32, measure=1000, **EXACT)


@pytest.mark.slow
def test_each_layer_has_each_precision(found: Sensitivities) -> None:
    assert LAYER in found.layers and found.precisions == CANDIDATES
    assert len({layer.reads for name, layer in found.layers.items() if ".attn1.to_" in name}) == 2  # q, k, v; out.
    for layer in found.layers.values():
        assert layer.precisions == CANDIDATES
        assert layer.size("w4a8") < layer.size("w8a8") < layer.size("float") == 4 * layer.weights
        assert set(layer.alone("float")) == {0.0}
        assert all(cell is not None for row in layer.measured[:3] for cell in row)
    assert not found.left_out


def test_estimates_agree_with_what_is_measured(found: Sensitivities) -> None:
    ratios = [
        estimated / measured
        for layer in found.layers.values()
        for estimated_row, measured_row in zip(layer.estimated[:3], layer.measured[:3], strict=True)
        for estimated, measured in zip(estimated_row, measured_row, strict=True)
        if estimated and measured
    ]
    assert len(ratios) == len(found.layers) * 3 * 2
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.1)
    assert min(ratios) > 0.3 and max(ratios) < 3


@pytest.mark.parametrize("precision", ["w4a8", "w4a16"])
def test_a_layer_alone_is_that_of_a_model_in_which_it_alone_is_quantized(
    precision: str, found: Sensitivities, model: nn.Module, statistics: Statistics
) -> None:
    base = fxquant.compile(model, recipe="smoothquant-w8a8", statistics=statistics)
    assert base.plan is not None
    chosen = dict.fromkeys(found.layers, Precision(None, None)) | {LAYER: Precision.parse(precision)}
    for name, layer in base.plan.layers.items():
        if name not in chosen and layer.weight_bits is not None:
            chosen[name] = Precision(None, None)
    alone = fxquant.compile(model, plan=with_precisions(base.plan, chosen), statistics=statistics)
    for number, step in enumerate(found.timesteps):
        (call,) = calls_at(statistics.calls, step)
        spec = CallSpec.from_json(statistics.calls.kinds[call.kind])
        arguments = arguments_of(spec, some_inputs(spec, call.inputs, EXACT["samples"]))
        with torch.no_grad():
            exact, actual = (each(**arguments).sample for each in (model, alone))
        error = float((actual - exact).square().sum() / exact.square().sum())
        assert found.of(LAYER).alone(precision)[number] == pytest.approx(error, rel=1e-2)


def test_all_but_a_layer_counts_that_errors_add_up_or_compensate() -> None:
    """Two layers whose errors compensate, and one that stands alone; two samples, two gradients."""
    watcher = Candidates(cast(Any, None), {}, [])
    values = {"a": [[1.0, 2.0], [3.0, -1.0]], "b": [[-1.0, -2.0], [-3.0, 1.0]], "c": [[0.5, 0.0], [0.0, 0.0]]}
    watcher.products["w4a8"] = {
        name: [torch.tensor(row, dtype=torch.float64) for row in rows] for name, rows in values.items()
    }
    assert watcher.alone("w4a8", "a") == (1 + 4 + 9 + 1) / 2
    rest = watcher.all_but("w4a8")
    assert rest["c"] == 0.0
    assert rest["a"] == (0.25 + 4 + 9 + 1) / 2
    assert rest["b"] == (2.25 + 4 + 9 + 1) / 2


def test_uniform_precisions_are_measured(found: Sensitivities, model: nn.Module, statistics: Statistics) -> None:
    low, high = found.uniform_db("w4a8"), found.uniform_db("w8a8")
    assert low is not None and high is not None and high > low + 10
    base = fxquant.compile(model, recipe="smoothquant-w8a8", statistics=statistics)
    assert base.plan is not None
    chosen = dict.fromkeys(found.layers, Precision.parse("w4a8"))
    made = fxquant.compile(model, plan=with_precisions(base.plan, chosen), statistics=statistics)
    assert made.plan is not None
    assert found.uniform_bytes("w4a8") == made.plan.bytes_after


@pytest.mark.slow
def test_layers_that_cannot_have_a_precision_are_listed(model: nn.Module, statistics: Statistics) -> None:
    options = {**EXACT, "candidates": ("w4a8", "w4a8-g16", "w4a8-g64"), "timesteps": 1, "samples": 1}
    found = fxquant.sensitivity(model, statistics=statistics, probes=1, measure=0, **options)
    can = {name: "w4a8-g64" in layer.precisions for name, layer in found.layers.items()}
    assert any(can.values()) and not all(can.values())
    ((what, why),) = found.left_out.items()
    assert what.startswith("w4a8-g64 in") and "group" in why
    assert found.uniform_bytes("w4a8-g16") > found.uniform_bytes("w4a8")


def test_the_table_and_the_file(found: Sensitivities, tmp_path: Path) -> None:
    text = found.table()
    assert "all layers" in text and LAYER in text and max(map(len, text.splitlines())) <= 140
    assert len(found.rows()) == len(found.layers) * len(CANDIDATES)
    found.save(tmp_path / "sensitivities.json")
    assert Sensitivities.load(tmp_path / "sensitivities.json") == found
    data = json.loads((tmp_path / "sensitivities.json").read_text())
    data["bytes_before"] += 1
    (tmp_path / "sensitivities.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="digest"):
        Sensitivities.load(tmp_path / "sensitivities.json")
    (tmp_path / "sensitivities.json").write_text(json.dumps({**data, "format": 2}))
    with pytest.raises(CheckpointError, match="newer fxquant"):
        Sensitivities.load(tmp_path / "sensitivities.json")
    with pytest.raises(CheckpointError, match="does not exist"):
        Sensitivities.load(tmp_path / "other.json")
    with pytest.raises(UnknownNameError, match="w2a2"):
        found.of(LAYER).alone("w2a2")
    with pytest.raises(UnknownNameError, match="proj"):
        found.of("proj")


@pytest.mark.slow
def test_an_interrupted_measurement_continues(
    model: nn.Module, statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {**EXACT, "candidates": ("w4a8", "w8a8"), "probes": 2, "measure": 1, "samples": 1}
    whole = fxquant.sensitivity(model, statistics=statistics, **options)
    first = fxquant.sensitivity(model, statistics=statistics, resume=tmp_path, budget=1e-9, **options)
    assert len(first.timesteps) == 1 and "budget" in next(iter(first.left_out.values()))
    again = fxquant.sensitivity(model, statistics=statistics, resume=tmp_path, **options)
    assert (again.layers, again.output, again.timesteps) == (whole.layers, whole.output, whole.timesteps)
    monkeypatch.setattr(jobs, "make_pairs", None)  # Nothing is left to measure.
    third = fxquant.sensitivity(model, statistics=statistics, resume=tmp_path, **options)
    assert third.layers == whole.layers
    for other in ({"probes": 3}, {"candidates": ("w4a8", "w6a8")}, {"timesteps": 1}):
        with pytest.raises(ConfigurationError, match=r"measured with other options.*remove that file"):
            fxquant.sensitivity(model, statistics=statistics, resume=tmp_path, **{**options, **other})
    fxquant.sensitivity(model, statistics=statistics, resume=tmp_path, **options)  # The file is as it was.
    (tmp_path / "sensitivities.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"is damaged .*; or remove it, and its timesteps are measured again"):
        fxquant.sensitivity(model, statistics=statistics, resume=tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": "w4a8"}, "list of precisions"),
        ({"candidates": ()}, "no precision to compare"),
        ({"candidates": ("float",)}, "no precision to compare"),
        ({"candidates": ("w4a8", "w9a9")}, "9 bits"),
        ({"probes": 0}, "probes=0"),
        ({"samples": 0}, "samples=0"),
        ({"timesteps": 0}, "timesteps=0"),
        ({"timesteps": [123.0]}, "no call was kept at timestep 123"),
        ({"timesteps": "500"}, "each of timesteps should be a number"),
        ({"measure": -1}, "measure=-1"),
        ({"budget": 0.0}, "budget=0"),
        ({"statistics": Statistics()}, "there are none"),
        ({"statistics": 3}, "statistics of a calibration"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, model: nn.Module, statistics: Statistics) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fxquant.sensitivity(model, **{"statistics": statistics, **EXACT, "probes": 1, **options})


def test_torch_is_left_as_it_was(model: nn.Module) -> None:
    assert torch.is_grad_enabled() and all(not parameter.grad for parameter in model.parameters())


@pytest.mark.slow
def test_number_formats_are_candidates(model: nn.Module, statistics: Statistics) -> None:
    options = {**EXACT, "candidates": ("w4a8", "wfp8afp8", "wnvfp4anvfp4", "wnf4a16"), "timesteps": 1}
    found = fxquant.sensitivity(model, statistics=statistics, probes=32, measure=1000, **options)
    for layer in found.layers.values():
        assert layer.precisions == options["candidates"]
        for estimated, measured in zip(layer.estimated, layer.measured, strict=True):
            assert estimated[0] and measured[0] and 0.2 < estimated[0] / measured[0] < 5
    worst, best = found.uniform_db("wnvfp4anvfp4"), found.uniform_db("wfp8afp8")
    assert worst is not None and best is not None and best > worst


class Tied(nn.Module):
    """Three linears, of which two share a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(32, 32) for name in ("a", "b", "c")})])
        self.blocks[0]["b"].weight = self.blocks[0]["a"].weight

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        (block,) = self.blocks
        h = sample + block["b"](sample * 0.02)
        found: torch.Tensor = block["c"](h + block["a"](h).relu() * torch.sin(timestep.float())[:, None, None])
        return found


def test_a_shared_weight_counts_once(tmp_path: Path) -> None:
    tied, collected = Tied().eval(), Statistics(keep_calls=3)

    def calls() -> None:
        for seed in range(3):
            torch.manual_seed(seed)
            tied(torch.randn(2, 4, 32), torch.full((2,), 100 * (seed + 1)))

    candidates = ("w4a8", "w8a8", "float")
    options: dict[str, Any] = {"recipe": "rtn", "candidates": candidates, "timesteps": 1, "measure": 0, "probes": 1}
    found = fxquant.sensitivity(tied, calibrate=calls, statistics=collected, resume=tmp_path, **options)
    assert {name: one.shares for name, one in found.layers.items() if one.shares} == {"blocks.0.a": "blocks.0.b"}
    assert found.weights_of_layers == 2 * 32 * 32
    for precision in candidates:
        limit = found.uniform_bytes(precision)
        result = fxquant.search(tied, size=limit, sensitivities=found, statistics=collected)
        # Scales of inputs, which float layers do not have, are not counted by layer.
        assert result.point.size <= limit <= result.point.size + 3 * 5
        assert result.chosen["blocks.0.a"] == result.chosen["blocks.0.b"]
        assert result.choices["blocks.0.a"].why == "shares the weight of blocks.0.b"
    assert result.average_bits == 32
    again = fxquant.sensitivity(tied, statistics=collected, resume=tmp_path, **options)
    assert again.layers == found.layers and again.bytes_fixed == found.bytes_fixed


def test_candidates_with_inputs_that_the_recipe_did_not_record_are_refused() -> None:
    model = tiny_dit()
    with pytest.raises(ConfigurationError, match=r"candidate w4a8 quantizes inputs, .* the recipe begins from w4a16"):
        fxquant.sensitivity(
            model,
            recipe="rtn-w4a16",
            candidates=("w4a16", "w4a8"),
            calibrate=lambda: [model(**call) for call in example_calls(model)],
            timesteps=1,
        )
