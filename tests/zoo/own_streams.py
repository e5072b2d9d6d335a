"""A transformer of two streams for the zoo, with the forms of code that authors of such models publish."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rope(positions: Tensor, width: int) -> Tensor:
    """Rotations as matrices ``[batch, tokens, width / 2, 2, 2]``, made in float64."""
    scale = torch.arange(0, width, 2, dtype=torch.float64) / width
    angles = positions.to(torch.float64)[..., None] * 10000.0**-scale
    rows = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1)
    return rows.unflatten(-1, (2, 2))


def apply_rope(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate ``[batch, heads, tokens, width]``."""
    pairs = x.reshape(*x.shape[:-1], -1, 1, 2)
    return (turn[..., 0].to(x.dtype) * pairs[..., 0] + turn[..., 1].to(x.dtype) * pairs[..., 1]).reshape(x.shape)


def attention(q: Tensor, k: Tensor, v: Tensor, turn: Tensor) -> Tensor:
    """Attention of ``[batch, heads, tokens, width]``, with the heads merged again."""
    y = F.scaled_dot_product_attention(apply_rope(q, turn), apply_rope(k, turn), v)
    return y.permute(0, 2, 1, 3).flatten(2)


class QKNorm(nn.Module):
    """RMS norms of q and k, per head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._norm(q) * self.query, self._norm(k) * self.key

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


@dataclass
class Modulated:
    """One shift, scale and gate."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (1 + self.scale) * x + self.shift


class Modulation(nn.Module):
    """Shifts, scales and gates of a block from the vector of the conditions."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.number, self.lin = number, nn.Linear(width, 3 * number * width)

    def forward(self, vec: Tensor) -> list[Modulated]:
        parts = self.lin(F.silu(vec))[:, None, :].chunk(3 * self.number, dim=-1)
        return [Modulated(*parts[3 * place : 3 * place + 3]) for place in range(self.number)]


class Stream(nn.Module):
    """What a block of two streams has for each of them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mod = Modulation(width, 2)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.qk = QKNorm(width // heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))

    def read(self, x: Tensor, first: Modulated) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized q, k, and v, ``[batch, heads, tokens, width]``."""
        qkv = self.qkv(first(self.norm1(x))).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return (*self.qk(qkv[0], qkv[1]), qkv[2])

    def write(self, x: Tensor, y: Tensor, first: Modulated, second: Modulated) -> Tensor:
        """Add the attention ``y`` and the feed-forward network."""
        x = x + first.gate * self.proj(y)
        return x + second.gate * self.mlp(second(self.norm2(x)))


class DoubleBlock(nn.Module):
    """Joint attention of prompt and image, with weights for each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.img, self.txt = Stream(width, heads), Stream(width, heads)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        img_mods, txt_mods = self.img.mod(vec), self.txt.mod(vec)
        pairs = zip(self.txt.read(txt, txt_mods[0]), self.img.read(img, img_mods[0]), strict=True)
        y = attention(*(torch.cat(pair, dim=2) for pair in pairs), turn)
        length = txt.shape[1]
        return self.img.write(img, y[:, length:], *img_mods), self.txt.write(txt, y[:, :length], *txt_mods)


class SingleBlock(nn.Module):
    """q, k, v and the feed-forward network in one linear, and their outputs in one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.linear1, self.linear2 = nn.Linear(width, 5 * width), nn.Linear(3 * width, width)
        self.norm, self.pre_norm = QKNorm(width // heads), nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = Modulation(width, 1)

    def forward(self, x: Tensor, vec: Tensor, turn: Tensor) -> Tensor:
        (mod,) = self.modulation(vec)
        qkv, mlp = torch.split(self.linear1(mod(self.pre_norm(x))), [3 * self.width, 2 * self.width], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = attention(*self.norm(q, k), v, turn)
        return x + mod.gate * self.linear2(torch.cat((y, F.gelu(mlp, approximate="tanh")), 2))


class OwnStreams(nn.Module):
    """Blocks of two streams, then of one, over packed latents with positions ``[batch, tokens, 2]``."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.axis = width // heads // 2
        self.img_in, self.txt_in = nn.Linear(4, width), nn.Linear(12, width)
        self.time_in = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.vector_in = nn.Sequential(nn.Linear(10, width), nn.SiLU(), nn.Linear(width, width))
        self.double_blocks = nn.ModuleList([DoubleBlock(width, heads)])
        self.single_blocks = nn.ModuleList([SingleBlock(width, heads)])
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, 4)

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor
    ) -> Tensor:
        if img.ndim != 3 or txt.ndim != 3:
            raise ValueError("image and prompt must have three axes")
        scale = torch.exp(-math.log(10000) * torch.arange(8, dtype=torch.float32) / 8).to(timesteps.device)
        angles = (1000.0 * timesteps)[:, None] * scale[None]
        vec = self.time_in(torch.cat([angles.cos(), angles.sin()], dim=-1).to(img.dtype)) + self.vector_in(y)
        ids = torch.cat((txt_ids, img_ids), dim=1)
        turn = torch.cat([rope(ids[..., axis], self.axis) for axis in range(2)], dim=-3).unsqueeze(1)
        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, turn)
        both = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            both = block(both, vec, turn)
        img = both[:, txt.shape[1] :, ...]
        shift, scale = self.modulation(vec).chunk(2, dim=1)
        out: Tensor = self.linear((1 + scale[:, None, :]) * self.norm_final(img) + shift[:, None, :])
        return out
