"""Planted salience: the same function in float64, and really salient, time-varying channels."""

import copy

import pytest
import torch
from torch import nn

from examples.digits import plant_salience
from examples.digits.generator import NULL_CLASS, build_transformer

TIMESTEPS = (1, 250, 500, 750, 980)


def _inputs(dtype: torch.dtype, n: int = 12):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(n, 4, 8, 8, generator=generator, dtype=dtype)
    labels = torch.tensor([*range(n // 2), *[NULL_CLASS] * (n - n // 2)])
    return latents, labels


def _run(model: nn.Module, timestep: int, dtype: torch.dtype) -> torch.Tensor:
    latents, labels = _inputs(dtype)
    with torch.no_grad():
        return model(latents, timestep=torch.full((len(latents),), timestep), class_labels=labels).sample


def _peaks(model: nn.Module, place: str) -> torch.Tensor:
    """Largest magnitude per input channel of a layer of every block, [timesteps, blocks, channels]."""
    layers = [block.get_submodule(place) for block in model.transformer_blocks]
    seen: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].abs().amax(dim=(0, 1)))) for layer in layers]
    for timestep in TIMESTEPS:
        _run(model, timestep, torch.float32)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen).unflatten(0, (len(TIMESTEPS), len(layers)))


@pytest.mark.parametrize("seed", [0, 1])
def test_function_is_preserved_in_float64(pipe, seed: int) -> None:
    model = copy.deepcopy(pipe.transformer).double()
    planted = plant_salience(model, seed=seed)
    for timestep in TIMESTEPS:
        expected, got = _run(model, timestep, torch.float64), _run(planted, timestep, torch.float64)
        assert ((got - expected).norm() / expected.norm()).item() < 1e-12


def test_float32_rounding_stays_small(pipe) -> None:
    planted = plant_salience(pipe.transformer)
    expected, got = _run(pipe.transformer, 500, torch.float32), _run(planted, 500, torch.float32)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-5


def test_original_is_left_alone_and_seed_decides(pipe) -> None:
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    first, again, other = (plant_salience(pipe.transformer, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("place", ["attn1.to_q", "ff.net.0.proj", "attn1.to_out.0"])
def test_channels_become_salient(pipe, place: str) -> None:
    def prominence(model: nn.Module) -> torch.Tensor:
        peaks = _peaks(model, place).amax(dim=0)
        return peaks.amax(dim=1) / peaks.median(dim=1).values

    assert (prominence(plant_salience(pipe.transformer)) > 3 * prominence(pipe.transformer)).all()


@pytest.mark.parametrize("place", ["attn1.to_q", "ff.net.0.proj"])
def test_salience_varies_with_the_timestep(pipe, place: str) -> None:
    peaks = _peaks(plant_salience(pipe.transformer, channels=8), place)
    salient = peaks.amax(dim=0).topk(8, dim=1).indices
    over_time = peaks.gather(2, salient.expand(len(TIMESTEPS), -1, -1))
    ratio = over_time.amax(dim=0) / over_time.amin(dim=0)
    assert ratio.median() > 1.5


@pytest.mark.parametrize(
    "options", [{"channels": 0}, {"channels": 33}, {"strength": (0.0, 2.0)}, {"strength": (9.0, 8.0)}]
)
def test_impossible_requests_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"channels|strength"):
        plant_salience(build_transformer(blocks=1, heads=2, head_dim=16), **options)
