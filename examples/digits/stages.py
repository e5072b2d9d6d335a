"""Training objectives: one function per model, each returning a Stage."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from .data import augment
from .generator import NULL_CLASS
from .judge import DigitClassifier
from .trainer import Stage, step_generator

LABEL_DROPOUT = 0.1
# Weight per nat and image, relative to a mean squared error per value. It corresponds to decoder noise of about 0.06 on
# the scale [-1, 1].
KL_WEIGHT = 2e-6


def _batch(n: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(n, (size,), generator=generator)


def vae_stage(model: AutoencoderKL, images: Tensor, steps: int, batch: int = 64) -> Stage:
    """The autoencoder: squared error, absolute error, and a KL term that keeps the latents near a unit normal."""

    def loss(generator: torch.Generator) -> Tensor:
        x = augment(images[_batch(len(images), batch, generator)], generator)
        posterior = model.encode(x).latent_dist
        decoded = model.decode(posterior.sample(generator)).sample
        return F.mse_loss(decoded, x) + 0.1 * F.l1_loss(decoded, x) + KL_WEIGHT * posterior.kl().mean()

    return Stage("vae", model, loss, steps, learning_rate=2e-3, ema=0.99)


def classifier_stage(model: DigitClassifier, images: Tensor, labels: Tensor, steps: int, batch: int = 128) -> Stage:
    """The classifier: cross-entropy on augmented images."""

    def loss(generator: torch.Generator) -> Tensor:
        rows = _batch(len(images), batch, generator)
        return F.cross_entropy(model(augment(images[rows], generator)), labels[rows], label_smoothing=0.05)

    return Stage("classifier", model, loss, steps, learning_rate=2e-3, ema=0.99, weight_decay=0.01)


@torch.no_grad()
def encode_copies(vae: AutoencoderKL, images: Tensor, copies: int, seed: int) -> Tensor:
    """Posterior moments [copies, n, 8, 8, 8] of augmented copies, encoded once and not at every step."""
    encoded = []
    for copy in range(copies):
        x = augment(images, step_generator(seed, "copies", copy))
        encoded.append(torch.cat([vae.encode(part).latent_dist.parameters for part in x.split(256)]))
    return torch.stack(encoded)


def sampled_deviation(moments: Tensor) -> float:
    """The standard deviation of latents drawn from posteriors [..., 8, h, w], between and within posteriors."""
    mean, log_variance = moments.chunk(2, dim=-3)
    return (mean.var() + log_variance.exp().mean()).sqrt().item()


def transformer_stage(
    model: DiTTransformer2DModel,
    moments: Tensor,
    labels: Tensor,
    scaling: float,
    scheduler: DDIMScheduler,
    steps: int,
    batch: int = 128,
) -> Stage:
    """The transformer: DiT's noise prediction at uniform timesteps; a tenth of the labels become the null class."""
    copies, n = moments.shape[:2]

    def loss(generator: torch.Generator) -> Tensor:
        rows = _batch(n, batch, generator)
        mean, log_variance = moments[_batch(copies, batch, generator), rows].chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30, 20))
        latents = scaling * (mean + std * torch.randn(mean.shape, generator=generator))
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < LABEL_DROPOUT
        wanted = torch.where(dropped, NULL_CLASS, labels[rows])
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = model(noisy, timestep=timesteps, class_labels=wanted).sample
        return F.mse_loss(predicted, noise)

    return Stage("transformer", model, loss, steps, learning_rate=1e-3, warmup=200, ema=0.999)
