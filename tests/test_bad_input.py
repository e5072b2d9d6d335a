"""What users get wrong: a typed error that says what to do, and a float model that is exactly as it was before."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

import fxquant
from fxquant.errors import (
    AlreadyCompiledError,
    CalibrationError,
    CaptureError,
    ConfigurationError,
    MissingTimestepError,
    NonFiniteError,
    NotCalledError,
    UnknownNameError,
)
from fxquant.pipeline.pipeline import parse_pass
from fxquant.pipeline.recipes import make_recipe
from fxquant.runtime.model import GraphModel
from tests.tiny import STEPS, calibrate, inputs, make_dit, make_pipeline, run
from tests.traces import traced_anew


def snapshot(model: nn.Module) -> Any:
    """Everything about a model that a failed compile might have touched."""
    modules = {
        name: (type(module), module.training, {key: id(value) for key, value in module.__dict__.items()})
        for name, module in model.named_modules()
    }
    hooks = {name: dict(module._forward_hooks) for name, module in model.named_modules()}
    tensors = {
        name: (id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.detach().clone())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    return (modules, hooks), tensors


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Fail if the block left anything behind on the model."""
    modules, tensors = snapshot(model)
    try:
        yield
    finally:
        modules_after, tensors_after = snapshot(model)
        assert modules_after == modules
        assert tensors_after.keys() == tensors.keys()
        for name, (*identity, values) in tensors.items():
            *identity_after, values_after = tensors_after[name]
            assert identity_after == identity, name
            assert torch.equal(values_after.nan_to_num(7.0), values.nan_to_num(7.0)), name


@contextmanager
def refused(model: nn.Module, kind: type[BaseException], *said: str) -> Iterator[None]:
    """The block raises an error of this very kind, with these words in its message, and leaves the model alone."""
    with unchanged(model), pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    for words in said:
        assert words in str(caught.value)


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    model = make_dit()
    return fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model))


# --- calibrate ---


def test_no_calibrate(tiny_dit: DiTTransformer2DModel) -> None:
    with refused(tiny_dit, CalibrationError, "pass calibrate=", "a function that runs the model"):
        fxquant.compile(tiny_dit, recipe="rtn-w8a8")


def test_calibrate_is_no_function(tiny_dit: DiTTransformer2DModel) -> None:
    with refused(tiny_dit, CalibrationError, "calibrate is a Tensor", "pass a function that runs the model"):
        fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=torch.zeros(1))


def test_calibrate_runs_another_model(tiny_dit: DiTTransformer2DModel) -> None:
    other = make_dit()
    with refused(tiny_dit, NotCalledError, "without calling the model", "this very object"):
        fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=lambda: run(other))


@traced_anew()
def test_calibrate_raises(tiny_dit: DiTTransformer2DModel) -> None:
    def broken() -> None:
        run(tiny_dit)
        raise KeyError("no such picture")

    with refused(tiny_dit, CalibrationError, "calibrate raised KeyError", "no such picture", "fix the callable"):
        fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=broken)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_calibrate_is_interrupted(tiny_dit: DiTTransformer2DModel, interrupt: type[BaseException]) -> None:
    def interrupted() -> None:
        raise interrupt

    with refused(tiny_dit, interrupt):
        fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=interrupted)


@traced_anew()
def test_a_failure_that_calibrate_swallows_is_not_forgotten(tiny_dit: DiTTransformer2DModel) -> None:
    def careless() -> None:
        run(tiny_dit)
        for value in (torch.nan, torch.inf):
            try:
                tiny_dit(**inputs() | {"hidden_states": torch.full((4, 4, 8, 8), value)})
            except Exception:
                continue

    with refused(tiny_dit, NonFiniteError, "holds NaN or infinity", "timestep 500"):
        fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=careless)


def test_calibration_within_a_calibration(tiny_dit: DiTTransformer2DModel) -> None:
    def nested() -> None:
        fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=calibrate(tiny_dit))

    with refused(tiny_dit, ConfigurationError, "is being calibrated", "wait until"):
        fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=nested)


@traced_anew()
def test_calibration_of_one_model_in_two_threads(tiny_dit: DiTTransformer2DModel) -> None:
    began, go_on, errors = threading.Event(), threading.Event(), []

    def slow() -> None:
        began.set()
        go_on.wait(60)
        raise KeyError("enough")

    def first() -> None:
        try:
            fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=slow)
        except CalibrationError as error:
            errors.append(error)

    with unchanged(tiny_dit):
        thread = threading.Thread(target=first)
        thread.start()
        assert began.wait(60)
        with pytest.raises(ConfigurationError, match="is being calibrated"):
            fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=lambda: run(tiny_dit))
        go_on.set()
        thread.join()
    assert len(errors) == 1


# --- values that are not finite ---


class Packed(nn.Parameter):
    """Bytes of a quantized weight, as bitsandbytes and GGUF keep them."""


def packed() -> nn.Module:
    model = make_dit()
    weight = Packed(torch.zeros(16, 8, dtype=torch.uint8), requires_grad=False)
    model.transformer_blocks[0].attn1.to_q.weight = weight
    return model


def wrapped() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = make_dit()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def cast_by_layer() -> nn.Module:
    model = make_dit().bfloat16()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e5m2, compute_dtype=torch.bfloat16)
    return model


def partly_loaded() -> nn.Module:
    model = make_dit()
    model.transformer_blocks.to("meta")
    return model


def with_empty_buffer() -> nn.Module:
    model = make_dit()
    model.pos_embed.pos_embed = model.pos_embed.pos_embed.to("meta")
    return model


def lazy() -> nn.Module:
    model = make_dit()
    model.proj_out_2 = nn.LazyLinear(32)
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            cast_by_layer,
            ("'transformer_blocks.0.attn1.to_q", "load the model again", "enable_layerwise_casting"),
        ),
        (lambda: make_dit().to(torch.float8_e4m3fn), ("stored as torch.float8_e4m3fn", "load the float model")),
        (wrapped, ("a Int8Tensor of torchao.quantization", "neither quantized nor distributed")),
        (packed, ("'transformer_blocks.0.attn1.to_q.weight'", "a Packed of", "neither quantized")),
        (lambda: make_dit().to("meta"), ("'pos_embed.proj.weight'", "on the meta device", "load the weights")),
        (partly_loaded, ("'transformer_blocks.0.", "on the meta device")),
        (with_empty_buffer, ("'pos_embed.pos_embed'", "on the meta device")),
        (lazy, ("'proj_out_2.weight'", "without values", "load the weights")),
    ],
)
def test_weights_that_are_no_plain_floats(make: Callable[[], nn.Module], said: tuple[str, ...]) -> None:
    model, called = make(), []
    with pytest.raises(ConfigurationError) as caught:
        fxquant.compile(model, recipe="rtn-w8a8", calibrate=lambda: called.append(1))
    assert all(words in str(caught.value) for words in said), str(caught.value)
    assert not called


def test_parameters_of_integers_and_of_a_class_of_their_own_are_no_mistake(tiny_dit: DiTTransformer2DModel) -> None:
    class Own(nn.Parameter):
        pass

    tiny_dit.positions = nn.Parameter(torch.arange(3), requires_grad=False)
    tiny_dit.proj_out_1.bias = Own(tiny_dit.proj_out_1.bias.detach())
    fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=calibrate(tiny_dit), measure=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite(tiny_dit: DiTTransformer2DModel, value: float) -> None:
    with torch.no_grad():
        tiny_dit.transformer_blocks[0].attn1.to_q.weight[1, 2] = value
    with refused(tiny_dit, NonFiniteError, "transformer_blocks.0.attn1.to_q.weight", "NaN", "Load the model again"):
        fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=calibrate(tiny_dit))


def test_an_activation_that_is_not_finite(tiny_dit: DiTTransformer2DModel) -> None:
    def poisoned() -> None:
        run(tiny_dit, timestep=900)
        with torch.no_grad():
            tiny_dit(**inputs(timestep=300) | {"hidden_states": torch.full((4, 4, 8, 8), torch.inf)})

    with refused(
        tiny_dit, NonFiniteError, "transformer_blocks.0.attn1.to_q", "timestep 300", "Run calibration in a dtype"
    ):
        fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=poisoned)


class Masked(nn.Module):
    """A model whose mask, like many, holds minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return (self.proj(x) @ x.transpose(1, 2) + self.mask).softmax(-1) + timestep.view(-1, 1, 1)


def test_a_mask_of_minus_infinity_is_no_mistake() -> None:
    model = Masked().eval()
    x, timestep = torch.randn(2, 4, 4), torch.tensor([3.0, 5.0])
    quantized = fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=lambda: model(x, timestep))
    assert torch.isfinite(quantized(x, timestep)).all()


# --- names and numbers ---


@pytest.mark.parametrize(
    ("recipe", "kind", "said"),
    [
        ("gptq-w4a8", UnknownNameError, ("unknown recipe 'gptq'", "ptq4dit", "rtn", "smoothquant")),
        ("w4a8", UnknownNameError, ("unknown recipe 'w4a8'", "ptq4dit-w4a8")),
        ("", UnknownNameError, ("unknown recipe ''", "ptq4dit-w4a8")),
        ("ptq4dit", ConfigurationError, ("lacks a precision", "write ptq4dit-w8a8")),
        ("rtn-w1a8", ConfigurationError, ("1 bits for weights", "2 to 8")),
        ("rtn-w9a8", ConfigurationError, ("9 bits for weights", "2 to 8")),
        ("rtn-w4a1", ConfigurationError, ("1 bits for activations", "2 to 8 are possible, and 16")),
        ("rtn-w4a9", ConfigurationError, ("9 bits for activations", "2 to 8 are possible, and 16")),
        ("rtn-w4a17", ConfigurationError, ("17 bits for activations", "2 to 8 are possible, and 16")),
        (None, ConfigurationError, ("needs a recipe", 'recipe="ptq4dit-w8a8"')),
        (["rtn-w8a8"], ConfigurationError, ("a recipe is a name", "not a list")),
    ],
)
def test_recipes_that_there_are_not(
    tiny_dit: DiTTransformer2DModel, recipe: Any, kind: type[Exception], said: tuple[str, ...]
) -> None:
    with refused(tiny_dit, kind, *said):
        fxquant.compile(tiny_dit, recipe=recipe, calibrate=calibrate(tiny_dit))


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"backend": "tensorrt"}, UnknownNameError, ("unknown backend 'tensorrt'", "Known:", "fake-quant")),
        ({"backend": 8}, ConfigurationError, ("a backend is a name", "not a int")),
        ({"layers": "some"}, ConfigurationError, ("layers='some'", "default, blocks or all")),
        ({"measure": -1}, ConfigurationError, ("measure=-1", "0 for none")),
        ({"statistics": {}}, ConfigurationError, ("statistics is a dict", "fxquant.Statistics")),
    ],
)
def test_options_that_there_are_not(
    tiny_dit: DiTTransformer2DModel, options: dict[str, Any], kind: type[Exception], said: tuple[str, ...]
) -> None:
    with refused(tiny_dit, kind, *said):
        fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=calibrate(tiny_dit), **options)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("balance-chanels", UnknownNameError, ("unknown pass 'balance-chanels'", "Known:", "balance-channels")),
        ("remove-no-ops{speed=2}", ConfigurationError, ("has no option 'speed=2'", "Its options: none")),
        ("quantize-linears{range=mse}", ConfigurationError, ("no option 'range=mse'", "activation-range, damping")),
        ("quantize-linears{weight-range=best}", ConfigurationError, ("best", "minmax, percentile, mse")),
        ("quantize-linears{damping=-1}", ConfigurationError, ("damping=-1", "such as 0.01")),
        ("quantize-linears{damping=nan}", ConfigurationError, ("damping=nan", "such as 0.01")),
        ("quantize linears", ConfigurationError, ("is not a pass", "write name or name{option=value")),
    ],
)
def test_passes_and_options_that_there_are_not(text: str, kind: type[Exception], said: tuple[str, ...]) -> None:
    with pytest.raises(kind) as caught:
        parse_pass(text)
    assert all(words in str(caught.value) for words in said), str(caught.value)


def test_a_group_that_does_not_divide(tiny_dit: DiTTransformer2DModel) -> None:
    with refused(tiny_dit, ConfigurationError, "transformer_blocks.0.", "16", "7", "divide"):
        fxquant.compile(tiny_dit, recipe="rtn-w4a8-g7", calibrate=calibrate(tiny_dit))


def test_groups_that_do_not_divide_are_named_before_calibration_is_over(tiny_dit: DiTTransformer2DModel) -> None:
    calls = []

    def counted() -> None:
        for step in (900.0, 100.0):
            calls.append(step)
            run(tiny_dit, timestep=step)

    with refused(tiny_dit, ConfigurationError, "transformer_blocks.0.attn1.to_q", "48"):
        fxquant.compile(tiny_dit, recipe="single-step-w4a8-g48", calibrate=counted)
    assert calls == [900.0]  # The first call settles the layers.


@pytest.mark.parametrize("layer", ["pos_embed.proj", "transformer_blocks.0.norm1.emb.class_embedder.embedding_table"])
def test_groups_where_there_are_none(quantized: GraphModel, tiny_dit: DiTTransformer2DModel, layer: str) -> None:
    plan = copy.deepcopy(quantized.plan)
    assert plan is not None
    plan.layers[layer].weight_bits, plan.layers[layer].group_size = 4, 4
    with refused(tiny_dit, ConfigurationError, layer, "groups of 4", "for linears only", "group_size to 0"):
        fxquant.compile(tiny_dit, plan=plan)


# --- timesteps ---


def test_more_groups_of_timesteps_than_timesteps(tiny_dit: DiTTransformer2DModel) -> None:
    recipe = fxquant.Recipe.parse(str(make_recipe("htg-w8a8")).replace("group-timesteps", "group-timesteps{groups=4}"))
    with refused(tiny_dit, ConfigurationError, "4 groups of timesteps", "calibration saw 3", "at most as many"):
        fxquant.compile(tiny_dit, recipe=recipe, calibrate=calibrate(tiny_dit))


def test_one_timestep_for_htg(tiny_dit: DiTTransformer2DModel) -> None:
    with refused(tiny_dit, CalibrationError, "one timestep only", "calibrate with the whole schedule"):
        fxquant.compile(tiny_dit, recipe="htg-w8a8", calibrate=lambda: run(tiny_dit, timestep=500))


def test_a_step_that_never_comes(tiny_dit: DiTTransformer2DModel) -> None:
    recipe = fxquant.Recipe.parse(str(make_recipe("single-step-w8a8")).replace("observe-step{", "observe-step{step=3 "))
    with refused(tiny_dit, CalibrationError, "step 3 is to be observed", "make more steps, or observe an earlier one"):
        fxquant.compile(tiny_dit, recipe=recipe, calibrate=calibrate(tiny_dit))


def test_one_step_of_samples_at_several(tiny_dit: DiTTransformer2DModel) -> None:
    with refused(tiny_dit, CalibrationError, "samples of a call are at several", "one timestep each"):
        fxquant.compile(tiny_dit, recipe="single-step-w8a8", calibrate=lambda: run(tiny_dit, timestep=None))


@pytest.mark.parametrize(
    ("group", "bits"),
    [
        # Each number of bits with one size of group, by turns; the rest is exhaustive.
        pytest.param(group, bits, marks=[pytest.mark.exhaustive] * (bits % 3 != number))
        for number, group in enumerate((0, 4, 16))
        for bits in range(2, 9)
    ],
)
def test_single_step_of_all_bits_and_groups_that_divide(bits: int, group: int) -> None:
    model = make_dit()
    name = f"single-step-w{bits}a8" + (f"-g{group}" if group else "")
    found = fxquant.compile(model, recipe=name, layers="blocks", calibrate=calibrate(model), measure=0)
    layer = found.plan.layers["transformer_blocks.0.attn1.to_q"]
    assert (layer.weight_bits, layer.activation_bits, layer.group_size) == (bits, 8, group)
    assert found.plan.timesteps == sorted(STEPS)  # The first step and two later ones are all three.
    scales = [t for name, t in found.tensors().items() if name.endswith("to_q.weight_scale")]
    assert [list(scale.shape) for scale in scales] == [[16, 16 // group if group else 1]]
    assert torch.isfinite(run(found)).all()


# --- the model ---


def test_a_model_in_train_mode(tiny_dit: DiTTransformer2DModel) -> None:
    tiny_dit.train()
    with refused(tiny_dit, ConfigurationError, "training mode", "call model.eval()"):
        fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=calibrate(tiny_dit))
    with refused(tiny_dit, ConfigurationError, "training mode", "call model.eval()"):
        fxquant.trace(tiny_dit)


def test_a_block_in_train_mode(tiny_dit: DiTTransformer2DModel) -> None:
    tiny_dit.transformer_blocks[0].norm1.emb.class_embedder.train()  # Which drops labels at random.
    said = ("module 'transformer_blocks.0.norm1.emb.class_embedder' is in training mode", "call model.eval()")
    with refused(tiny_dit, ConfigurationError, *said):
        fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=calibrate(tiny_dit))
    with refused(tiny_dit, ConfigurationError, *said):
        fxquant.trace(tiny_dit)


def test_a_block_that_went_through_torch_compile(tiny_dit: DiTTransformer2DModel) -> None:
    tiny_dit.transformer_blocks[0] = torch.compile(tiny_dit.transformer_blocks[0], backend="eager")
    with refused(tiny_dit, ConfigurationError, "module 'transformer_blocks.0' went through torch.compile"):
        fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=calibrate(tiny_dit))


def test_calibration_under_autocast(tiny_dit: DiTTransformer2DModel) -> None:
    def cast() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            run(tiny_dit)

    with refused(tiny_dit, CalibrationError, "under torch.autocast", "model.to(torch.bfloat16)"):
        fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=cast)


def test_compiling_twice(quantized: GraphModel) -> None:
    for function in (
        lambda: fxquant.compile(quantized, recipe="rtn-w8a8", calibrate=lambda: run(quantized)),
        lambda: fxquant.trace(quantized),
    ):
        with refused(quantized, AlreadyCompiledError, "made by fxquant", "give the original float model"):
            function()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: "facebook/DiT-XL-2-256", ("a str is not a model", "such as pipe.transformer")),
        (make_pipeline, ("a DiTPipeline is not a model", "such as pipe.transformer")),
        (lambda: torch.compile(make_dit(), backend="eager"), ("torch.compile", "In the other order")),
    ],
)
def test_what_is_no_plain_model(make: Callable[[], Any], said: tuple[str, ...]) -> None:
    thing = make()
    for function in (
        lambda: fxquant.compile(thing, recipe="rtn-w8a8", calibrate=lambda: None),
        lambda: fxquant.trace(thing),
    ):
        with pytest.raises(ConfigurationError) as caught:
            function()
        assert all(words in str(caught.value) for words in said), str(caught.value)


class Flow(nn.Module):
    """A small token model whose timestep input has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.embed = nn.Linear(1, 8)

    def forward(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        if sigma is not None:
            x = x + self.embed(sigma[:, None].to(x.dtype))[:, None]
        for block in self.blocks:
            x = x + torch.nn.functional.gelu(block(x))
        return x


@pytest.mark.parametrize("recipe", ["rtn-w8a8", "rtn-w8a16"])
def test_a_model_without_a_timestep(recipe: str) -> None:
    model = Flow().eval()
    x, sigma = torch.randn(2, 3, 8), torch.tensor([0.1, 0.9])
    with refused(model, MissingTimestepError, "no tensor input 'timestep'", "x, sigma", 'timestep="..."'):
        fxquant.compile(model, recipe=recipe, layers="all", calibrate=lambda: model(x, sigma))
    with refused(model, MissingTimestepError, "no tensor input 'sigma'", "inputs are: x.", 'timestep="..."'):
        fxquant.compile(model, recipe=recipe, layers="all", timestep="sigma", calibrate=lambda: model(x))
    quantized = fxquant.compile(model, recipe=recipe, layers="all", timestep="sigma", calibrate=lambda: model(x, sigma))
    assert quantized.plan.timestep == "sigma"
    assert list(quantized.plan.output_sqnr_db) == [pytest.approx(0.1)]


class Undecided(nn.Module):
    """What export cannot trace: the path depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        if timestep.sum() > 3:  # this line
            return self.proj(x)
        return x


def test_a_model_that_cannot_be_traced() -> None:
    model = Undecided().eval()
    line = "if timestep.sum() > 3:  # this line"
    said = ("Undecided cannot be traced", "test_bad_input.py", line, "branch on shapes")
    with refused(model, CaptureError, *said):
        fxquant.compile(model, recipe="rtn-w8a8", calibrate=lambda: model(torch.ones(2, 4), torch.ones(2)))
    traced = fxquant.trace(model)
    with refused(model, CaptureError, *said):
        traced(torch.ones(2, 4), torch.ones(2))
    assert not traced.captured


def test_an_input_that_cannot_be_captured(tiny_dit: DiTTransformer2DModel) -> None:
    traced = fxquant.trace(tiny_dit)
    with refused(tiny_dit, CaptureError, "input 'cross_attention_kwargs' is a object", "tensors, numbers, strings"):
        traced(**inputs(), cross_attention_kwargs=object())
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        traced(**inputs(), colour="red")


# --- what comes after ---


def test_plan_together_with_recipe(tiny_dit: DiTTransformer2DModel, quantized: GraphModel) -> None:
    said = ("either a plan, or a recipe",)
    with refused(tiny_dit, ConfigurationError, *said):
        fxquant.compile(tiny_dit, recipe="rtn-w8a8", plan=quantized.plan)
    with refused(tiny_dit, ConfigurationError, *said):
        fxquant.compile(tiny_dit, calibrate=lambda: None, plan=quantized.plan)
    with refused(tiny_dit, ConfigurationError, "plan is a str", "fxquant.Plan.load"):
        fxquant.compile(tiny_dit, plan="plan.json")


def test_a_plan_of_another_model(quantized: GraphModel) -> None:
    model = make_dit(layers=2)
    with refused(model, ConfigurationError, "transformer_blocks.1.", "another model"):
        fxquant.compile(model, plan=quantized.plan)


class TwoWays(Flow):
    """Without a text, one layer is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor | None = None) -> Tensor:
        x = super().forward(x, timestep)
        return x if text is None else x + self.context(text)


def test_a_call_that_needs_a_part_that_was_never_captured() -> None:
    model = TwoWays().eval()
    x, timestep = torch.randn(2, 3, 8), torch.tensor([1.0, 9.0])
    for recipe in ("rtn-w8a8", "rtn-w8a16"):
        quantized = fxquant.compile(model, recipe=recipe, layers="all", calibrate=lambda: model(x, timestep))
        before, layers = quantized(x, timestep), dict(quantized.plan.layers)
        for _ in range(2):
            with pytest.raises((CaptureError, CalibrationError)) as caught:
                quantized(x, timestep, text=x)
            assert "context" in str(caught.value)
            assert "calibrate with" in str(caught.value).lower()
        assert quantized.plan.layers == layers  # Nothing of the failed attempt is left.
        assert len(quantized.graphs) == 1
        assert torch.equal(quantized(x, timestep), before)


def test_another_dtype(quantized: GraphModel) -> None:
    with refused(quantized, ConfigurationError, "float16, bfloat16, float32 or float64", "float8_e4m3fn"):
        quantized.to(torch.float8_e4m3fn)
    with unchanged(quantized):
        assert quantized.to("cpu") is quantized
        assert quantized.to(torch.float32) is quantized
        assert quantized.cpu() is quantized


WRONG_TYPES: dict[str, tuple[Callable[[GraphModel], Any], str]] = {
    "origin of text": (lambda q: fxquant.origin("x"), "node should be a node of a graph.*, not a str"),
    "origin of a graph": (lambda q: fxquant.origin(q.graphs[0].graph), "node should be a node.*, not a Graph"),
    "nodes of a model": (lambda q: fxquant.nodes_of(q, "x"), r"graph should be a graph, such as quantized.graphs\[0\]"),
    "nodes of a number": (lambda q: fxquant.nodes_of(q.graphs[0], 3), "layer should be the name of a layer.*a int"),
    "explain a number": (lambda q: fxquant.explain(q, 3), "layer should be the name of a layer, not a int"),
    "explain at a text": (lambda q: fxquant.explain(q, "x", timestep="1"), "timestep should be a number.*not a str"),
    "explain a list": (lambda q: fxquant.explain([q], "x"), "takes a quantized model, a plan or the folder"),
    "explain in no history": (
        lambda q: fxquant.explain(q, "x", history=[]),
        "history should be what .*rewrite_history",
    ),
    "explain in graph x": (lambda q: fxquant.explain(q, "x", graph="0"), "graph should be the number of a graph"),
    "history of a number": (lambda q: fxquant.rewrite_history(3), "can be inspected, not a int"),
    "history of None": (lambda q: fxquant.rewrite_history(None), "can be inspected, not a NoneType"),
    "history of graph x": (lambda q: fxquant.rewrite_history(q, graph="0"), "graph should be the number of a graph"),
    "history of graph True": (lambda q: fxquant.rewrite_history(q, graph=True), "number of a graph, not a bool"),
    "history of a plan": (lambda q: fxquant.rewrite_history(q.plan, model="DiT"), "give the float model"),
    "diff of a number": (lambda q: fxquant.diff(q, 3), "takes a quantized model, a plan or the folder.*not a int"),
    "diff of a step 3": (lambda q: fxquant.diff(q, step=3), "step should be the name of a pass, or lower, not a int"),
    "diff of a block": (lambda q: fxquant.diff(q, q, block=[3]), "block should be the number or path of a block"),
    "diff of a layer": (lambda q: fxquant.diff(q, q, layer=3), "layer should be the name of a layer, not a int"),
    "diff in graph x": (lambda q: fxquant.diff(q, q, graph="0"), "graph should be the number of a graph"),
    "page without path": (lambda q: fxquant.inspect_page(q, None), "path should be the path of the file to write"),
    "page of a number": (lambda q: fxquant.inspect_page(3, "unwritten"), "can be inspected, not a int"),
    "page with a name": (lambda q: fxquant.inspect_page(q, "unwritten", names="a"), "names should be a list of names"),
    "page with number": (lambda q: fxquant.inspect_page(q, "unwritten", names=[3]), "each of names should be the name"),
    "page with a dict": (lambda q: fxquant.inspect_page(q, "unwritten", statistics={}), "statistics should be"),
    "page with errors": (lambda q: fxquant.inspect_page(q, "unwritten", errors=[1]), "errors should be a mapping"),
}

WRONG_TYPES_OF_ATTRIBUTE: dict[str, tuple[dict[str, Any], str]] = {
    "inputs": ({"inputs": 3}, "inputs should be statistics that kept calls, or a function .*, not a int"),
    "timesteps": ({"timesteps": 0.5}, "timesteps should be a number of timesteps, or a list of timesteps, not a float"),
    "text as timesteps": ({"timesteps": "12"}, "each of timesteps should be a number, not a str"),
    "samples": ({"samples": "1"}, "samples should be a whole number, not a str"),
    "probes": ({"probes": 1.5}, "probes should be a whole number, not a float"),
    "measure": ({"measure": "all"}, "measure should be a number of layers, or None for all"),
    "budget": ({"budget": "10 min"}, "budget should be a number of seconds, or None for no limit"),
    "resume": ({"resume": 3}, "resume should be the path of a folder"),
    "seed": ({"seed": None}, "seed should be a whole number, not a NoneType"),
}


@pytest.mark.parametrize("what", WRONG_TYPES)
def test_arguments_of_inspections_that_have_a_wrong_type(quantized: GraphModel, what: str) -> None:
    call, said = WRONG_TYPES[what]
    with pytest.raises(ConfigurationError, match=said):
        call(quantized)


@pytest.mark.parametrize("what", WRONG_TYPES_OF_ATTRIBUTE)
def test_arguments_of_attribute_that_have_a_wrong_type(
    quantized: GraphModel, tiny_dit: DiTTransformer2DModel, what: str
) -> None:
    options, said = WRONG_TYPES_OF_ATTRIBUTE[what]
    with pytest.raises(ConfigurationError, match=said):
        fxquant.attribute(quantized, tiny_dit, **{"inputs": fxquant.Statistics(), **options})


LONG = "x" * 3000


@pytest.mark.parametrize(
    "call",
    [
        lambda plan: parse_pass(LONG),
        lambda plan: parse_pass("x y " * 800),
        lambda plan: parse_pass(f"balance-channels{{{LONG}=1}}"),
        lambda plan: parse_pass(f"balance-channels{{exponent={LONG}}}"),
        lambda plan: make_recipe(LONG),
        lambda plan: make_recipe(f"{LONG}-w4a8"),
        lambda plan: make_recipe("rtn-w4a8", layers=LONG),
        lambda plan: make_recipe("rtn-w4a8").with_options("x y " * 800),
        lambda plan: make_recipe("rtn-w4a8").with_options("assign-precision", precision="x y " * 800),
        lambda plan: make_recipe("rtn-w4a8").with_options("assign-precision", overrides=(LONG,)),
        lambda plan: plan.layer("x y " * 800),
        lambda plan: fxquant.explain(plan, LONG),
        lambda plan: fxquant.diff(plan, plan, block=LONG),
        lambda plan: fxquant.report(plan, device=LONG),
        lambda plan: fxquant.Statistics()["x y " * 800],
    ],
)
def test_a_message_shows_only_the_ends_of_a_long_text(quantized: GraphModel, call: Callable[[Any], Any]) -> None:
    with pytest.raises(fxquant.FxquantError, match=r"x.{100,}characters left out\) \.\.\.") as error:
        call(quantized.plan)
    assert len(str(error.value)) < 1500
