"""Planted salience: a transform that keeps the function of a model and makes the model hard to quantize.

Large diffusion transformers have a few channels whose activations are much larger than the rest, by a factor that
changes with the timestep (PTQ4DiT, arXiv 2405.16005, figures 3 and 4). A small model does not develop such channels. So
tests of methods that handle them plant them: they are difficult for a quantizer and have no effect in full precision.
"""

import copy
from collections.abc import Iterable

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

# Order of the chunks of AdaLayerNormZero.linear.
SHIFT_MSA, SCALE_MSA, GATE_MSA, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)


@torch.no_grad()
def modulation(block: BasicTransformerBlock, timesteps: Tensor, labels: Tensor) -> Tensor:
    """The output of a block's adaLN layer, [n, 6, width], for n timesteps and n labels."""
    norm = block.norm1
    embedded = norm.emb(timesteps, labels, hidden_dtype=norm.linear.weight.dtype)
    return norm.linear(norm.silu(embedded)).unflatten(1, (6, -1))


def _most_varying(block: BasicTransformerBlock, shift: int, scale: int, count: int) -> Tensor:
    """The `count` channels whose size, averaged over labels, has the widest range over the timesteps.

    The size of a channel at a timestep is sqrt((1 + scale)^2 + shift^2), since the mean square of LN(h) is 1.
    """
    timesteps, classes = torch.arange(0, 1000, 25), torch.arange(min(10, block.norm1.emb.class_embedder.num_classes))
    device = block.norm1.linear.weight.device
    grid = torch.cartesian_prod(timesteps, classes).to(device)
    parts = modulation(block, grid[:, 0], grid[:, 1]).double()
    size = ((1 + parts[:, scale]).square() + parts[:, shift].square()).sqrt()
    size = size.unflatten(0, (len(timesteps), len(classes))).mean(dim=1)
    return (size.amax(dim=0) - size.amin(dim=0)).topk(count).indices


def _scale_rows(linear: nn.Linear, rows: Tensor, factor: Tensor) -> None:
    """Multiply weight and bias of output channels `rows` by `factor` in float64; cast the result once."""
    linear.weight[rows] = (linear.weight[rows].double() * factor[:, None]).to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias[rows] = (linear.bias[rows].double() * factor).to(linear.bias.dtype)


def _divide_columns(linears: Iterable[nn.Linear], columns: Tensor, factor: Tensor) -> None:
    """Divide input channels `columns` by `factor` in float64; cast the result once."""
    for linear in linears:
        linear.weight[:, columns] = (linear.weight[:, columns].double() / factor).to(linear.weight.dtype)


def _scale_modulated(linear: nn.Linear, shift: int, scale: int, channels: Tensor, factor: Tensor) -> None:
    """Multiply channels of LN(h) * (1 + scale) + shift by `factor` through the layer that makes scale and shift.

    a * (LN(h) * (1 + W_s e + b_s) + shift) = LN(h) * (1 + a W_s e + (a (b_s + 1) - 1)) + a * shift.
    """
    width = linear.out_features // 6
    _scale_rows(linear, shift * width + channels, factor)
    rows = scale * width + channels
    bias = linear.bias[rows].double()
    _scale_rows(linear, rows, factor)
    linear.bias[rows] = (factor * (bias + 1) - 1).to(linear.bias.dtype)


@torch.no_grad()
def plant_salience(
    transformer: DiTTransformer2DModel,
    *,
    channels: int = 8,
    strength: tuple[float, float] = (8.0, 40.0),
    seed: int = 0,
) -> DiTTransformer2DModel:
    """A copy of `transformer` that computes the same function with salient, timestep-dependent channels in every block.

    In each block, with a factor a per chosen channel:

        x = LN(h) * (1 + scale(t)) + shift(t)     channels of x times a    (in the adaLN layer)
        q, k, v = W x    or    ff = W x           columns of W over a
        attention output = W_o (P v)              channels of v times a, columns of W_o over a

    The identity is exact in real arithmetic. The inputs of q/k/v and of the first feed-forward layer use the channels
    whose modulation changes most over the timesteps; v, which no timestep modulates, uses channels drawn at random.

    Args:
        transformer: any DiTTransformer2DModel; it is not changed.
        channels: salient channels at each of the three places of a block.
        strength: smallest and largest factor a; factors are log-uniform between them.
        seed: seed of the factors and of the channels of v.

    Raises:
        ValueError: if the number of channels is not between 1 and the width, or `strength` violates 0 < low <= high.
    """
    width, (low, high) = transformer.inner_dim, strength
    if not 1 <= channels <= width:
        raise ValueError(f"channels={channels}; a transformer of width {width} takes 1 to {width}")
    if not 0 < low <= high:
        raise ValueError(f"strength={strength}; it must be (low, high) with 0 < low <= high")
    generator = torch.Generator().manual_seed(seed)
    planted = copy.deepcopy(transformer)
    device = planted.proj_out_2.weight.device

    def factors() -> Tensor:
        logs = torch.rand(channels, generator=generator, dtype=torch.float64)
        return (low * (high / low) ** logs).to(device)

    for block in planted.transformer_blocks:
        attention, adaln = block.attn1, block.norm1.linear
        places = (
            (SHIFT_MSA, SCALE_MSA, (attention.to_q, attention.to_k, attention.to_v)),
            (SHIFT_MLP, SCALE_MLP, (block.ff.net[0].proj,)),
        )
        for shift, scale, readers in places:
            chosen, factor = _most_varying(block, shift, scale, channels), factors()
            _scale_modulated(adaln, shift, scale, chosen, factor)
            _divide_columns(readers, chosen, factor)
        chosen, factor = torch.randperm(width, generator=generator)[:channels].to(device), factors()
        _scale_rows(attention.to_v, chosen, factor)
        _divide_columns([attention.to_out[0]], chosen, factor)
    return planted
