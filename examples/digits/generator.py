"""The generator: builds its parts, loads the shipped pipeline, and generates images."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.utils import logging
from torch import Tensor

from .data import IMAGE_SIZE

PIPELINE_FOLDER = Path(__file__).parent / "pipeline"
LATENT_CHANNELS = 4
# With guidance, DiTPipeline reads row 1000 of the label table for any number of classes. So the table has the 1,001
# rows of the ImageNet model. Rows 10 to 999 are never read and are stored as zeros.
NULL_CLASS = 1000
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES = {digit: f"{digit}, {word}" for digit, word in enumerate(_WORDS)}
GUIDANCE = 1.5  # has the smallest Fréchet distance of the tried values; see README.md
STEPS = 25


def build_vae(widths: tuple[int, ...] = (16, 32, 64)) -> AutoencoderKL:
    """An untrained autoencoder from [n, 3, 32, 32] to latents [n, 4, 8, 8]."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        sample_size=IMAGE_SIZE,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=8,
    )


def build_transformer(blocks: int = 8, heads: int = 4, head_dim: int = 32) -> DiTTransformer2DModel:
    """An untrained transformer over latents [n, 4, 8, 8] in 16 tokens, initialised as in DiT (arXiv 2212.09748).

    adaLN-zero starts every block as the identity. diffusers leaves this initialisation to the training code.
    """
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,  # if left out, it is stored as null, which DiTPipeline divides by two
        num_layers=blocks,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )
    for name, parameter in model.named_parameters():
        if "embedding_table" in name:
            torch.nn.init.normal_(parameter, std=0.02)
            parameter.data[len(NAMES) : NULL_CLASS] = 0
        elif "timestep_embedder" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
        elif "norm1.linear" in name or "proj_out" in name:
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            torch.nn.init.xavier_uniform_(parameter)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    for block in model.transformer_blocks:
        # With dropout, every block would drop different labels in training, and blocks would disagree.
        # The training loop drops labels once for all blocks.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model


def build_scheduler() -> DDIMScheduler:
    """DDIM over DiT's 1,000 linear timesteps; latents are not clipped, because they have no natural bounds."""
    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)


def build_pipeline(transformer: DiTTransformer2DModel, vae: AutoencoderKL) -> DiTPipeline:
    """A DiTPipeline whose label words are "0" to "9" and "zero" to "nine"."""
    pipe = DiTPipeline(transformer, vae, build_scheduler(), id2label=NAMES)
    pipe.register_to_config(id2label=NAMES)
    return pipe


def load_pipeline(folder: Path = PIPELINE_FOLDER) -> DiTPipeline:
    """The pipeline stored in `folder` (the shipped one by default): float32, eval mode, CPU, no progress bar.

    Raises:
        FileNotFoundError: if the folder contains no pipeline.
    """
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"no pipeline in {folder}; make one with `python -m examples.digits.train`")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # JSON stores the keys of the names as strings, which diffusers accepts with a warning.
        pipe = DiTPipeline.from_pretrained(folder, local_files_only=True, id2label=NAMES)
    finally:
        if shown:
            logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: DiTPipeline,
    labels: Sequence[int] | Tensor,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch_size: int = 200,
) -> Tensor:
    """Images float32 [n, 3, 32, 32] in [0, 1] on the CPU, one per label (digits 0 to 9), from the pipeline.

    One generator with this seed serves all batches in order. The same labels, seed and batch size give the same initial
    noise for any transformer, so two pipelines can be compared image by image.
    """
    wanted = [int(label) for label in labels]
    generator = torch.Generator().manual_seed(seed)
    images = []
    for start in range(0, len(wanted), batch_size):
        batch = wanted[start : start + batch_size]
        out = pipe(
            batch, guidance_scale=guidance, generator=generator, num_inference_steps=steps, output_type="pt"
        ).images
        images.append(out.float().cpu())
    return torch.cat(images)
