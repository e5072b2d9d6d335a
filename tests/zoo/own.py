"""Transformers for the zoo that are not from diffusers, written like typical user code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedAttention(nn.Module):
    """Attention with q, k and v in one linear, split by reshape, permute and unbind."""

    def __init__(self, width: int, heads: int, explicit: bool) -> None:
        super().__init__()
        self.heads, self.explicit = heads, explicit
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        if self.explicit:
            y = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(batch, tokens, width))
        return out


class Block(nn.Module):
    """adaLN-Zero block."""

    def __init__(self, width: int, heads: int, explicit: bool, gated: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = FusedAttention(width, heads, explicit)
        self.gated = gated
        self.fc1 = nn.Linear(width, (2 if gated else 1) * 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(torch.addcmul(shift1, self.norm1(x), 1 + scale1))
        hidden = self.fc1(self.norm2(x) * (1 + scale2) + shift2)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        return x + gate2 * self.fc2(hidden)


class OwnDiT(nn.Module):
    """A class-conditional DiT in the style of the original code; returns a plain tensor."""

    def __init__(self, width: int = 16, depth: int = 2, heads: int = 2, explicit: bool = True, gated: bool = False):
        super().__init__()
        self.patch, self.width = 2, width
        self.x_embedder = nn.Conv2d(4, width, 2, stride=2)
        self.t_embedder = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width, heads, explicit, gated) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, self.patch**2 * 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        tokens = self.x_embedder(x).flatten(2).transpose(1, 2)
        frequencies = torch.exp(-torch.arange(4, device=x.device, dtype=x.dtype))
        angles = t.to(x.dtype)[:, None] * frequencies
        c = self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        tokens = self.linear(self.norm(tokens) * (1 + scale) + shift)
        parts = tokens.reshape(batch, height // 2, width // 2, 2, 2, 4)
        return torch.einsum("nhwpqc->nchpwq", parts).reshape(batch, 4, height, width)
