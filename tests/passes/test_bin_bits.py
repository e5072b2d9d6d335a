"""Bits of inputs that follow the timestep, as data in the graph."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import fxquant
from fxquant.allocation.candidates import with_precisions
from fxquant.backends.native import gpu
from fxquant.errors import ConfigurationError, QualityWarning
from fxquant.ir.meta import LAYER
from fxquant.numerics.sqnr import sqnr_db
from fxquant.passes.bin_bits import BinBits, Bits, allocate
from fxquant.passes.choose_variants import CLIPPED, Variant
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.precision import Precision
from fxquant.runtime.model import GraphModel
from fxquant.schemas.plan import Layer
from fxquant.statistics.collection import Statistics
from tests.tiny import STEPS, calibrate, inputs, make_dit, run

pytestmark = pytest.mark.usefixtures("torchao_on_any_processor")
RECIPE = (
    "remove-no-ops,assign-precision{precision=w8a8} ; bin-ranges{bins=4},%s"
    "bin-bits{bits=5 lowest=2},quantize-linears,quantize-embeddings"
)
BITS = [2, 5, 8]
WEIGH = "weigh-timesteps{by=error calls=9 probes=2},"


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    return Statistics(keep_calls=len(STEPS))


@pytest.fixture(scope="module")
def made(statistics: Statistics) -> GraphModel:
    model = make_dit()
    recipe = fxquant.Recipe.parse(RECIPE % WEIGH)
    return fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), statistics=statistics, measure=0)


def binned(made: GraphModel) -> dict[str, LayerPlan]:
    assert made.plan is not None
    return {name: layer for name, layer in made.plan.layers.items() if layer.timesteps and layer.timesteps.bits}


def test_bits_differ_from_bin_to_bin_and_keep_the_mean(made: GraphModel) -> None:
    layers = binned(made)
    assert len(layers) >= 6 and made.plan is not None
    macs = {name: float(layer.shape[0] * layer.shape[1]) for name, layer in layers.items()}
    decided = made.plan.decisions_of(Bits)
    mean = sum(macs[name] * decided[name].mean for name in layers) / sum(macs.values())
    assert 4.5 < mean <= 5.001
    assert any(len({*decided[name].bits}) > 1 for name in layers)
    assert all(2 <= bits <= 8 for name in layers for bits in decided[name].bits)
    assert "decisions of bin-bits" in str(fxquant.report(made))


@pytest.fixture(scope="module")
def edited(made: GraphModel) -> GraphModel:
    """The same plan with other bits, the same for all linears."""
    plan = copy.deepcopy(made.plan)
    assert plan is not None
    for layer in plan.layers.values():
        if layer.timesteps is not None and layer.timesteps.bits is not None:
            layer.timesteps.bits = BITS
    return fxquant.compile(make_dit(), plan=plan)


def test_codes_stay_below_the_highest_code_of_their_bin(edited: GraphModel) -> None:
    """Every sample of a batch reads the row of its timestep, and no branch decides it."""
    steps = torch.tensor([float(step) for step in STEPS])
    given = {**inputs(batch=len(STEPS), timestep=None), "timestep": steps}
    with torch.no_grad():
        edited(**given)
    module = edited.captured[-1].module
    seen: dict[str, torch.Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            found = super().run_node(n)
            if n.target is torch.ops.fxquant.quantize.default:
                seen[next(iter(n.users)).meta[LAYER]] = found
            return found

    with torch.no_grad():
        Recorder(module).run(*(given[str(n.target)] for n in module.graph.nodes if n.op == "placeholder"))
    assert len(seen) >= 4
    for name, codes in seen.items():
        layer = edited.plan and edited.plan.layers[name]
        assert layer
        for sample, number in enumerate(layer.bins(steps).tolist()):
            top = 2 ** BITS[number] - 1
            assert 0.5 * top <= int(codes[sample].max()) <= top


@pytest.mark.parametrize("backend", ["native", "torchao"])
def test_backends_run_them(edited: GraphModel, backend: str) -> None:
    assert edited.plan is not None
    lowered = fxquant.compile(make_dit(), plan=edited.plan, backend=backend)
    for step in STEPS:
        exact, found = run(edited, timestep=float(step)), run(lowered, timestep=float(step))
        assert sqnr_db(exact, found) > 35


def test_saved_loaded_and_replayed(made: GraphModel, tmp_path: Path) -> None:
    fxquant.save(made, tmp_path / "model")
    loaded = fxquant.load(tmp_path / "model")
    assert loaded.plan == made.plan
    assert torch.equal(run(loaded, timestep=200.0), run(made, timestep=200.0))
    again = fxquant.compile(make_dit(), plan=made.plan)  # Needs neither statistics nor calls.
    assert torch.equal(run(again, timestep=200.0), run(made, timestep=200.0))
    assert run(loaded, size=4, batch=2).shape[-1] == 4  # A graph of another shape.


def test_kernels_of_gpus_refuse_the_layer(made: GraphModel) -> None:
    layer = copy.deepcopy(binned(made)["transformer_blocks.0.ff.net.2"])
    assert "bin-bits" in (gpu.refuse(layer) or "")
    assert layer.timesteps is not None
    layer.timesteps.bits = None
    assert gpu.refuse(layer) is None


def test_error_attribution_sees_the_bits(made: GraphModel, edited: GraphModel, statistics: Statistics) -> None:
    """With 2 bits in the first bin and 8 in the last one, inputs are worse there than with about 5, and better."""
    name = "transformer_blocks.0.ff.net.2"
    few, even = (fxquant.attribute(one, make_dit(), statistics, measure=0).of(name) for one in (edited, made))
    assert few.timesteps == even.timesteps == (900.0, 500.0, 100.0)
    assert few.inputs[2] > 10 * even.inputs[2] > 100 * few.inputs[0]  # type: ignore[operator]


def test_bits_go_where_they_take_away_most_error() -> None:
    assert allocate([(1.0, [8.0, 2.0, 0.5]), (1.0, [1.0, 0.25, 0.06])], mean=1.0) == [2, 0]
    assert allocate([(3.0, [8.0, 2.0, 0.5]), (1.0, [4.0, 1.0, 0.25])], mean=0.5) == [0, 2]
    assert allocate([(1.0, [1.0]), (1.0, [1.0, 2.0])], mean=1.0) == [0, 0]


def test_bad_options_missing_weights_and_edited_plans(made: GraphModel, statistics: Statistics) -> None:
    for options in ({"bits": 1.5, "lowest": 1}, {"bits": 3.0, "lowest": 4}, {"bits": 9.0}):
        with pytest.raises(ConfigurationError, match="bits"):
            BinBits(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="reconstruct-blocks"):
        text = (RECIPE % WEIGH).replace("quantize-linears", "reconstruct-blocks{iterations=1},quantize-linears")
        fxquant.compile(make_dit(), recipe=fxquant.Recipe.parse(text), statistics=statistics)
    with pytest.raises(ConfigurationError, match="weigh-timesteps"):
        fxquant.compile(make_dit(), recipe=fxquant.Recipe.parse(RECIPE % ""), statistics=statistics)
    entry = {"kind": "linear", "role": "block", "shape": [4, 4], "weight_bits": 8, "activation_bits": 6}
    good = {"boundaries": [300.0], "bits": [4, 6]}
    Layer.model_validate({**entry, "timesteps": good})
    for bad, message in (({"bits": [4]}, "1 of 2 bins"), ({"bits": [4, 8]}, "at most"), ({"bits": [1, 4]}, "bits")):
        with pytest.raises(ValueError, match=message):
            Layer.model_validate({**entry, "timesteps": {**good, **bad}})


@pytest.mark.slow
def test_bits_follow_ranges_that_were_chosen_layer_by_layer(statistics: Statistics, made: GraphModel) -> None:
    """Where bins were chosen, they get bits, and ranges for these bits; a range per token stays as it is."""
    text = (RECIPE % WEIGH).replace("bin-ranges{bins=4},", "choose-variants{bins=4 calls=3 probes=4 gain=0.5},")
    found, whole = (
        fxquant.compile(make_dit(), recipe=fxquant.Recipe.parse(recipe), statistics=statistics, measure=0).plan
        for recipe in (text, text.replace("bin-bits{bits=5 lowest=2},", ""))
    )
    assert found is not None and whole is not None
    variants = found.decisions_of(Variant)
    assert {name: one.chosen for name, one in variants.items()} == {
        name: one.chosen for name, one in whole.decisions_of(Variant).items()
    }
    clipped = [name for name, one in variants.items() if one.chosen == CLIPPED]
    assert clipped
    for name in variants:
        layer, other = found.layers[name], whole.layers[name]
        assert layer.activation is not None and other.activation is not None
        assert layer.activation.method == other.activation.method
        assert layer.boundaries == other.boundaries
        assert bool(layer.timesteps and layer.timesteps.bits) == bool(layer.boundaries)
        assert (layer.activation.ends != other.activation.ends) == (name in clipped)


def test_another_precision_gets_bits_of_its_own(made: GraphModel, statistics: Statistics) -> None:
    assert made.plan is not None
    name = "transformer_blocks.0.attn1.to_q"
    plan = with_precisions(made.plan, {name: Precision.parse("w8a4")})
    for reader in ("to_q", "to_k", "to_v"):  # They share the bits of the value that they read.
        layer = plan.layers[f"transformer_blocks.0.attn1.{reader}"]
        assert layer.timesteps is not None and layer.timesteps.bits is None and layer.boundaries
    kept = plan.layers["transformer_blocks.0.attn1.to_out.0"].timesteps
    assert kept == made.plan.layers["transformer_blocks.0.attn1.to_out.0"].timesteps
    assert name not in plan.decisions_of(Bits) and len(plan.decisions_of(Bits)) == len(binned(made)) - 3
    again = fxquant.compile(make_dit(), plan=plan, statistics=statistics)
    assert again.plan is not None
    found = again.plan.layers[name].timesteps
    assert found is not None and found.bits is not None and max(found.bits) <= 4
    gone = with_precisions(made.plan, {name: Precision.parse("w8a16")})
    after = gone.layers[name].timesteps
    assert after is not None and after.bits is None


def test_without_bins_nothing_is_decided_and_a_warning_says_so(statistics: Statistics, made: GraphModel) -> None:
    text = (RECIPE % WEIGH).replace("bin-ranges{bins=4},", "")
    with pytest.warns(QualityWarning, match=r"bin-bits changes no layer, such as .* integer inputs .* bin-ranges"):
        found = fxquant.compile(make_dit(), recipe=text, statistics=statistics, measure=0).plan
    assert found is not None and not found.decisions_of(Bits) and made.plan is not None
