"""A video transformer for the zoo, written like the code that authors of such models publish."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rope_table(length: int, width: int) -> Tensor:
    """Rotations ``[length, width / 2]`` as complex numbers."""
    angles = torch.outer(torch.arange(length), 10000.0 ** -(torch.arange(0, width, 2) / width))
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, sizes: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
    """Rotate ``[batch, tokens, heads, width]``, sample by sample, each by the positions of its own grid."""
    outputs = []
    for sample, (frames, height, width) in zip(x, sizes.tolist(), strict=True):
        count = frames * height * width
        numbers = torch.view_as_complex(sample[:count].to(torch.float64).unflatten(-1, (-1, 2)))
        grid = [
            tables[0][:frames].view(frames, 1, 1, -1).expand(frames, height, width, -1),
            tables[1][:height].view(1, height, 1, -1).expand(frames, height, width, -1),
            tables[2][:width].view(1, 1, width, -1).expand(frames, height, width, -1),
        ]
        rotated = torch.view_as_real(numbers * torch.cat(grid, dim=-1).reshape(count, 1, -1)).flatten(2)
        outputs.append(torch.cat([rotated.type_as(x), sample[count:]]))
    return torch.stack(outputs)


class RMSNorm(nn.Module):
    """RMS norm over all heads, computed in float32 or wider."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


class Attention(nn.Module):
    """Attention with q and k normalized over all heads; to the tokens themselves or to a context."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(width), RMSNorm(width)

    def forward(
        self, x: Tensor, context: Tensor, sizes: Tensor | None = None, tables: tuple[Tensor, ...] = ()
    ) -> Tensor:
        batch, shape = len(x), (len(x), -1, self.heads, x.shape[-1] // self.heads)
        q, k = self.norm_q(self.q(x)).view(*shape), self.norm_k(self.k(context)).view(*shape)
        if sizes is not None:
            q, k = rotate(q, sizes, tables), rotate(k, sizes, tables)
        v = self.v(context).view(*shape)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out: Tensor = self.o(y.transpose(1, 2).reshape(batch, -1, x.shape[-1]))
        return out


class Block(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, modulated by one vector for all blocks."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm3 = nn.LayerNorm(width)
        self.self_attn, self.cross_attn = Attention(width, heads), Attention(width, heads)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def forward(self, x: Tensor, e: Tensor, context: Tensor, sizes: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        e = (self.modulation + e).chunk(6, dim=1)
        normed = self.norm1(x) * (1 + e[1]) + e[0]
        x = x + self.self_attn(normed, normed, sizes, tables) * e[2]
        x = x + self.cross_attn(self.norm3(x), context)
        return x + self.ffn(self.norm2(x) * (1 + e[4]) + e[3]) * e[5]


class OwnVideoDiT(nn.Module):
    """Takes a list of videos and a list of prompts, pads both, and returns a list of videos.

    Rotations are complex numbers that the model keeps in an attribute, as published models do.
    """

    def __init__(self, width: int = 24, depth: int = 2, heads: int = 2, text: int = 8) -> None:
        super().__init__()
        self.width, self.text = width, text
        self.patch_embedding = nn.Conv3d(4, width, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(16, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))
        self.time_embedding = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.head = nn.Linear(width, 4 * 4)
        part = 2 * (width // heads // 6)
        self.tables = tuple(rope_table(32, size) for size in (width // heads - 2 * part, part, part))

    def forward(self, x: list[Tensor], t: Tensor, context: list[Tensor], seq_len: int) -> list[Tensor]:
        patches = [self.patch_embedding(video[None]) for video in x]
        sizes = torch.stack([torch.tensor(video.shape[2:]) for video in patches])
        tokens = [video.flatten(2).transpose(1, 2) for video in patches]
        hidden = torch.cat([F.pad(one, (0, 0, 0, seq_len - one.shape[1])) for one in tokens])
        angles = t.to(hidden.dtype)[:, None] * 10000.0 ** -(torch.arange(8, dtype=hidden.dtype) / 8)
        e = self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=1))
        each = self.time_projection(e).unflatten(1, (6, self.width))
        prompts = torch.stack([torch.cat([one, one.new_zeros(self.text - len(one), one.shape[1])]) for one in context])
        prompts = self.text_embedding(prompts)
        for block in self.blocks:
            hidden = block(hidden, each, prompts, sizes, self.tables)
        shift, scale = (self.modulation + e[:, None]).chunk(2, dim=1)
        hidden = self.head(self.norm(hidden) * (1 + scale) + shift)
        videos = []
        for one, (frames, height, width) in zip(hidden, sizes.tolist(), strict=True):
            parts = one[: frames * height * width].view(frames, height, width, 1, 2, 2, 4)
            videos.append(torch.einsum("fhwpqrc->cfphqwr", parts).reshape(4, frames, 2 * height, 2 * width))
        return videos
