"""Models like FLUX and PixArt with random weights and planted salience, and calls of them along a schedule.

Modulations of a trained model change with the timestep. Those of random weights hardly do, so the linears that compute
them are scaled up. The singular values of random weights fall about as those of the digits model: the largest quarter
has 63 % of the energy of a square weight, and 65 to 67 % in the digits model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from examples.digits.salience import _divide_columns, _scale_rows
from fxquant.testing.models import example_call, tiny_flux, tiny_pixart

WIDTH = 128
CHANNELS = 8
STRENGTH = (8.0, 40.0)
"""Salient channels at each place and the smallest and largest factor, as :func:`examples.digits.plant_salience`."""

_GAIN = 4.0  # Of the linears that compute modulations.
_HEADS = {"attention_head_dim": 32, "num_attention_heads": 4}


@torch.no_grad()
def flux_like() -> nn.Module:
    """A FLUX of two double and two single blocks, width 128, with salient channels at every place of its blocks."""
    model = tiny_flux(2, **_HEADS, axes_dims_rope=(8, 12, 12))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "blocks" in name and ".norm" in name:
            module.weight.mul_(_GAIN)
    _plant_flux(model)
    return model


@torch.no_grad()
def pixart_like() -> nn.Module:
    """A PixArt of four blocks, width 128, with salient channels in front of q, k, v and feed-forwards and behind v.

    All blocks of PixArt share one modulation vector, so the salient channels before q, k, v and the feed-forward are
    the same in all blocks.
    """
    model: Any = tiny_pixart(4, **_HEADS, cross_attention_dim=WIDTH)
    model.adaln_single.linear.weight.mul_(_GAIN)
    _plant_pixart(model)
    return model


def calls(model: nn.Module, timesteps: Sequence[float], seed: int, batch: int = 8) -> list[dict[str, Any]]:
    """One call per timestep: samples whose share of noise falls with the timestep, the same ones at each."""
    pattern = example_call(model, batch=batch, seed=seed)["hidden_states"]
    fixed = {**example_call(model, batch=batch, seed=seed)}
    found = []
    for number, step in enumerate(timesteps):
        call = example_call(model, batch=batch, timestep=step, seed=seed + 1 + number)
        noise = call["hidden_states"]
        share = step / 1000
        changed = {"hidden_states": share * noise + (1 - share) * _smooth(pattern), "timestep": call["timestep"]}
        found.append({**fixed, **changed})
    return found


def _smooth(pattern: Tensor) -> Tensor:
    """Large structures, as images have: the mean over neighbours, scaled back to the variance of noise."""
    tokens = pattern.ndim == 3
    images = pattern.transpose(1, 2).unflatten(-1, (8, 8)) if tokens else pattern
    images = nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False) * 2.5
    return images.flatten(2).transpose(1, 2).contiguous() if tokens else images


def _drawn(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Salient channels and their factors."""
    low, high = STRENGTH
    channels = torch.randperm(WIDTH, generator=generator)[:CHANNELS]
    return channels, low * (high / low) ** torch.rand(CHANNELS, generator=generator, dtype=torch.float64)


def _modulated(linear: nn.Linear, shift: int, scale: int, channels: Tensor, factor: Tensor) -> None:
    """Multiply channels of ``LN(h) (1 + scale) + shift`` by a factor through the linear that computes both."""
    _scale_rows(linear, shift * WIDTH + channels, factor)
    rows = scale * WIDTH + channels
    bias = linear.bias[rows].double()
    _scale_rows(linear, rows, factor)
    linear.bias[rows] = (factor * (bias + 1) - 1).to(linear.bias.dtype)


def _plant_flux(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for block in model.transformer_blocks:
        attention = block.attn
        streams = (
            (block.norm1, ("to_q", "to_k", "to_v"), block.ff),
            (block.norm1_context, ("add_q_proj", "add_k_proj", "add_v_proj"), block.ff_context),
        )
        for norm, names, feed_forward in streams:
            for shift, scale, readers in (
                (0, 1, [getattr(attention, name) for name in names]),
                (3, 4, [feed_forward.net[0].proj]),
            ):
                channels, factor = _drawn(generator)
                _modulated(norm.linear, shift, scale, channels, factor)
                _divide_columns(readers, channels, factor)
        channels, factor = _drawn(generator)  # One attention serves both streams.
        for value in (attention.to_v, attention.add_v_proj):
            _scale_rows(value, channels, factor)
        _divide_columns([attention.to_out[0], attention.to_add_out], channels, factor)
    for block in model.single_transformer_blocks:
        attention = block.attn
        channels, factor = _drawn(generator)
        _modulated(block.norm.linear, 0, 1, channels, factor)
        _divide_columns([attention.to_q, attention.to_k, attention.to_v, block.proj_mlp], channels, factor)
        channels, factor = _drawn(generator)
        _scale_rows(attention.to_v, channels, factor)
        _divide_columns([block.proj_out], channels, factor)


def _plant_pixart(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = model.transformer_blocks
    for shift, scale, readers_of in (
        (0, 1, lambda block: [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]),
        (3, 4, lambda block: [block.ff.net[0].proj]),
    ):
        channels, factor = _drawn(generator)
        for part in (shift, scale):  # 1 + table + vector is scaled as a whole, and the 1 lies in the table.
            _scale_rows(model.adaln_single.linear, part * WIDTH + channels, factor)
        for block in blocks:
            table = block.scale_shift_table
            table[shift, channels] = (table[shift, channels].double() * factor).to(table.dtype)
            table[scale, channels] = ((table[scale, channels].double() + 1) * factor - 1).to(table.dtype)
            _divide_columns(readers_of(block), channels, factor)
    for block in blocks:
        for attention in (block.attn1, block.attn2):
            channels, factor = _drawn(generator)
            _scale_rows(attention.to_v, channels, factor)
            _divide_columns([attention.to_out[0]], channels, factor)
