"""Caches of steps where passes scaled or shifted what modules return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from torch import Tensor, nn

import fxquant
from fxquant.errors import ConfigurationError
from fxquant.pipeline.recipes import make_recipe
from fxquant.runtime.model import GraphModel
from tests.tiny import calibrate, inputs, make_dit

MOVING = str(make_recipe("htg-w8a8")).replace("group-timesteps", "group-timesteps{groups=2}")
"""With shifts that depend on the timestep."""


@pytest.fixture(scope="module")
def dit() -> DiTTransformer2DModel:
    return make_dit(2)


@pytest.fixture(
    scope="module", params=[MOVING, MOVING.replace("assign-precision", "assign-precision{precision=w8a16}")]
)
def shifted(request: pytest.FixtureRequest, dit: nn.Module) -> GraphModel:
    model = fxquant.compile(dit, recipe=request.param, calibrate=calibrate(dit), measure=0, backend="fake-quant")
    assert model.plan is not None
    assert any(layer.shift is not None and layer.boundaries for layer in model.plan.layers.values())
    return model


def taylor(*names: str, zeros: tuple[str, ...] = ()) -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(2, 1, cache_identifiers=[*names], skip_predict_identifiers=[*zeros])


def test_what_attentions_return_is_that_of_the_float_model(shifted: GraphModel, dit: nn.Module) -> None:
    """The output projection of an attention reads shifted values, which its rows for each bin of timesteps undo."""
    shifted.enable_cache(taylor(r".*attn1"))
    captured, expected = shifted.captured[0], dict[str, Tensor]()
    assert shifted._cache is not None

    def keep(name: str) -> Any:
        return lambda _, __, output: expected.__setitem__(name, output)

    hooks = [m.register_forward_hook(keep(name)) for name, m in dit.named_modules() if name.endswith("attn1")]
    for step in (900, 100):
        call = inputs(timestep=step)
        with torch.no_grad():
            dit(**call)
            given = captured.inputs(shifted.architecture.canonical((), call).leaves)
            found = shifted._cache.parts(captured.module).run(given, {}, lambda module, values: module(*values))[1]
        for name, (value,) in found.items():
            assert (value - expected[name]).norm() < 0.05 * expected[name].norm()
    for hook in hooks:
        hook.remove()
    shifted.disable_cache()


@pytest.mark.parametrize("name", ["norm1", "attn1.to_v"])
def test_values_that_move_with_the_timestep_are_refused(shifted: GraphModel, name: str) -> None:
    """They would be extrapolated from steps in which they were shifted by other amounts."""
    with pytest.raises(ConfigurationError, match=rf"shifts the channels of what transformer_blocks\.0\.{name} returns"):
        shifted.enable_cache(taylor(rf".*{name}"))
    assert not shifted.is_cache_enabled
    shifted.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    shifted.disable_cache()


def test_zeros_of_values_with_constant_shifts_are_refused(dit: nn.Module) -> None:
    made = fxquant.compile(dit, recipe="repq-w8a8", calibrate=calibrate(dit), measure=0, backend="fake-quant")
    with pytest.raises(ConfigurationError, match=r"what transformer_blocks\.0\.norm1 returns by constants"):
        made.enable_cache(taylor(r".*attn1", zeros=(r".*norm1",)))
    made.enable_cache(taylor(r".*norm1"))  # A constant is extrapolated as it is.


class Block(nn.Module):
    """Returns the result of a norm, whose channels can be scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.linear(x).tanh() * timestep[:, None] / 1000)
        return normed


class Blocks(nn.Module):
    """Blocks without residuals, so that balancing scales the result of each by factors of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, timestep)
        found: Tensor = self.out(x)
        return found


def test_blocks_that_are_scaled_differently_are_refused() -> None:
    """What the other blocks added in one step, in scaled channels, would be added to channels of another scale."""
    model = Blocks().eval()
    call = {"x": torch.randn(4, 8) * torch.logspace(0, 2, 8), "timestep": torch.full((4,), 500.0)}
    made = fxquant.compile(
        model, recipe="ptq4dit-w8a8", calibrate=lambda: model(**call), measure=0, backend="fake-quant"
    )
    with pytest.raises(ConfigurationError, match=r"scales, shifts or rotates .* blocks\.0 gets"):
        made.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    made.enable_cache(MagCacheConfig(mag_ratios=[1.0] * 4, num_inference_steps=4))  # Neither end is scaled.
    plain = fxquant.compile(model, recipe="rtn-w8a8", calibrate=lambda: model(**call), measure=0)
    plain.enable_cache(FirstBlockCacheConfig(threshold=1e9))


def test_blocks_that_are_rotated_differently_are_refused() -> None:
    """By rotations that producers absorb."""
    torch.manual_seed(0)

    class Linears(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(3))

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x * timestep[:, None]

    model, call = Linears().eval(), {"x": torch.randn(4, 16), "timestep": torch.full((4,), 500.0)}
    recipe = "assign-precision ; rotate-channels,quantize-linears"
    made = fxquant.compile(model, recipe=recipe, calibrate=lambda: model(**call), measure=0, backend="fake-quant")
    with pytest.raises(ConfigurationError, match=r"scales, shifts or rotates .* blocks\.0 gets"):
        made.enable_cache(FirstBlockCacheConfig(threshold=1e9))
