"""Batches that are shared over processes have the noise that they have in one process."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, EulerAncestralDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from fxquant.calibration.noise import Draws
from fxquant.calibration.pipeline_calls import calibration_call
from fxquant.errors import CalibrationError, ConfigurationError
from tests.tiny import make_dit

SAMPLES = 35  # Four whole batches and one of three samples.


class Pipeline(DiffusionPipeline):
    """Gives its generator to its scheduler, as most pipelines do."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, class_labels, num_inference_steps=2, generator=None):
        latents = randn_tensor((len(class_labels), 4, 8, 8), generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = latents * self.scheduler.init_noise_sigma
        for step in self.scheduler.timesteps:
            given = self.scheduler.scale_model_input(latents, step)
            labels, times = torch.tensor(class_labels), torch.full((len(latents),), int(step))
            noise = self.transformer(given, timestep=times, class_labels=labels).sample[:, :4]
            latents = self.scheduler.step(noise, step, latents, generator=generator).prev_sample


def make_pipeline(scheduler=DDIMScheduler):
    return Pipeline(make_dit(), scheduler())


class Noisy(DDIMScheduler):
    """Draws noise of several kinds in each step."""

    def step(self, *args, generator=None, **kwargs):
        torch.empty(3).uniform_(generator=generator)
        torch.randint(0, 9, (2, 2), generator=generator)
        return super().step(*args, generator=generator, **kwargs)


class Whimsical(DDIMScheduler):
    """Draws noise if the model returns something else than zeros."""

    def step(self, output, *args, generator=None, **kwargs):
        if output.abs().max() > 0:
            torch.randn(3, generator=generator)
        return super().step(output, *args, generator=generator, **kwargs)


def calls(pipe, share=(0, 1), samples=SAMPLES):
    """All calls of the model."""
    calibrate, seen = calibration_call(pipe, samples=samples, steps=2, share=share), []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0].clone(), kwargs["class_labels"].clone())), with_kwargs=True
    )
    calibrate()
    handle.remove()
    return seen


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, Noisy])
@pytest.mark.parametrize("size", [2, 4, 5])
def test_noise_is_that_of_one_process(scheduler, size):
    pipe = make_pipeline(scheduler)
    alone = calls(pipe)
    together = [call for rank in range(size) for call in calls(pipe, (rank, size))]
    assert len(alone) == len(together) == 2 * 5
    for one, other in zip(alone, together, strict=True):
        assert all(map(torch.equal, one, other))


def test_model_is_as_before():
    pipe = make_pipeline()
    calibration_call(pipe, samples=16, steps=1, share=(1, 2))
    assert "forward" not in vars(pipe.transformer)


def test_noise_that_depends_on_the_model_is_refused():
    pipe = make_pipeline(Whimsical)
    calls(pipe, samples=16)
    with pytest.raises(CalibrationError, match="depends on what its models return"):
        calls(pipe, (1, 2), samples=16)


@pytest.mark.parametrize(("samples", "size", "least"), [(8, 2, 9), (16, 4, 25), (1, 3, 17)])
def test_too_few_batches(samples, size, least):
    with pytest.raises(ConfigurationError, match=f"for {size} processes; give at least {least} samples"):
        calibration_call(make_pipeline(), samples=samples, share=(0, size))
    calibration_call(make_pipeline(), samples=least, share=(0, size))


def test_draws_of_another_generator_are_not_recorded():
    ours, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    with Draws(ours) as draws:
        torch.randn(5, generator=other)
        torch.randn(7, generator=ours)
    draws.repeat(other)
    after = torch.Generator().manual_seed(0)
    torch.randn(5, generator=after)
    torch.randn(7, generator=after)
    assert torch.equal(other.get_state(), after.get_state())
