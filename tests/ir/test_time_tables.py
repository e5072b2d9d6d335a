"""Time as data: one graph for every schedule, tables that add up, a warning outside of what was calibrated."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import fxquant
from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.ir.time_tables import TimeTable, bin_of, boundaries_between
from fxquant.pipeline.recipes import Recipe
from fxquant.runtime.model import GraphModel
from tests.tiny import inputs, make_dit, make_pipeline, run

CALIBRATED = (900.0, 700.0, 500.0, 300.0, 100.0)
HTG = (
    "remove-no-ops,assign-precision{precision=w8a8} ; group-timesteps{groups=3},shift-channels,absorb-shifts,"
    "balance-channels{salience=moving-average},absorb-affines,quantize-linears,quantize-embeddings"
)


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    return compiled(CALIBRATED)


def compiled(steps: tuple[float, ...], recipe: str = HTG) -> GraphModel:
    model = make_dit(2)
    calls = [inputs(4, step, seed=seed) for seed, step in enumerate(steps)]
    return fxquant.compile(
        model, recipe=Recipe.parse(recipe), calibrate=lambda: [model(**call) for call in calls], measure=0
    )


def test_tables_add_up_over_the_boundaries_of_both():
    rows = [torch.arange(float(n)).double()[:, None] * 10.0**n for n in (2, 3)]
    left, right = TimeTable(None, (5.0,), rows[0]), TimeTable(None, (2.0, 7.0), rows[1])
    total = left.plus(right)
    assert total.boundaries == (2.0, 5.0, 7.0)
    for step in (0.0, 2.0, 3.0, 5.0, 6.0, 7.0, 9.0):
        expected = sum(t.rows[bin_of(t.boundaries, torch.tensor(step))] for t in (left, right))
        assert torch.equal(total.rows[bin_of(total.boundaries, torch.tensor(step))], expected), step
    assert boundaries_between([[1.0, 3.0], [5.0], [8.0, 9.0]]) == [4.0, 6.5]


def test_layers_have_bins_shifts_and_a_range_for_each(quantized: GraphModel):
    layer = quantized.plan.layers["transformer_blocks.0.attn1.to_q"]
    assert len(layer.boundaries) == 2 and len(layer.timesteps.dendrogram) == 4
    assert layer.shift.cost == "free" and layer.shift.into == ["transformer_blocks.0.norm1.linear"]
    assert len(layer.activation.low) == len(layer.activation.high) == 3 and len(set(layer.activation.high)) == 3
    assert quantized.plan.vectors["transformer_blocks.0.attn1.to_q.shift"].shape == (3, 16)
    second = quantized.plan.layers["transformer_blocks.0.ff.net.2"]
    assert second.shift.cost == "not" and second.shift.reason == "gelu is nonlinear" and len(second.boundaries) == 2


def test_a_mixed_batch_is_as_each_sample_alone(quantized: GraphModel):
    call = inputs(6, None, seed=3)
    call["timestep"] = torch.tensor([950, 800, 600, 400, 200, 0])
    together = run_call(quantized, call)
    alone = [run_call(quantized, {name: value[i : i + 1] for name, value in call.items()}) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    # The bins do matter: the same samples at one timestep give something else than each at its own.
    other = run_call(quantized, call | {"timestep": torch.full((6,), 950)})
    assert not torch.allclose(together[1:], other[1:], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [10, 50, 250])
def test_one_graph_serves_every_number_of_steps(quantized: GraphModel, steps: int):
    pipe = make_pipeline(quantized)
    pipe.scheduler = DDIMScheduler()
    seen: list[float] = []
    hook = quantized.graphs[0].register_forward_pre_hook(lambda _, args: seen.append(float(args[1].flatten()[0])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = pipe([1, 2], num_inference_steps=steps, output_type="np", generator=torch.Generator().manual_seed(0))
    hook.remove()
    assert len(set(seen)) == steps and len(quantized.graphs) == 1 and torch.tensor(images.images).isfinite().all()


@pytest.mark.parametrize("timestep", [torch.tensor(300), torch.tensor([300]), torch.tensor(300.0)])
def test_a_timestep_for_the_whole_batch(timestep: Tensor):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])])

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            first, second = self.blocks[0]
            return second(first(sample + timestep.to(sample.dtype) / 1000))

    model, sample = Model().eval().double(), torch.randn(3, 5, 8, dtype=torch.float64)
    times = [timestep * 0 + step for step in (100, 300, 500, 700)]
    recipe = Recipe.parse("assign-precision ; group-timesteps{groups=2},shift-channels,absorb-shifts")
    found = fxquant.compile(model, recipe=recipe, calibrate=lambda: [model(sample, time) for time in times], measure=0)
    for time in times:
        torch.testing.assert_close(found(sample, time), model(sample, time), rtol=1e-12, atol=1e-12)
    assert found.plan.layers["blocks.0.1"].shift.into == ["blocks.0.0"]


@pytest.mark.slow
def test_it_compiles_exports_and_replays(quantized: GraphModel, tmp_path):
    call = inputs(4, None, seed=5)
    expected = run_call(quantized, call)
    torch._dynamo.reset()
    whole = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    assert torch.equal(run_call(whole, call), expected)
    captured = quantized.captured[0]
    tensors = [call[name] for name, _ in captured.call.tensors]
    program = torch.export.export(captured.module, tuple(tensors))
    torch.testing.assert_close(program.module()(*tensors)[0], expected)
    fxquant.save(quantized, tmp_path / "q")
    loaded = fxquant.load(tmp_path / "q")
    assert torch.equal(run_call(loaded, call), expected)
    assert loaded.plan.layers == quantized.plan.layers
    again = fxquant.compile(make_dit(2), plan=quantized.plan)
    assert torch.equal(run_call(again, call), expected)


def test_timesteps_outside_of_the_calibrated_range_are_told_once(recwarn):
    model = compiled((600.0, 500.0, 400.0))
    for step in (650.0, 450.0, 351.0):
        run(model, timestep=step)
    assert not [w for w in recwarn if issubclass(w.category, fxquant.QualityWarning)]
    with pytest.warns(fxquant.QualityWarning, match=r"timestep 900.*400 to 600"):
        run_loud(model, 900.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxquant.QualityWarning)
        run_loud(model, 950.0)
    # What is outside is in the outermost bin.
    layer = model.plan.layers["transformer_blocks.0.attn1.to_q"]
    assert layer.bins(torch.tensor([999.0, 600.0, 400.0, 0.0])).tolist() == [2, 2, 0, 0]


def test_what_cannot_be_grouped():
    with pytest.raises(CalibrationError, match="one timestep only"):
        compiled((500.0,))
    with pytest.raises(ConfigurationError, match=r"9 groups.*saw 5"):
        compiled(CALIBRATED, HTG.replace("groups=3", "groups=9"))


def run_call(model: torch.nn.Module, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**call).sample


def run_loud(model: torch.nn.Module, step: float) -> None:
    with torch.no_grad():
        model(**inputs(timestep=step))


class ByToken(torch.nn.Module):
    """A block whose tokens have a timestep each, and prompts, which have none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = {"time": (1, 8), "norm": (8, 8), "text": (6, 8), "fc1": (8, 16), "fc2": (16, 8)}
        block = torch.nn.ModuleDict({name: torch.nn.Linear(*sizes) for name, sizes in layers.items()})
        self.blocks = torch.nn.ModuleList([block])

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        block = self.blocks[0]
        x = block["norm"](sample) * (1 + block["time"](timestep[..., None] / 1000))
        x = x + block["text"](text).mean(dim=1, keepdim=True)
        return block["fc2"](torch.nn.functional.gelu(block["fc1"](x)))


@pytest.mark.parametrize("recipe", ["rtn-w8a8", "dynamic-w8a8", "ptq4dit-gptq-w4a8", "htg-w8a8"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_timestep_for_each_token(recipe: str, batch: int):
    model = ByToken().eval()
    calls = []
    for number, step in enumerate(CALIBRATED):
        steps = torch.full((batch, 5), step)
        steps[:, :2] = 0.0  # What is given is without noise.
        generator = torch.Generator().manual_seed(number)
        calls.append(
            (torch.randn(batch, 5, 8, generator=generator), steps, torch.randn(batch, 3, 6, generator=generator))
        )
    statistics = fxquant.Statistics()
    found = fxquant.compile(
        model, recipe=recipe, calibrate=lambda: [model(*call) for call in calls], statistics=statistics
    )
    assert statistics["blocks.0.norm"].timesteps.tolist() == [0.0, *reversed(CALIBRATED)]
    assert statistics["blocks.0.norm"].count.tolist() == [10 * batch, *[3 * batch] * 5]  # Each row at its own.
    assert statistics["blocks.0.text"].count.tolist() == [15 * batch, *[3 * batch] * 5]  # At those of their sample.
    assert min(found.plan.output_sqnr_db.values()) > (15 if "w4" in recipe else 30)
    assert max(found.plan.output_sqnr_db) == 900.0  # The step is that of the noise.
    if recipe.startswith("htg"):
        groups = found.plan.layers["blocks.0.fc1"].timesteps
        assert not groups.boundaries
        assert "not one number a sample" in groups.reason


class Listed(torch.nn.Module):
    """Samples without a batch axis, embedded one by one, and prompts of several lengths in one row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch_embedding, self.text = torch.nn.Linear(4, 8), torch.nn.Linear(6, 8)
        layers = {"time": (1, 8), "fc1": (8, 16), "fc2": (16, 8)}
        block = torch.nn.ModuleDict({name: torch.nn.Linear(*sizes) for name, sizes in layers.items()})
        self.blocks = torch.nn.ModuleList([block])

    def forward(self, x: list[Tensor], timestep: Tensor, context: list[Tensor]) -> list[Tensor]:
        block = self.blocks[0]
        tokens = torch.cat([self.patch_embedding(one.T[None]) for one in x])
        text = self.text(torch.cat(context)).mean(0)
        tokens = tokens + text + block["time"](timestep[:, None, None] / 1000)
        return list(block["fc2"](torch.nn.functional.gelu(block["fc1"](tokens))))


def listed(steps: list[float], seed: int = 0) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(4, 6, generator=generator) for _ in steps]
    return x, torch.tensor(steps), [torch.randn(3 + 2 * i, 6, generator=generator) for i, _ in enumerate(steps)]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_list_of_samples_takes_more_of_them_than_were_calibrated(batch: int):
    model = Listed().eval()
    found = fxquant.compile(
        model,
        recipe="rtn-w8a8",
        layers="all",
        calibrate=lambda: [model(*listed([step] * batch, int(step))) for step in CALIBRATED],
    )
    assert min(found.plan.output_sqnr_db.values()) > 25
    for steps in ([500.0], [900.0, 100.0], [700.0, 300.0, 100.0]):
        with torch.no_grad():
            expected = torch.stack(model(*listed(steps)))
        torch.testing.assert_close(torch.stack(found(*listed(steps))), expected, rtol=0.1, atol=0.1)


def test_rows_of_prompts_of_several_lengths_count_at_all_timesteps_of_the_call():
    model, statistics = Listed().eval(), fxquant.Statistics()
    calibrate = lambda: model(*listed([900.0, 100.0]))  # noqa: E731  (Eight rows: three of one, five of the other.)
    fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=calibrate, statistics=statistics)
    assert statistics["text"].count.tolist() == [8, 8]
    assert statistics["blocks.0.fc1"].count.tolist() == [6, 6]
