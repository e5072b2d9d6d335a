"""Traced and quantized models in place of the original: the same interface, the same bits where they are promised."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import fxquant
from fxquant.capture.calls import CallSpec
from fxquant.capture.describe import describe_call
from fxquant.capture.trace import Architecture
from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.ir.tensors import read_tensors
from fxquant.pipeline.recipes import make_recipe
from fxquant.planning.plan import Plan
from fxquant.runtime.model import GraphModel
from fxquant.statistics.collection import Statistics
from tests.tiny import STEPS, calibrate, inputs, make_dit, make_pipeline, run
from tests.traces import traced_anew

IMAGES: dict[str, Any] = {"class_labels": [1, 7], "num_inference_steps": 3, "output_type": "np"}


def images(pipe: Any) -> Any:
    return pipe(**IMAGES, generator=torch.Generator().manual_seed(0)).images


@pytest.fixture(scope="module")
def model() -> DiTTransformer2DModel:
    return make_dit()


@pytest.fixture(scope="module")
def quantized(model: DiTTransformer2DModel) -> GraphModel:
    return fxquant.compile(model, recipe="ptq4dit-w8a8", calibrate=calibrate(model))


@pytest.fixture(scope="module")
def other_size(model: DiTTransformer2DModel) -> dict[str, Tensor]:
    """A call of half the height, for which a graph of its own is captured."""
    call = inputs(timestep=None)
    return call | {"hidden_states": call["hidden_states"][:, :, :4].contiguous()}


class Small(nn.Module):
    """What compiles ten times faster than a DiT."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.proj(x) + timestep[:, None]


def small_call(seed: int, step: float) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)), torch.full((4,), step)


# --- drop-in ---


def test_it_looks_like_the_original(model: DiTTransformer2DModel, quantized: GraphModel) -> None:
    for made in (quantized, fxquant.trace(model)):
        assert made.config is not model.config
        assert dict(made.config) == dict(model.config)
        assert made.config.num_layers == model.config.num_layers
        assert made.dtype == model.dtype
        assert made.device == model.device
        assert not made.training
        assert inspect.signature(made.forward) == inspect.signature(model.forward)
        assert made.forward.__name__ == "forward"
        assert made.inner_dim == model.inner_dim  # An attribute that it does not have itself.
        assert not made.is_gradient_checkpointing
        assert not hasattr(made, "no_such_attribute")
        with pytest.raises(AttributeError, match="no_such_attribute"):
            made.no_such_attribute
        assert not any(p.requires_grad for p in made.parameters())


def test_output_classes(model: DiTTransformer2DModel, quantized: GraphModel) -> None:
    call = inputs()
    with torch.no_grad():
        assert type(quantized(**call)) is Transformer2DModelOutput
        (plain,) = quantized(**call, return_dict=False)
        assert torch.equal(plain, quantized(**call).sample)
        assert torch.equal(quantized(**call)[0], plain)
    assert isinstance(plain, Tensor)


def test_its_dtype_is_what_the_model_says() -> None:
    class Mixed(nn.Module):
        dtype = torch.bfloat16  # As diffusers answers for models that keep some layers in float32.

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(1, 4)
            self.proj = nn.Linear(4, 4, dtype=torch.bfloat16)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.proj(x + self.embed(timestep[:, None]).to(x.dtype))

    mixed = Mixed().eval()
    traced = fxquant.trace(mixed)
    x, timestep = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(2)
    assert torch.equal(traced(x, timestep), mixed(x, timestep))
    assert traced.dtype == torch.bfloat16
    before = {name: tensor.dtype for name, tensor in traced.tensors().items()}
    traced.to(torch.bfloat16)  # What pipe.to(dtype) does: it must not touch what is kept in another dtype.
    assert {name: tensor.dtype for name, tensor in traced.tensors().items()} == before
    assert torch.equal(traced(x, timestep), mixed(x, timestep))


def test_casting_to_its_own_dtype_keeps_scales(tiny_dit: DiTTransformer2DModel) -> None:
    tiny_dit.to(torch.bfloat16)
    call = inputs() | {"hidden_states": inputs()["hidden_states"].bfloat16()}
    with torch.no_grad():
        made = fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=lambda: tiny_dit(**call))
        before = {name: tensor.clone() for name, tensor in made.tensors().items()}
        assert torch.float32 in {tensor.dtype for tensor in before.values()}
        expected = made(**call).sample
        made.to("cpu", torch.bfloat16)
        after = made.tensors()
        assert all(after[name].dtype == t.dtype and torch.equal(after[name], t) for name, t in before.items())
        assert torch.equal(made(**call).sample, expected)


def test_in_the_pipeline_before_and_after() -> None:
    pipe = make_pipeline()
    float_images = images(pipe)
    original = pipe.transformer
    pipe.transformer = fxquant.trace(original)
    assert (images(pipe) == float_images).all()
    pipe.transformer = original
    pipe.transformer = fxquant.compile(original, recipe="ptq4dit-w8a8", calibrate=lambda: images(pipe))
    quantized_images = images(pipe)
    assert (quantized_images != float_images).any()
    assert abs(quantized_images - float_images).max() < 0.1
    pipe.to("cpu")
    pipe.to(torch.float32)
    assert (images(pipe) == quantized_images).all()
    assert pipe(class_labels=[3], num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
    pipe.transformer = original
    assert (images(pipe) == float_images).all()


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_other_batch_sizes(model: DiTTransformer2DModel, quantized: GraphModel, batch: int) -> None:
    traced = fxquant.trace(model)
    run(traced)
    assert torch.equal(run(traced, batch=batch), run(model, batch=batch))
    graphs = len(quantized.graphs)
    assert run(quantized, batch=batch).shape == (batch, 8, 8, 8)
    assert (len(traced.graphs), len(quantized.graphs)) == (1, graphs)


def test_calibrated_with_one_sample(tiny_dit: DiTTransformer2DModel) -> None:
    made = fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=calibrate(tiny_dit, batch=1))
    assert run(made, batch=5).shape[0] == 5
    assert len(made.graphs) == 1


class TokensFirst(nn.Module):
    """A linear that reads a value which does not lie in order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(64, 16)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.proj(x.transpose(0, 1)) + timestep


@pytest.mark.parametrize("trained", [True, False])
def test_a_traced_model_multiplies_in_the_same_order(trained: bool) -> None:
    model = TokensFirst().eval().requires_grad_(trained)
    traced = fxquant.trace(model)
    x, timestep = torch.randn(2, 5, 64), torch.ones(1)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(traced(x, timestep), model(x, timestep))
            x = torch.randn(2, 7, 64)  # A further graph, which shares the weights.
    assert len(traced.graphs) == 2


class OneByOne(nn.Module):
    """A model whose own code fixes the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        y = self.proj(x)
        return torch.stack([y[i] + timestep[i] for i in range(x.shape[0])])


def test_a_batch_that_the_model_fixes() -> None:
    model = OneByOne().eval()
    calls = {batch: (torch.randn(batch, 3, 8), torch.arange(batch) / 8) for batch in (4, 1, 2)}
    traced = fxquant.trace(model)
    for call in calls.values():
        assert torch.equal(traced(*call), model(*call))
    assert len(traced.graphs) == len(calls)
    made = fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=lambda: model(*calls[4]))
    assert made.captured[0].call.tensors[0][1].shape == (4, 3, 8)
    assert len(made.graphs) == 1
    assert (made(*calls[4]) - model(*calls[4])).abs().max() < 0.1
    two = tuple(value[:2] for value in calls[4])
    assert (made(*two) - model(*two)).abs().max() < 0.1


def test_however_a_call_is_written(quantized: GraphModel) -> None:
    call = inputs()
    x, timestep, labels = call.values()
    graphs = len(quantized.graphs)
    with torch.no_grad():
        expected = quantized(**call).sample
        assert torch.equal(quantized(x, timestep, labels).sample, expected)
        assert torch.equal(quantized(x, class_labels=labels, timestep=timestep).sample, expected)
        assert torch.equal(quantized(x, timestep, labels, None, True).sample, expected)
        assert len(quantized.graphs) == graphs
        with pytest.raises(TypeError, match="hidden_states"):
            quantized(timestep=timestep)
        with pytest.raises(TypeError, match="multiple values"):
            quantized(x, hidden_states=x)


def test_a_batch_of_several_timesteps(quantized: GraphModel) -> None:
    call = inputs(batch=4, timestep=None)
    with torch.no_grad():
        together = quantized(**call).sample
        alone = [quantized(**{name: value[i : i + 1] for name, value in call.items()}).sample for i in range(4)]
    # A value at a rounding boundary may fall to either side, by one step of the grid.
    close = torch.isclose(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert close.float().mean() > 0.98
    assert (together - torch.cat(alone)).abs().max() < 0.05


# --- further graphs ---


def test_a_call_of_another_size(model: DiTTransformer2DModel, other_size: dict[str, Tensor]) -> None:
    """A graph captured after compile is the one that calibration would have made."""
    with torch.no_grad():
        late = fxquant.compile(model, recipe="ptq4dit-w4a8", calibrate=calibrate(model))
        plan = copy.deepcopy(late.plan)
        before = run(late)
        output = late(**other_size).sample
        assert len(late.graphs) == 2
        assert torch.equal(run(late), before)
        assert late.plan.to_json() == plan.to_json()
        first, second = (read_tensors(graph) for graph in late.graphs)
        for name in first.keys() & second.keys():
            if name.endswith(("_packed", "_scale", "bias")):
                assert first[name].data_ptr() == second[name].data_ptr(), name
        plan.calls.append(late.captured[1].call)
        early = fxquant.compile(model, plan=plan)
        assert len(early.graphs) == 2
        assert torch.equal(early(**other_size).sample, output)
        assert torch.equal(run(early), before)


def test_two_kinds_of_calls_in_calibration(
    model: DiTTransformer2DModel, other_size: dict[str, Tensor], tmp_path: Path
) -> None:
    def both() -> None:
        calibrate(model)()
        with torch.no_grad():
            model(**other_size)

    made = fxquant.compile(model, recipe="ptq4dit-w8a8", calibrate=both)
    assert len(made.graphs) == len(made.plan.calls) == 2
    assert made.plan.bytes_after == sum(t.numel() * t.element_size() for t in made.tensors().values())
    fxquant.save(made, tmp_path / "two")
    loaded = fxquant.load(tmp_path / "two")
    assert len(loaded.graphs) == 2
    with torch.no_grad():
        assert torch.equal(loaded(**other_size).sample, made(**other_size).sample)
    assert torch.equal(run(loaded), run(made))
    assert len(loaded.graphs) == 2


def test_a_checkpoint_leaves_out_later_graphs(
    quantized: GraphModel, other_size: dict[str, Tensor], tmp_path: Path
) -> None:
    made = copy.deepcopy(quantized)
    with torch.no_grad():
        output = made(**other_size).sample
        fxquant.save(made, tmp_path / "later")
        loaded = fxquant.load(tmp_path / "later")
        assert len(loaded.graphs) == 1
        assert torch.equal(loaded(**other_size).sample, output)


# --- plans ---


def test_carrying_out_a_plan(model: DiTTransformer2DModel, quantized: GraphModel, tmp_path: Path) -> None:
    quantized.plan.save(tmp_path / "plan")
    for plan in (quantized.plan, Plan.load(tmp_path / "plan")):
        again = fxquant.compile(model, plan=plan)
        assert torch.equal(run(again), run(quantized))
        assert again.plan is not plan
        assert again.plan.to_json() == plan.to_json()
        assert again.plan.vectors.keys() == plan.vectors.keys()
        assert all(torch.equal(again.plan.vectors[name], vector) for name, vector in plan.vectors.items())


def test_an_edited_plan(model: DiTTransformer2DModel) -> None:
    made = fxquant.compile(model, recipe="rtn-w4a8", calibrate=calibrate(model))
    plan = copy.deepcopy(made.plan)
    eight, whole = "transformer_blocks.0.ff.net.2", "transformer_blocks.0.attn1.to_q"
    plan.layers[eight].weight_bits = 8
    plan.layers[whole].weight_bits = plan.layers[whole].activation_bits = None
    edited = fxquant.compile(model, plan=plan)
    before, after = made.tensors(), edited.tensors()
    assert after[f"{eight}.weight_packed"].shape[1] == 2 * before[f"{eight}.weight_packed"].shape[1]
    assert torch.equal(after[f"{whole}.weight"], model.transformer_blocks[0].attn1.to_q.weight)
    assert f"{whole}.weight_packed" not in after
    for name in ("transformer_blocks.0.attn1.to_k", "transformer_blocks.0.norm1.linear"):
        assert torch.equal(after[f"{name}.weight_packed"], before[f"{name}.weight_packed"])
    assert edited.plan.layers[eight].weight_sqnr_db > made.plan.layers[eight].weight_sqnr_db + 20
    assert made.plan.layers[eight].weight_bits == 4
    reference = run(model, timestep=None)
    assert (run(edited, timestep=None) - reference).norm() < (run(made, timestep=None) - reference).norm()


@pytest.mark.parametrize(
    ("edit", "kind", "said"),
    [
        ({"weight_bits": 9}, ConfigurationError, ("to_q", "9 bits for weights")),
        ({"weight_bits": None}, ConfigurationError, ("to_q", "need quantized weights")),
        ({"group_size": 5}, ConfigurationError, ("to_q", "groups of 5 do not divide the 16")),
        ({"activation": None}, CalibrationError, ("to_q", "needs an activation range")),
    ],
)
def test_an_edit_that_cannot_be(
    model: DiTTransformer2DModel, quantized: GraphModel, edit: dict[str, Any], kind: type[Exception], said: Any
) -> None:
    plan = copy.deepcopy(quantized.plan)
    vars(plan.layers["transformer_blocks.0.attn1.to_q"]).update(edit)
    with pytest.raises(kind) as caught:
        fxquant.compile(model, plan=plan)
    assert all(words in str(caught.value) for words in said), str(caught.value)


def test_calls_survive_json(quantized: GraphModel) -> None:
    for call in quantized.plan.calls:
        assert CallSpec.from_json(call.to_json()) == call


# --- calibration ---


def test_merging_statistics() -> None:
    """Two runs merged decide what one run over all calls decides, for ranges that are exact."""
    model = Small().eval()
    options: dict[str, Any] = {"recipe": "rtn-w8a8", "layers": "all"}
    runs = Statistics(seed=1), Statistics(seed=2)
    for seed, statistics in enumerate(runs):
        fxquant.compile(
            model, **options, calibrate=lambda seed=seed: model(*small_call(seed, 500.0)), statistics=statistics
        )
    runs[0].merge(runs[1])
    merged = fxquant.compile(model, **options, calibrate=lambda: model(*small_call(2, 3.0)), statistics=runs[0])

    def all_three() -> None:
        for seed, step in ((0, 500.0), (1, 500.0), (2, 3.0)):
            model(*small_call(seed, step))

    once = fxquant.compile(model, **options, calibrate=all_three)
    assert merged.plan.timesteps == once.plan.timesteps == [3.0, 500.0]
    assert merged.plan.layers["proj"].activation == once.plan.layers["proj"].activation
    assert torch.equal(merged(*small_call(5, 9.0)), once(*small_call(5, 9.0)))


def test_the_output_error_is_measured(model: DiTTransformer2DModel, quantized: GraphModel) -> None:
    measured = quantized.plan.output_sqnr_db
    assert list(measured) == sorted(STEPS, reverse=True)
    for seed, step in enumerate(STEPS):
        error = run(quantized, timestep=step, seed=seed) - run(model, timestep=step, seed=seed)
        signal = run(model, timestep=step, seed=seed)
        assert measured[step] == pytest.approx(20 * float((signal.norm() / error.norm()).log10()), abs=0.5)


@pytest.mark.parametrize(("measure", "expected"), [(0, 0), (1, 1), (4, 4), (50, 30)])
def test_how_many_calls_are_measured(measure: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small().eval()
    samples: list[Any] = []
    monkeypatch.setattr(fxquant.api, "output_sqnr", lambda _, kept, team: samples.extend(kept) or {})

    def many() -> None:
        for number in range(30):
            model(*small_call(number, 990.0 - 30 * number))

    made = fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=many, measure=measure)
    assert len(samples) == expected
    assert len(made.plan.timesteps) == 30
    if expected >= 4:
        steps = [sample.timestep for sample in samples]
        assert steps == sorted(steps, reverse=True)
        assert steps[0] == 990
        assert steps[-1] < 400  # Spread over the whole schedule.


def test_a_poor_result_is_said(model: DiTTransformer2DModel) -> None:
    with pytest.warns(fxquant.QualityWarning, match=r"dB SQNR.*More weight bits"):
        fxquant.compile(model, recipe="rtn-w2a2", layers="all", calibrate=calibrate(model))


# --- the float model ---


@traced_anew()
def test_the_float_model_is_shared_and_unchanged(tiny_dit: DiTTransformer2DModel) -> None:
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in tiny_dit.state_dict().items()}
    output = run(tiny_dit)
    made = fxquant.compile(tiny_dit, recipe="ptq4dit-w4a8", calibrate=calibrate(tiny_dit))
    assert torch.equal(run(tiny_dit), output)
    for name, tensor in tiny_dit.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert "forward" not in tiny_dit.__dict__
    kept = made.tensors()["pos_embed.proj.weight"]
    assert kept.data_ptr() == tiny_dit.pos_embed.proj.weight.data_ptr()


@traced_anew()
def test_float_weights_are_freed(tiny_dit: DiTTransformer2DModel) -> None:
    made = fxquant.compile(tiny_dit, recipe="ptq4dit-w4a8", calibrate=calibrate(tiny_dit))
    shapes = {tuple(layer.shape) for _, layer in made.plan.quantized()}
    assert not [name for name, t in made.tensors().items() if t.is_floating_point() and tuple(t.shape) in shapes]
    before = {t.untyped_storage().data_ptr() for t in made.tensors().values()}
    floats = {
        t.untyped_storage().data_ptr()
        for t in gc.get_objects()
        if issubclass(type(t), nn.Parameter) and not isinstance(t, FakeTensor) and tuple(t.shape) in shapes
    }
    assert not before & floats


@pytest.mark.parametrize("way", ["partial", "method"])
def test_a_forward_of_ones_own_is_put_back(tiny_dit: DiTTransformer2DModel, way: str) -> None:
    """As accelerate's hooks leave it: an attribute of the instance."""
    calls = []

    def hooked(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return type(module).forward(module, *args, **kwargs)

    if way == "partial":
        tiny_dit.forward = functools.update_wrapper(functools.partial(hooked, tiny_dit), tiny_dit.forward)
    else:
        tiny_dit.forward = types.MethodType(hooked, tiny_dit)
    own = tiny_dit.__dict__["forward"]
    made = fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=calibrate(tiny_dit))
    assert tiny_dit.__dict__["forward"] is own
    calls.clear()
    run(tiny_dit)
    assert calls == [tiny_dit]
    calls.clear()
    assert run(made).shape == (4, 8, 8, 8)
    assert not calls
    with pytest.raises(CalibrationError):
        fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=lambda: None)
    assert tiny_dit.__dict__["forward"] is own


def test_an_accelerate_hook(tiny_dit: DiTTransformer2DModel) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    expected = run(tiny_dit)
    hooks.add_hook_to_module(tiny_dit, hooks.ModelHook())
    before = dict(tiny_dit.__dict__)
    made = fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=calibrate(tiny_dit))
    assert list(inspect.signature(made.forward).parameters)[:2] == ["hidden_states", "timestep"]
    assert tiny_dit.__dict__ == before
    assert torch.equal(run(tiny_dit), expected)
    assert (run(made) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("path", ["", "transformer_blocks.0"])
def test_a_model_compiled_in_place(tiny_dit: DiTTransformer2DModel, path: str) -> None:
    plain = fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=calibrate(tiny_dit), measure=0)
    expected = run(tiny_dit)
    module = tiny_dit.get_submodule(path)
    module.compile(backend="eager")
    implementation = module._compiled_call_impl
    made = fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=calibrate(tiny_dit), measure=0)
    assert module._compiled_call_impl is implementation
    assert torch.equal(run(made), run(plain))
    assert torch.equal(run(fxquant.trace(tiny_dit)), expected)


@pytest.mark.slow
@traced_anew()
def test_a_new_shape_under_autocast_is_captured_without(tiny_dit: DiTTransformer2DModel) -> None:
    made = fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=calibrate(tiny_dit), measure=0)
    other = copy.deepcopy(made)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(made, size=12).isfinite().all()
        again = fxquant.compile(tiny_dit, plan=made.plan)
    assert len(made.graphs) == 2
    assert torch.equal(run(made, size=12), run(other, size=12))
    assert torch.equal(run(again), run(made))


# --- torch's own tools ---


def test_deepcopy(quantized: GraphModel) -> None:
    clone = copy.deepcopy(quantized)
    assert clone.plan.to_json() == quantized.plan.to_json()
    ours, theirs = clone.tensors(), quantized.tensors()
    assert all(ours[name].data_ptr() != theirs[name].data_ptr() for name in ours)
    assert torch.equal(run(clone), run(quantized))
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert run(quantized).any()
    assert not torch.equal(run(clone), run(quantized))


def test_state_dict(model: DiTTransformer2DModel, quantized: GraphModel) -> None:
    state = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    clone = copy.deepcopy(quantized)
    for tensor in clone.state_dict().values():
        tensor.zero_()
    clone.load_state_dict(state)
    assert torch.equal(run(clone), run(quantized))
    with pytest.raises(RuntimeError, match="Missing key"):
        clone.load_state_dict({})


def test_torch_compile(quantized: GraphModel) -> None:
    made = torch.compile(copy.deepcopy(quantized), backend="aot_eager", fullgraph=True)
    x, timestep, labels = inputs(timestep=None).values()
    with torch.no_grad():
        expected = quantized(x, timestep, labels).sample
        assert torch.equal(made(x, timestep, labels).sample, expected)
        assert torch.equal(made(x, class_labels=labels, timestep=timestep, return_dict=True).sample, expected)
        assert torch.equal(made(**inputs(batch=6)).sample, run(quantized, batch=6))


@pytest.mark.slow
def test_torch_compile_and_a_call_of_another_size(quantized: GraphModel, other_size: dict[str, Tensor]) -> None:
    plain = copy.deepcopy(quantized)
    made = torch.compile(copy.deepcopy(quantized), backend="aot_eager")
    with torch.no_grad():
        made(**inputs())
        assert torch.equal(made(**other_size).sample, plain(**other_size).sample)
        assert torch.equal(made(**inputs()).sample, plain(**inputs()).sample)


@pytest.mark.slow
@pytest.mark.exhaustive  # tests/runtime/test_torch_compile.py compiles other recipes with inductor.
def test_inductor(quantized: GraphModel) -> None:
    made = torch.compile(copy.deepcopy(quantized), fullgraph=True)
    with torch.no_grad():
        error = made(**inputs()).sample - quantized(**inputs()).sample
    assert error.norm() < 0.02 * run(quantized).norm()


def test_torch_export(quantized: GraphModel) -> None:
    arguments = tuple(inputs().values())
    with torch.no_grad():
        program = torch.export.export(quantized.graphs[0], arguments)
        assert torch.equal(program.module()(*arguments)[0], run(quantized))


def test_dispatch_is_short(quantized: GraphModel) -> None:
    """Finding the graph of a call takes a few hundred Python calls: counted, as time depends on what else runs."""
    call = inputs()
    count = 0

    def counted(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        given = quantized.architecture.canonical((), call)
        quantized.find(given).inputs(given.leaves)
    finally:
        sys.setprofile(None)
    assert 0 < count < 600


def test_capture_on_another_device() -> None:
    """Graphs for a GPU are captured from an architecture that was built without one; unread inputs do not matter."""

    class Plain(nn.Linear):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return super().forward(x).relu()

    architecture = Architecture.of(Plain(4, 4).eval(), "timestep")
    call = describe_call(architecture.canonical((torch.ones(3, 4), torch.ones(3)), {}))
    for device in (torch.device("cpu"), torch.device("cuda", 0), torch.device("cpu")):
        captured = architecture.capture_spec(call, device)
        assert captured.static_batch is None
        assert {node.meta["val"].device for node in captured.module.graph.nodes if "val" in node.meta} == {device}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu(quantized: GraphModel, other_size: dict[str, Tensor], tmp_path: Path) -> None:
    def on_gpu(call: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.cuda() for name, value in call.items()}

    fxquant.save(quantized, tmp_path / "gpu")
    moved = copy.deepcopy(quantized).cuda()
    loaded = fxquant.load(tmp_path / "gpu", device="cuda")
    with torch.no_grad():
        for made in (moved, loaded):
            assert made.device.type == "cuda"
            for call in (inputs(), other_size):
                expected = quantized(**call).sample
                assert (made(**on_gpu(call)).sample.cpu() - expected).abs().max() < 0.05
        traced = fxquant.trace(make_dit()).cuda()
        assert torch.isfinite(traced(**on_gpu(inputs())).sample).all()
        again = traced.cpu()(**inputs()).sample
        assert torch.equal(again, fxquant.trace(make_dit())(**inputs()).sample)


def test_another_recipe_decides_from_the_same_statistics() -> None:
    model, statistics = make_dit(), Statistics()
    first = fxquant.compile(model, recipe="rtn-w4a8", calibrate=calibrate(model), statistics=statistics, measure=0)
    other = str(make_recipe("ptq4dit-w4a8"))
    plan = first.plan.undecided(other)
    assert all(layer.activation is None and layer.balance is None for layer in plan.layers.values())
    again = fxquant.compile(model, plan=plan, statistics=statistics)
    direct = fxquant.compile(model, recipe="ptq4dit-w4a8", calibrate=calibrate(model), measure=0)
    assert torch.equal(run(again, seed=4), run(direct, seed=4))
    assert again.plan.layers == direct.plan.layers
    assert first.plan.recipe != other  # The first plan stays as it was.
    assert all(layer.activation is not None for layer in first.plan.layers.values() if layer.activation_bits)
