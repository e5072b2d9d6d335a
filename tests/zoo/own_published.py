"""Transformers for the zoo with the code of the first published DiT and MMDiT, with a method for guided sampling."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimmAttention(nn.Module):
    """Attention as in timm: one linear for q, k and v, norms that may be identities, and dropouts that do nothing."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False, fused: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = heads, width // heads, fused
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * width, bias=True)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(0.0), nn.Linear(width, width), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            y = self.attn_drop(scores.softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(batch, tokens, width)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift ``[batch, tokens, width]`` by rows ``[batch, width]``."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def mlp(width: int) -> nn.Sequential:
    """A feed-forward network with dropouts, as in timm."""
    return nn.Sequential(
        nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Dropout(0.0), nn.Identity(),
        nn.Linear(2 * width, width), nn.Dropout(0.0),
    )  # fmt: skip


class TimestepEmbedder(nn.Module):
    """Embeds timesteps ``[batch]``."""

    def __init__(self, width: int, frequencies: int = 9) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    @staticmethod
    def timestep_embedding(t: Tensor, dim: int, max_period: int = 10000) -> Tensor:
        """Sines and cosines ``[batch, dim]``, with a zero at the end if ``dim`` is odd."""
        half = dim // 2
        rates = torch.exp(-math.log(max_period) * torch.arange(start=0, end=half, dtype=torch.float32) / half)
        angles = t[:, None].float() * rates.to(device=t.device)[None]
        found = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        return torch.cat([found, torch.zeros_like(found[:, :1])], dim=-1) if dim % 2 else found

    def forward(self, t: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.timestep_embedding(t, self.frequencies).to(self.mlp[0].weight.dtype))
        return out


class LabelEmbedder(nn.Module):
    """Embeds labels; in training some are replaced by the one without a class."""

    def __init__(self, classes: int, width: int, dropout_prob: float = 0.1) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + (dropout_prob > 0), width)
        self.num_classes, self.dropout_prob = classes, dropout_prob

    def forward(self, labels: Tensor, train: bool, force_drop_ids: Tensor | None = None) -> Tensor:
        if (train and self.dropout_prob > 0) or force_drop_ids is not None:
            dropped = torch.rand(labels.shape[0]) < self.dropout_prob if force_drop_ids is None else force_drop_ids == 1
            labels = torch.where(dropped, self.num_classes, labels)
        out: Tensor = self.embedding_table(labels)
        return out


class Block(nn.Module):
    """adaLN-Zero block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn, self.mlp = TimmAttention(width, heads), mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class PublishedDiT(nn.Module):
    """A DiT for images of one size that learns sigma, with guidance in ``forward_with_cfg``.

    It keeps the arguments of its constructor in ``config``, and ``from_config`` makes it again.
    """

    def __init__(self, input_size: int = 8, width: int = 16, depth: int = 2, heads: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.config = {"input_size": input_size, "width": width, "depth": depth, "heads": heads, "classes": classes}
        self.in_channels, self.out_channels, self.patch_size = 4, 8, 2
        self.x_embedder = nn.Conv2d(self.in_channels, width, kernel_size=2, stride=2)
        self.t_embedder, self.y_embedder = TimestepEmbedder(width), LabelEmbedder(classes, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, (input_size // 2) ** 2, width), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, 2 * 2 * self.out_channels)

    @classmethod
    def from_config(cls, config: dict[str, Any], **others: Any) -> PublishedDiT:
        """Make a model without trained weights."""
        return cls(**config, **others)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens as an image ``[batch, channels, height, width]``."""
        h = w = int(x.shape[1] ** 0.5)
        assert h * w == x.shape[1]
        x = x.reshape(shape=(x.shape[0], h, w, self.patch_size, self.patch_size, self.out_channels))
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(shape=(x.shape[0], self.out_channels, h * self.patch_size, w * self.patch_size))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.unpatchify(self.linear(modulate(self.norm_final(x), shift, scale)))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Noise guided away from that of the second half of the labels, for both halves of a batch."""
        half = x[: len(x) // 2]
        found = self.forward(torch.cat([half, half], dim=0), t, y)
        eps, rest = found[:, : self.in_channels], found[:, self.in_channels :]
        cond, uncond = torch.split(eps, len(eps) // 2, dim=0)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided], dim=0), rest], dim=1)


class RMSNorm(nn.Module):
    """RMS norm of the last axis, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(torch.mean(x**2, dim=-1, keepdim=True) + 1e-6)
        return normed * self.weight.to(device=x.device, dtype=x.dtype)


class Side(nn.Module):
    """Half of a joint block, in two methods: before and after the attention that both halves share."""

    def __init__(self, width: int, heads: int, pre_only: bool) -> None:
        super().__init__()
        self.heads, self.pre_only = heads, pre_only
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.ln_q, self.ln_k = RMSNorm(width // heads), RMSNorm(width // heads)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (2 if pre_only else 6) * width))
        if not pre_only:
            self.proj, self.mlp = nn.Linear(width, width), mlp(width)
            self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def pre_attention(self, x: Tensor, c: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """q, k and v ``[batch, tokens, heads, width / heads]``, and what the other method needs."""
        shift, scale, *rest = self.adaLN_modulation(c).chunk(2 if self.pre_only else 6, dim=1)
        qkv = self.qkv(modulate(self.norm1(x), shift, scale))
        q, k, v = qkv.reshape(qkv.shape[0], qkv.shape[1], 3, self.heads, -1).movedim(2, 0)
        return (self.ln_q(q), self.ln_k(k), v), (x, *rest)

    def post_attention(self, y: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """The tokens after attention and the feed-forward network."""
        x, gate_msa, shift_mlp, scale_mlp, gate_mlp = kept
        x = x + gate_msa.unsqueeze(1) * self.proj(y)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


def joint(context: Tensor, x: Tensor, c: Tensor, context_side: Side, x_side: Side) -> tuple[Tensor | None, Tensor]:
    """Attention of the prompt and the image together; the last block makes no prompt."""
    context_qkv, context_kept = context_side.pre_attention(context, c)
    x_qkv, x_kept = x_side.pre_attention(x, c)
    q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(context_qkv, x_qkv, strict=True))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False)
    y = y.transpose(1, 2).reshape(x.shape[0], -1, x.shape[-1])
    context_y, x_y = y[:, : context.shape[1]], y[:, context.shape[1] :]
    made = None if context_side.pre_only else context_side.post_attention(context_y, context_kept)
    return made, x_side.post_attention(x_y, x_kept)


class PublishedMMDiT(nn.Module):
    """Joint blocks over an image and a prompt, with positions cropped from a larger table."""

    def __init__(self, width: int = 16, depth: int = 2, heads: int = 2, table: int = 6) -> None:
        super().__init__()
        self.table = table
        self.x_embedder, self.context_embedder = nn.Conv2d(4, width, 2, stride=2), nn.Linear(12, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.Sequential(nn.Linear(10, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("pos_embed", torch.randn(1, table * table, width))
        self.context_sides = nn.ModuleList([Side(width, heads, pre_only=n == depth - 1) for n in range(depth)])
        self.x_sides = nn.ModuleList([Side(width, heads, pre_only=False) for _ in range(depth)])
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, 2 * 2 * 4)

    def cropped_pos_embed(self, height: int, width: int) -> Tensor:
        """The middle of the table of positions."""
        top, left = (self.table - height) // 2, (self.table - width) // 2
        grid = self.pos_embed.reshape(1, self.table, self.table, self.pos_embed.shape[-1])
        return grid[:, top : top + height, left : left + width, :].flatten(1, 2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.cropped_pos_embed(h, w)
        c = self.t_embedder(t)
        if y is not None:
            c = c + self.y_embedder(y)
        assert context is not None
        context = self.context_embedder(context)
        for context_side, x_side in zip(self.context_sides, self.x_sides, strict=True):
            context, x = joint(context, x, c, context_side, x_side)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        x = self.linear(modulate(self.norm_final(x), shift, scale)).reshape(x.shape[0], h, w, 2, 2, 4)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], 4, 2 * h, 2 * w)
