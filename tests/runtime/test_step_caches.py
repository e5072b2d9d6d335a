"""Caches of denoising steps on captured models."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor, nn

import fxquant
from fxquant.errors import ConfigurationError
from fxquant.runtime.caches.cutting import Cut
from fxquant.runtime.model import GraphModel
from tests.adapters import fluxes
from tests.test_two_experts import clip, expert, pipeline
from tests.tiny import calibrate, inputs, make_dit, make_pipeline
from tests.zoo.models import ENTRIES

pytestmark = pytest.mark.usefixtures("torchao_on_any_processor")
ALWAYS = FirstBlockCacheConfig(threshold=1e9)  # Each step but the first is skipped.
NEVER = FirstBlockCacheConfig(threshold=-1.0)
STEPS = tuple(range(900, 200, -100))


@pytest.fixture(scope="module")
def dit() -> DiTTransformer2DModel:
    return make_dit(3)


@pytest.fixture(scope="module")
def shared(dit: DiTTransformer2DModel) -> GraphModel:
    return fxquant.trace(dit)


@pytest.fixture
def traced(shared: GraphModel) -> Iterator[GraphModel]:
    yield shared
    shared._cache = None


@torch.no_grad()
def sample(model: nn.Module, steps: tuple[int, ...] = STEPS, seed: int = 0, **options: Any) -> Tensor:
    """The outputs of some steps, in each of which the latents change a little."""
    call = inputs(seed=seed, **options)
    x, found = call.pop("hidden_states"), []
    for step in steps:
        call["timestep"] = torch.full_like(call["timestep"], step)
        found.append(model(x, **call).sample)
        x = x - 0.05 * found[-1][:, :4]
    return torch.stack(found)


def counted(model: GraphModel, *args: Any, **options: Any) -> tuple[Tensor, int]:
    """The same, and the number of steps that were skipped."""
    before = model.cache_counts["skipped"]
    return sample(model, *args, **options), model.cache_counts["skipped"] - before


# --- the same as diffusers ---

_LAYERS = ("num_layers", "num_single_layers", "num_blocks")
_FAMILIES = (
    "DiT2D", "2D", "Flux2D", "Wan3D", "CogVideoX3D", "QwenImage2D", "LTXVideo3D", "HunyuanVideo3D", "Mochi3D",
    "CogView42D", "HunyuanImage2D",
)  # fmt: skip
"""Families that diffusers itself can cache."""


def _steps(model: nn.Module, entry: Any, count: int = 6) -> list[Tensor]:
    """Outputs of calls that are alike, except for the fourth."""
    found, call = [], entry.call(2, seed=1, step=900)
    x, noise = (
        call["hidden_states"],
        torch.randn(call["hidden_states"].shape, generator=torch.Generator().manual_seed(9)),
    )
    for number in range(count):
        call["hidden_states"] = x + (3.0 if number == 3 else 0.02 * number) * noise
        call[entry.timestep] = entry.call(2, seed=1, step=900 - 40 * number)[entry.timestep]
        with torch.no_grad():
            found.append(model(**call, return_dict=False)[0])
    return found


_SAMPLE = ("DiT2D",)


@pytest.mark.parametrize(
    "name", [name if name in _SAMPLE else pytest.param(name, marks=pytest.mark.exhaustive) for name in _FAMILIES]
)
@pytest.mark.parametrize("rule", ["first block", "magnitude"])
def test_computes_what_diffusers_computes(name: str, rule: str) -> None:
    """Not only close: the parts run the same ops as the modules."""
    config: Any = FirstBlockCacheConfig(threshold=0.25)
    if rule == "magnitude":
        config = MagCacheConfig(mag_ratios=[1.0, 0.99, 0.98, 1.01, 0.99, 1.0], num_inference_steps=6, threshold=0.03)
    skipped = _compared(name, config, apply_mag_cache if rule == "magnitude" else apply_first_block_cache)
    assert not skipped[0] and (rule == "magnitude" or not skipped[3])


_TAYLOR = (
    TaylorSeerCacheConfig(3, 2, max_order=2, taylor_factors_dtype=torch.float32, cache_identifiers=[r".*attn\d?"]),
    TaylorSeerCacheConfig(2, 1, disable_cache_after_step=4),
    TaylorSeerCacheConfig(4, 1, use_lite_mode=True),
)


@pytest.mark.slow
@pytest.mark.parametrize("config", _TAYLOR, ids=["second order", "bfloat16", "lite"])
def test_extrapolates_as_diffusers_does(config: TaylorSeerCacheConfig) -> None:
    assert not _compared("Flux2D", config, apply_taylorseer_cache)[0]


@pytest.mark.parametrize("name", ["2D", "Flux2D"])
def test_broadcasts_as_diffusers_does(name: str) -> None:
    """PixArt has attentions of two kinds, of which the two are computed in different steps."""
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, cross_attention_block_skip_range=3 if name == "2D" else None,
        current_timestep_callback=lambda: 500,
    )  # fmt: skip
    skipped = _compared(name, config, apply_pyramid_attention_broadcast)
    assert skipped == [False, True, name == "2D", True, name == "2D", True]


def _compared(name: str, config: Any, apply: Any) -> list[bool]:
    """Compare a traced model with the float model of diffusers; return which steps were skipped."""
    entry = next(entry for entry in ENTRIES if entry.id == name)
    deeper = {key: 3 for key in _LAYERS if key in entry.config}
    model = replace(entry, config=entry.config | deeper).model()
    made, theirs = fxquant.trace(model, timestep=entry.timestep), copy.deepcopy(model)
    plain = _steps(made, entry)
    apply(theirs, config)
    _set_cache_context(theirs, CacheContext("cond"))
    made.enable_cache(config)
    with made.cache_context("cond"):
        found = _steps(made, entry)
    for ours, other in zip(found, _steps(theirs, entry), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
    skipped = [not torch.equal(ours, full) for ours, full in zip(found, plain, strict=True)]
    assert sum(skipped) == made.cache_counts["skipped"] > 0
    return skipped


@pytest.mark.slow
def test_a_pipeline_with_the_cache_of_diffusers() -> None:
    """With a prompt and without one: two contexts. The pipeline resets them, so a second image is like the first.

    Outside of a context the model cannot tell the two apart.
    """
    prompt = fluxes.PROMPT | {
        "negative_prompt_embeds": torch.zeros(1, 5, fluxes.MODEL.config.joint_attention_dim),
        "negative_pooled_prompt_embeds": torch.zeros(1, fluxes.MODEL.config.pooled_projection_dim),
        "num_inference_steps": 8, "true_cfg_scale": 2.0,
    }  # fmt: skip

    def image(transformer: Any) -> Tensor:
        pipe = fluxes.make_pipe(transformer)
        made: Tensor = pipe(**prompt, generator=torch.Generator().manual_seed(1)).images
        return made

    theirs, made = copy.deepcopy(fluxes.MODEL), fxquant.trace(fluxes.MODEL)
    calls: list[Any] = []
    hook = made.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    plain = image(made)
    hook.remove()
    for model in (theirs, made):
        model.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    first = image(made)
    assert 0 < made.cache_counts["skipped"] < made.cache_counts["calls"] == 16
    torch.testing.assert_close(first, image(theirs), rtol=1e-5, atol=1e-5)
    assert not torch.equal(first, plain)
    assert torch.equal(image(made), first)
    args, kwargs = calls[0]
    with pytest.raises(ConfigurationError, match="cache_context"), torch.no_grad():
        made(*args, **kwargs)
    made.disable_cache()
    assert torch.equal(image(made), plain)


@pytest.mark.slow
def test_two_experts() -> None:
    """Each has its own cache, and each ends within one generation."""
    given = {name: expert(seed, layers=3) for name, seed in (("transformer", 1), ("transformer_2", 2))}
    theirs = pipeline(**copy.deepcopy(given))
    ours = pipeline(**{name: fxquant.trace(model) for name, model in given.items()})
    plain = clip(ours)
    for pipe in (theirs, ours):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
        pipe.transformer_2.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    found = clip(ours)
    torch.testing.assert_close(found, clip(theirs), rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, plain)
    assert torch.equal(clip(ours), found)


# --- what decides ---


def test_follows_the_values_of_each_step(traced: GraphModel) -> None:
    """A cache whose decision or residual froze at the first step would skip all others, or none."""
    call = inputs()
    x = call.pop("hidden_states")
    changed = [x, x + 1e-4, x + 2e-4, -x, -x + 1e-4, x]
    plain, found, skipped = [], [], []
    with torch.no_grad():
        for latents in changed:
            plain.append(traced(latents, **call).sample)
        traced.enable_cache(FirstBlockCacheConfig(threshold=0.05))
        for latents in changed:
            found.append(traced(latents, **call).sample)
            skipped.append(traced.cache_counts["skipped"])
    assert skipped == [0, 1, 2, 2, 3, 3]
    for number, (ours, full) in enumerate(zip(found, plain, strict=True)):
        assert torch.equal(ours, full) == (number in (0, 3, 5))
        torch.testing.assert_close(ours, full, rtol=1e-2, atol=1e-2)


def test_what_is_added_comes_from_the_last_full_step(traced: GraphModel) -> None:
    """Each skipped step adds what the last full one added, and its own first block runs."""
    traced.enable_cache(ALWAYS)
    found, skipped = counted(traced)
    assert skipped == len(STEPS) - 1
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(found, 2))


def test_a_cache_that_never_skips_changes_no_bit(traced: GraphModel) -> None:
    plain = sample(traced)
    traced.enable_cache(NEVER)
    found, skipped = counted(traced)
    assert skipped == 0 and torch.equal(found, plain)
    traced.disable_cache()
    assert not traced.is_cache_enabled and torch.equal(sample(traced), plain)


def test_ratios_are_measured(traced: GraphModel, caplog: pytest.LogCaptureFixture, dit: nn.Module) -> None:
    traced.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=len(STEPS)))
    plain = sample(traced)
    assert "mag_ratios" in caplog.text and torch.equal(plain, sample(dit))
    ratios = [float(number) for number in caplog.text.partition("): [")[2].partition("]")[0].split(",")]
    assert len(ratios) == len(STEPS) and ratios[0] == 1.0
    traced.disable_cache()
    traced.enable_cache(MagCacheConfig(mag_ratios=ratios, num_inference_steps=len(STEPS), threshold=1.0))
    assert counted(traced)[1] > 0


@pytest.mark.parametrize(
    "name", ["Flux22D", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("Chroma2D", "SD32D"))]
)
def test_models_that_diffusers_cannot_cache_so(name: str) -> None:
    """Blocks that are not registered, that return image and text in one value, and a last one without text."""
    entry = next(entry for entry in ENTRIES if entry.id == name)
    made = fxquant.trace(entry.model(), timestep=entry.timestep)
    plain = _steps(made, entry, 3)
    for config in (NEVER, ALWAYS):
        made.enable_cache(config)
        with made.cache_context("cond"):
            found = _steps(made, entry, 3)
        assert torch.equal(found[0], plain[0])
        assert made.cache_counts["skipped"] == (0 if config is NEVER else 2)
        for ours, full in zip(found[1:], plain[1:], strict=True):
            assert torch.equal(ours, full) == (config is NEVER)
            torch.testing.assert_close(ours, full, rtol=0.1, atol=0.3)
        made.disable_cache()


# --- generations ---


def test_a_generation_does_not_read_what_another_one_left(traced: GraphModel) -> None:
    """With the reset of pipelines, and without it: the next generation begins at an earlier timestep."""
    traced.enable_cache(ALWAYS)
    first = sample(traced)
    traced._reset_stateful_cache()
    assert torch.equal(sample(traced), first)
    assert torch.equal(sample(traced), first)  # Without a reset.
    for ended in (STEPS[0], STEPS[0] - 50):  # After one step; the next begins at the same or at another timestep.
        traced._reset_stateful_cache()
        sample(traced, (ended,), seed=5)
        assert torch.equal(sample(traced)[0], first[0])
    traced._reset_stateful_cache()
    assert torch.equal(sample(traced), first)


def test_timesteps_that_rise(traced: GraphModel) -> None:
    traced.enable_cache(ALWAYS)
    rising = STEPS[::-1]
    first, skipped = counted(traced, rising)
    assert skipped == len(STEPS) - 1
    assert torch.equal(sample(traced, rising), first)


def test_solvers_that_call_twice_at_a_timestep(traced: GraphModel) -> None:
    traced.enable_cache(ALWAYS)
    assert counted(traced, tuple(step for step in STEPS for _ in range(2)))[1] == 2 * len(STEPS) - 1


def test_inputs_that_are_made_anew_in_each_step(traced: GraphModel) -> None:
    """As offloading does, or a loop that builds its inputs: the second step does not begin a generation."""
    traced.enable_cache(ALWAYS)
    first, skipped = counted(traced)
    assert skipped == len(STEPS) - 1
    call = inputs()
    traced._reset_stateful_cache()
    x = call["hidden_states"]
    for number, step in enumerate(STEPS):
        again = {name: tensor.clone() for name, tensor in call.items()}
        with torch.no_grad():
            found = traced(**again | {"hidden_states": x, "timestep": torch.full_like(call["timestep"], step)}).sample
        assert torch.equal(found, first[number])
        x = x - 0.05 * found[:, :4]


class Residual(nn.Module):
    """A block that adds to what it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + self.linear(x).tanh() * timestep[:, None] / 1000


class Unconditional(nn.Module):
    """Its only inputs are the latents and the timestep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, timestep)
        return x


def test_a_model_without_a_prompt() -> None:
    """Nothing but the timestep tells generations apart."""
    made = fxquant.trace(Unconditional().eval())

    def steps(timesteps: Sequence[int]) -> int:
        before = made.cache_counts["skipped"]
        for step in timesteps:
            made(torch.randn(2, 8), torch.full((2,), float(step)))
        return made.cache_counts["skipped"] - before

    made.enable_cache(MagCacheConfig(mag_ratios=[1.0] * 7, num_inference_steps=7, threshold=1.0))
    assert [steps(STEPS) for _ in range(2)] == [5, 5]  # Of 7 steps, the first runs, and each fourth after it.
    made._reset_stateful_cache()
    assert steps((900, 800, 800, 700, 700)) == 3  # A solver that calls twice at a timestep.
    made._reset_stateful_cache()
    assert steps((900,)) + steps(STEPS) == 5  # A generation that ended after one step.


@pytest.mark.slow
def test_other_sizes_and_batches_have_their_own_state(traced: GraphModel) -> None:
    small = sample(traced, size=4, batch=2)
    traced.enable_cache(ALWAYS)
    first = sample(traced)
    with torch.no_grad():  # In the middle of a generation, a call of another batch size and one of another height.
        assert not torch.equal(sample(traced, STEPS[:2], batch=2)[1], first[1, :2])
    again = sample(traced, size=4, batch=2)
    assert torch.equal(again[0], small[0])
    assert torch.equal(sample(traced), first)


def test_contexts_are_apart(traced: GraphModel) -> None:
    """Calls with and without a prompt alternate, and each reads its own earlier steps only."""
    traced.enable_cache(ALWAYS)
    alone = [sample(traced, seed=seed) for seed in (1, 2)]
    traced._reset_stateful_cache()
    calls = [inputs(seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        for number, step in enumerate(STEPS):
            for name, call, expected in zip(("cond", "uncond"), calls, alone, strict=True):
                call["timestep"] = torch.full_like(call["timestep"], step)
                with traced.cache_context(name):
                    found = traced(**call).sample
                assert torch.equal(found, expected[number])
                call["hidden_states"] = call["hidden_states"] - 0.05 * found[:, :4]


def test_a_cache_that_is_enabled_within_a_context(traced: GraphModel) -> None:
    """As by a callback, or a loop of one's own. Its calls are in that context."""
    contexts: list[Any] = []
    with traced.cache_context("cond"):
        traced.enable_cache(ALWAYS)
        first = sample(traced, STEPS[:3])
        traced.disable_cache()
        traced.enable_cache(ALWAYS)
        assert traced._cache is not None
        held = traced._cache.states._held
        assert torch.equal(sample(traced, STEPS[:3]), first)
        contexts += [key[0] for key in held]
    sample(traced, STEPS[:3])
    contexts += [key[0] for key in held]
    assert contexts == ["cond", "cond", None]


def test_an_error_in_a_context_forgets_the_generation(traced: GraphModel) -> None:
    traced.enable_cache(ALWAYS)
    with traced.cache_context("cond"):
        first = sample(traced, STEPS[:3])
    with pytest.raises(KeyError), traced.cache_context("cond"):
        raise KeyError
    with traced.cache_context("cond"):
        assert counted(traced, STEPS[3:4])[1] == 0
    assert first.isfinite().all()


def test_an_error_in_a_step_forgets_the_generation(traced: GraphModel, monkeypatch: pytest.MonkeyPatch) -> None:
    traced.enable_cache(ALWAYS)
    sample(traced, STEPS[:3])
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Cut, "leaves", lambda *_: (_ for _ in ()).throw(MemoryError()))
        sample(traced, STEPS[3:4])
    assert counted(traced, STEPS[4:])[1] == len(STEPS) - 5


def test_threads_have_their_own_state(traced: GraphModel) -> None:
    traced.enable_cache(ALWAYS)
    expected = [sample(traced, seed=seed) for seed in range(3)]
    found: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        found[seed] = sample(traced, seed=seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(3))


# --- quantized ---


@pytest.fixture(scope="module", params=["native", "fake-quant", "torchao"])
def quantized(request: pytest.FixtureRequest, dit: nn.Module) -> GraphModel:
    recipe = {"native": "ptq4dit-w8a8", "fake-quant": "htg-w4a8", "torchao": "dynamic-w8a8"}[request.param]
    return fxquant.compile(dit, recipe=recipe, backend=request.param, calibrate=calibrate(dit), measure=0)


@contextmanager
def cached(model: GraphModel, config: Any) -> Iterator[None]:
    model.enable_cache(config)
    try:
        yield
    finally:
        model.disable_cache()


@pytest.mark.slow
def test_every_backend(quantized: GraphModel) -> None:
    """Kernels that compute over the end of a block still end there; tables of timesteps are read in each step."""
    plain = sample(quantized)
    with cached(quantized, NEVER):
        assert torch.equal(sample(quantized), plain)
    with cached(quantized, ALWAYS):
        found, skipped = counted(quantized)
    assert skipped == len(STEPS) - 1 and torch.equal(found[0], plain[0])
    assert 0 < (found - plain).norm() / plain.norm() < 0.5
    with cached(quantized, MagCacheConfig(mag_ratios=[1.0] * 7, num_inference_steps=7, threshold=1.0)):
        assert counted(quantized)[1] == 5  # Of 7 steps, the first runs, and each fourth after it.
    assert torch.equal(sample(quantized), plain)


def test_a_whole_pipeline_with_a_quantized_model(quantized: GraphModel) -> None:
    pipe = make_pipeline(quantized)

    def image() -> Any:
        return pipe(class_labels=[1], num_inference_steps=6, generator=torch.manual_seed(0), output_type="np").images

    plain = image()
    with cached(quantized, ALWAYS):
        found = image()
        assert quantized.cache_counts == {"calls": 6, "skipped": 5}
        assert (image() == found).all()
    assert (found != plain).any() and (image() == plain).all()


def test_blocks_that_are_compiled_one_by_one(dit: nn.Module) -> None:
    made = fxquant.trace(dit)
    with cached(made, FirstBlockCacheConfig(threshold=0.15)):
        expected, skipped = counted(made)
        made.compile_repeated_blocks(backend="eager")
        found, again = counted(made)
    assert made._pieces is not None and len(made._pieces._plans) == 1  # Those of parts are forgotten.
    assert 0 < skipped == again < len(STEPS) - 1
    torch.testing.assert_close(found, expected)


def test_an_offloaded_model(dit: nn.Module) -> None:
    made = fxquant.trace(dit)
    made.enable_cache(ALWAYS)
    expected = sample(made)
    made.enable_group_offload("cpu")
    assert torch.equal(sample(made), expected)
    made.disable_group_offload()
    assert torch.equal(sample(made), expected)


def test_a_model_whose_tensors_changed(dit: nn.Module) -> None:
    """The parts read the tensors of the model, not copies."""
    made = fxquant.compile(dit, recipe="rtn-w8a8", calibrate=calibrate(dit), measure=0)
    made.enable_cache(NEVER)
    before = sample(made)
    made.load_state_dict({name: tensor.clone() for name, tensor in made.state_dict().items()})
    assert torch.equal(sample(made), before)
    made.load_state_dict({n: t * 0.5 if n == "proj_out_2.bias" else t for n, t in made.state_dict().items()})
    assert not torch.equal(sample(made), before)


def test_inference_mode_and_no_grad(traced: GraphModel) -> None:
    traced.enable_cache(ALWAYS)
    expected = sample(traced)
    call = inputs()
    x = call.pop("hidden_states")
    for number, step in enumerate(STEPS):
        call["timestep"] = torch.full_like(call["timestep"], step)
        with torch.inference_mode() if number < 3 else nullcontext():
            found = traced(x, **call).sample.detach().clone()
        assert torch.equal(found, expected[number])
        x = x - 0.05 * found[:, :4]


def test_loras_before_and_after() -> None:
    from tests.adapters.loras import lora

    made = fxquant.compile(
        fluxes.MODEL, recipe="rtn-w8a8", calibrate=lambda: fluxes.images(fluxes.make_pipe(fluxes.MODEL)), measure=0
    )
    pipe = fluxes.make_pipe(made)
    plain = fluxes.images(pipe)
    made.enable_cache(NEVER)
    pipe.load_lora_weights(lora(fluxes.MODEL, targets=("to_q", "to_v")), adapter_name="style")
    with_lora = fluxes.images(pipe)
    assert not torch.equal(with_lora, plain)
    made.disable_cache()
    assert torch.equal(fluxes.images(pipe), with_lora)
    made.enable_cache(ALWAYS)
    skipping = fluxes.images(pipe)
    assert made.cache_counts["skipped"] == 1 and not torch.equal(skipping, with_lora)
    pipe.disable_lora()
    assert not torch.equal(fluxes.images(pipe), skipping)
    made.disable_cache()
    assert torch.equal(fluxes.images(pipe), plain)


# --- copies ---


@pytest.mark.slow
def test_copies_have_the_cache_and_not_what_it_holds(dit: nn.Module, tmp_path: Path) -> None:
    made = fxquant.compile(dit, recipe="rtn-w8a8", calibrate=calibrate(dit), measure=0)
    plain = sample(made)
    made.enable_cache(ALWAYS)
    first = sample(made)
    for clone in (copy.copy(made), copy.deepcopy(made)):
        assert clone.is_cache_enabled and clone.cache_counts["calls"] == 0
        assert torch.equal(sample(clone), first)
        clone.disable_cache()
        assert torch.equal(sample(clone), plain)
    assert made.is_cache_enabled
    fxquant.save(made, tmp_path / "dit")
    for again in (fxquant.load(tmp_path / "dit"), pickle.loads(pickle.dumps(made))):
        assert not again.is_cache_enabled and torch.equal(sample(again), plain)
        again.enable_cache(ALWAYS)
        assert torch.equal(sample(again), first)


# --- refused ---


def test_modules_that_a_backend_fuses_are_refused(quantized: GraphModel) -> None:
    """The native backend computes attention outputs with the gate behind them. Whole blocks can be cached on each."""
    attention = TaylorSeerCacheConfig(2, 1, cache_identifiers=[r".*attn1"])
    blocks = TaylorSeerCacheConfig(2, 1, cache_identifiers=[r".*blocks\.\d+"])
    plain = sample(quantized)
    with pytest.raises(ConfigurationError, match="fits"):
        quantized.enable_cache(TaylorSeerCacheConfig())
    if quantized.backend is not None and quantized.backend.name == "native":
        with pytest.raises(ConfigurationError, match=r"transformer_blocks\.0\.attn1 .*'native'"):
            quantized.enable_cache(attention)
        assert not quantized.is_cache_enabled
    else:
        with cached(quantized, attention), quantized.cache_context("cond"):
            found, skipped = counted(quantized)
        assert skipped == 3 and not torch.equal(found, plain)
    with cached(quantized, blocks), quantized.cache_context("cond"):
        found, skipped = counted(quantized)
    assert skipped == 3 and torch.equal(found[0], plain[0]) and not torch.equal(found, plain)


def test_other_caches_are_refused(traced: GraphModel) -> None:
    with pytest.raises(ConfigurationError, match=r"FasterCacheConfig .* FirstBlockCacheConfig"):
        traced.enable_cache(FasterCacheConfig())
    for wrong in ("first block", None, FirstBlockCacheConfig, {"threshold": 0.1}):
        with pytest.raises(ConfigurationError, match=r"takes the config of a cache, not .*FirstBlockCacheConfig\("):
            traced.enable_cache(wrong)
    assert not traced.is_cache_enabled
    traced.enable_cache(NEVER)
    with pytest.raises(ConfigurationError, match=r"disable_cache\(\) first"):
        traced.enable_cache(NEVER)


_RATIOS = {"mag_ratios": [1.0] * 4, "num_inference_steps": 4}
_BROADCAST = {"spatial_attention_block_skip_range": 2, "current_timestep_callback": lambda: 500}


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (FirstBlockCacheConfig, {"threshold": float("nan")}),
        (FirstBlockCacheConfig, {"threshold": "0.1"}),
        (FirstBlockCacheConfig, {"threshold": None}),
        (MagCacheConfig, {"threshold": float("nan"), **_RATIOS}),
        (MagCacheConfig, {"mag_ratios": [1.0, float("nan"), 1.0, 1.0], "num_inference_steps": 4}),
        (MagCacheConfig, {"mag_ratios": torch.ones(4, 2), "num_inference_steps": 4}),
        (MagCacheConfig, {"num_inference_steps": 0, "calibrate": True}),
        (MagCacheConfig, {"retention_ratio": 20, **_RATIOS}),
        (MagCacheConfig, {"max_skip_steps": -1, **_RATIOS}),
        (TaylorSeerCacheConfig, {"cache_interval": 0}),
        (TaylorSeerCacheConfig, {"disable_cache_before_step": 1.5}),
        (TaylorSeerCacheConfig, {"max_order": -1}),
        (TaylorSeerCacheConfig, {"taylor_factors_dtype": torch.int8}),
        (TaylorSeerCacheConfig, {"cache_identifiers": r".*blocks\.\d+"}),
        (TaylorSeerCacheConfig, {"cache_identifiers": ["*blocks"]}),
        (PyramidAttentionBroadcastConfig, {**_BROADCAST, "spatial_attention_block_skip_range": 0}),
        (PyramidAttentionBroadcastConfig, {**_BROADCAST, "spatial_attention_timestep_skip_range": (800, 100)}),
        (PyramidAttentionBroadcastConfig, {**_BROADCAST, "spatial_attention_block_identifiers": ("(",)}),
        (PyramidAttentionBroadcastConfig, {**_BROADCAST, "current_timestep_callback": None}),
    ],
)
def test_wrong_values_are_refused_by_name(traced: GraphModel, config: Any, wrong: dict[str, Any]) -> None:
    """They would be found in the middle of a generation, or skip always or never."""
    with pytest.raises(ConfigurationError, match=config.__name__):
        traced.enable_cache(config(**wrong))
    assert not traced.is_cache_enabled


def test_a_timestep_that_is_not_known(traced: GraphModel) -> None:
    """As that of a pipeline that does not run."""
    traced.enable_cache(PyramidAttentionBroadcastConfig(**_BROADCAST | {"current_timestep_callback": lambda: None}))
    with pytest.raises(ConfigurationError, match=r"current_timestep_callback.* returned None"):
        sample(traced)


def test_models_without_blocks_are_refused() -> None:
    made = fxquant.trace(make_dit(1))
    with pytest.raises(ConfigurationError, match="at least two"):
        made.enable_cache(NEVER)
    assert not made.is_cache_enabled


class Skipping(nn.Module):
    """What follows the blocks also reads what the second block returns."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = second = self.blocks[1](self.blocks[0](x))
        return self.blocks[3](self.blocks[2](x)) + second * timestep[:, None]


def test_graphs_that_cannot_be_cut_are_refused() -> None:
    """When the cache is enabled if the graph exists, else when it is called. The model still works without."""
    made = fxquant.trace(Skipping().eval())
    made.enable_cache(NEVER)
    with pytest.raises(ConfigurationError, match=r"from within blocks\.1.* disable_cache"):
        made(torch.ones(2, 8), torch.ones(2))
    made.disable_cache()
    assert made(torch.ones(2, 8), torch.ones(2)).shape == (2, 8)
    with pytest.raises(ConfigurationError, match=r"from within blocks\.1"):
        made.enable_cache(NEVER)
    assert not made.is_cache_enabled


def test_a_model_that_is_compiled_as_a_whole(dit: nn.Module) -> None:
    made = fxquant.trace(dit)
    sample(made)
    made.enable_cache(NEVER)
    for start in (made.compile, lambda: sample(torch.compile(made, backend="eager"))):
        with pytest.raises(ConfigurationError, match="compile_repeated_blocks"):
            start()
    made.disable_cache()
    made.compile(backend="eager")
    with pytest.raises(ConfigurationError, match="compiled as a whole"):
        made.enable_cache(NEVER)
