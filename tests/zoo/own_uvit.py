"""A U-ViT for the zoo: the timestep and the class are tokens, and late blocks read what early blocks returned."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """Feed-forward network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return out


class Attention(nn.Module):
    """Attention written out, with q, k and v in one linear without bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))
        out: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        return out


class Block(nn.Module):
    """A pre-norm block; a late one first joins its input with that of an early one."""

    def __init__(self, width: int, heads: int, late: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), Mlp(width)
        self.skip_linear = nn.Linear(2 * width, width) if late else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class OwnUViT(nn.Module):
    """A U-ViT with one early, one middle and one late block."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.width = width
        self.proj = nn.Conv2d(4, width, kernel_size=2, stride=2)
        self.label_emb = nn.Embedding(10, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + 16, width))
        self.in_blocks = nn.ModuleList([Block(width, heads)])
        self.mid_block = Block(width, heads)
        self.out_blocks = nn.ModuleList([Block(width, heads, late=True)])
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, 2 * 2 * 4)
        self.final_layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        _, length, width = tokens.shape
        angles = timesteps[:, None].to(x.dtype) * torch.exp(-torch.arange(width // 2, device=x.device, dtype=x.dtype))
        time = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).unsqueeze(dim=1)
        tokens = torch.cat((time, self.label_emb(y).unsqueeze(dim=1), tokens), dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            tokens = block(tokens)
            skips.append(tokens)
        tokens = self.mid_block(tokens)
        for block in self.out_blocks:
            tokens = block(tokens, skips.pop())
        tokens = self.decoder_pred(self.norm(tokens))[:, -length:, :]
        side = int(length**0.5)
        image = tokens.reshape(-1, side, side, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(-1, 4, 2 * side, 2 * side)
        out: Tensor = self.final_layer(image)
        return out
