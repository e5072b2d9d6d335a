"""Random diffusion transformers with inputs, for property tests of passes. Each is determined by its seed.

Blocks of self-attention, attention to a text and a feed-forward unit, with adaLN or without. Norms, modulation, masks,
forms of attention, gated units, tied weights, convolutions and side branches vary. :func:`graphs` is a Hypothesis
strategy of them; Hypothesis is imported only there. Our own proof by fuzzing, in ``tests/fuzz``, uses the same models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import MissingPackageError
from fxquant.testing.models import STEPS

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

BATCH, TOKENS, TEXT, C, HEADS = 2, 3, 4, 8, 2

Call = dict[str, Any]


class Choices:
    """The random properties of one model."""

    def __init__(self, r: Random) -> None:
        self.depth = r.randint(1, 2)
        self.norm = r.choice(["layer", "layer", "affine", "rms"])
        self.modulation = r.choice(["vector", "shared", "tokens", "none"])
        self.attention = r.choice(["fused", "fused", "by hand", "in the batch", "einsum"])
        self.mask = r.choice(["bool", "finite", "infinite"])
        self.unit = r.choice(["gelu", "relu", "gated"])
        self.dropout = r.choice([None, None, None, "attention", "values", "evaluation"])
        self.tied = r.choice([None, None, "weights", "blocks", "norms"])
        self.text_reads = r.choice(["own norm", "first norm", "first norm"])
        self.side = r.choice([None, "linear", "residual", "gelu"])  # Reads the first norm too, in calls with `side`.
        self.bias = r.random() < 1 / 2
        self.mix = r.choice([None, None, "same", 1])  # Padding of a convolution before q, k and v.
        self.places = r.random() < 1 / 3  # A parameter per token, added before q, k and v.


class Block(nn.Module):
    """Self-attention, optional attention to a text, and a feed-forward unit."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.choices, bias = choices, choices.bias
        make: Callable[[], nn.Module] = {
            "layer": lambda: nn.LayerNorm(C, 0.1, elementwise_affine=False),
            "affine": lambda: nn.LayerNorm(C, 0.1),
            "rms": lambda: nn.RMSNorm(C, 0.1),
        }[choices.norm]
        self.n1, self.n2, self.n3 = make(), make(), make()
        self.q, self.k, self.v, self.out = (nn.Linear(C, C, bias) for _ in range(4))
        self.tq, self.tk, self.tv, self.tout = (nn.Linear(C, C, bias) for _ in range(4))
        self.up, self.down = nn.Linear(C, 16 * (1 + (choices.unit == "gated")), bias), nn.Linear(16, C, bias)
        self.ada, self.table = nn.Linear(C, 2 * C), nn.Parameter(torch.empty(2, C))
        self.also, self.places = nn.Linear(C, C), nn.Parameter(torch.empty(1, TOKENS, C))
        self.mix = None if choices.mix is None else nn.Conv1d(C, C, 3, padding=choices.mix, bias=bias)
        if choices.tied == "weights":
            self.tv.weight, self.tout.weight = self.v.weight, self.out.weight
        if choices.tied == "norms":
            self.n3 = self.n1

    def modulated(self, norm: nn.Module, x: Tensor, cond: Tensor) -> Tensor:
        """The norm of x, scaled and shifted as the condition says."""
        kind, y = self.choices.modulation, norm(x)
        if kind == "none":
            return y
        if kind == "tokens":
            shift, scale = self.ada(F.silu(x + cond[:, None])).chunk(2, -1)
        elif kind == "vector":
            shift, scale = self.ada(F.silu(cond))[:, None].chunk(2, -1)
        else:
            shift, scale = (self.table + cond).chunk(2, 1)
        return y * (1 + scale) + shift

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of q to k and v, [batch, tokens, channels]; the mask says which keys are seen."""
        kind = self.choices.attention
        p = 0.2 if self.choices.dropout == "attention" else 0.0
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
        if mask is not None and (kind != "fused" or self.choices.mask != "bool"):
            hidden = -1e4 if kind != "fused" or self.choices.mask == "finite" else float("-inf")
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, hidden)
        if kind == "fused":
            y = F.scaled_dot_product_attention(q, k, v, mask, p)
        elif kind == "in the batch":
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            scores = torch.bmm(q, k.transpose(1, 2)).unflatten(0, (-1, HEADS))
            scores = scores if mask is None else scores + mask
            y = torch.bmm(F.dropout(scores.flatten(0, 1).softmax(-1), p, p > 0), v).unflatten(0, (-1, HEADS))
        else:
            scores = q @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), p, p > 0)
            y = torch.einsum("bhij,bhjd->bhid", weights, v) if kind == "einsum" else weights @ v
        return y.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, cond: Tensor, text: Tensor | None, mask: Tensor | None, side: bool) -> Tensor:
        """Tokens [batch, tokens, channels] after the block."""
        y = self.modulated(self.n1, x, cond)
        if self.mix is not None:
            y = self.mix(y.mT).mT
        if self.choices.places:
            y = y + self.places
        if self.choices.dropout in ("values", "evaluation"):
            y = F.dropout(y, 0.2, self.choices.dropout == "values")
        h = x + self.out(self.attend(self.q(y), self.k(y), self.v(y), None))
        if side and self.choices.side is not None:
            sides: dict[str, nn.Module] = {"linear": self.also, "residual": nn.Identity(), "gelu": nn.GELU()}
            h = h + sides[self.choices.side](y)
        if text is not None:
            z = y if self.choices.text_reads == "first norm" else self.n2(h)
            h = h + self.tout(self.attend(self.tq(z), self.tk(text), self.tv(text), mask))
        z = self.up(self.modulated(self.n3, h, cond))
        if self.choices.unit == "gated":
            gate, z = z.chunk(2, -1)
            z = F.silu(gate) * z
        return h + self.down(
            F.relu(z) if self.choices.unit == "relu" else F.gelu(z) if self.choices.unit == "gelu" else z
        )


class RandomTransformer(nn.Module):
    """A model of one or two blocks."""

    def __init__(self, choices: Choices, seed: int) -> None:
        super().__init__()
        self.choices = choices
        self.inp, self.time = nn.Linear(C, C), nn.Linear(1, 2 * C if choices.modulation == "shared" else C)
        self.caption, self.head = nn.Linear(6, C), nn.Linear(C, 4)
        self.blocks = nn.ModuleList([Block(choices) for _ in range(choices.depth)])
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 1.6 - 0.8)
        self.double().eval()

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float = 1.0,
        side: bool = False,
    ) -> Tensor:
        """Four channels for each token."""
        cond, h = self.time(timestep[:, None] / 1000) * strength, self.inp(x)
        if self.choices.modulation == "shared":
            cond = cond.unflatten(-1, (2, C))
        text = None if text is None else self.caption(text)
        mask = None if mask is None else mask[:, None, None]
        for block in self.blocks:
            for _ in range(1 + (self.choices.tied == "blocks")):
                h = block(h, cond, text, mask, side)
        return self.head(h)


def kinds(r: Random) -> list[Call]:
    """Two or three kinds of call, each given by its inputs besides the sample and the timestep."""
    found: dict[str, Call] = {}
    while len(found) < r.choice([2, 2, 3]):
        call: Call = {}
        if r.random() < 2 / 3:
            call["text"] = True
            if r.random() < 1 / 2:
                call["mask"] = True
        if r.random() < 1 / 3:
            call["strength"] = r.choice([0.5, 1.5])
        if r.random() < 1 / 2:
            call["side"] = True
        found.setdefault(str(sorted(call)), call)
    return list(found.values())


def filled(kind: Call, timestep: float, seed: int) -> Call:
    """One call of a kind, in float64; without ``strength`` and so on unless the kind has them."""
    generator = torch.Generator().manual_seed(seed)
    steps = [timestep, timestep] if seed % 3 else [timestep, 1000 - timestep]
    call = kind | {
        "x": torch.rand(BATCH, TOKENS, C, generator=generator, dtype=torch.float64) * 5 - 2,
        "timestep": torch.tensor(steps, dtype=torch.float64),
    }
    if "text" in kind:
        call["text"] = torch.rand(BATCH, TEXT, 6, generator=generator, dtype=torch.float64) * 5 - 2
    if "mask" in kind:
        call["mask"] = torch.rand(BATCH, TEXT, generator=generator) > 0.4
        call["mask"][seed % BATCH] = seed % 2 == 0  # Sees all keys, or none.
    return call


@dataclass(frozen=True)
class RandomGraph:
    """A random model with calls of one kind.

    Attributes:
        seed: Makes the same model again: ``random_graph(seed)``.
        model: A transformer of one or two blocks, in evaluation mode. Its linears are called ``blocks.0.q`` and so on.
        calls: Keyword arguments of calls at different timesteps: ``x`` [2, 3, 8] and ``timestep`` [2]; some kinds also
            have ``text`` [2, 4, 6], a boolean ``mask`` [2, 4], a number ``strength``, or ``side=True``.
    """

    seed: int
    model: nn.Module
    calls: list[Call]

    def __repr__(self) -> str:  # Hypothesis shows a failing example so.
        return f"random_graph({self.seed})"


def random_graph(seed: int, dtype: torch.dtype = torch.float32) -> RandomGraph:
    """The random model of a seed, which computes the same on every call, and no NaN.

    Args:
        seed: Any number.
        dtype: Dtype of the weights and of the floating-point inputs.
    """
    r = Random(seed)
    choices, kind = Choices(r), kinds(r)[0]
    choices.dropout = None if choices.dropout is None else "evaluation"
    choices.mask = "finite" if choices.mask == "infinite" else choices.mask
    model = RandomTransformer(choices, seed).to(dtype)
    calls = [filled(kind, step, number) for number, step in enumerate(STEPS)]
    for call in calls:
        if "mask" in call:
            call["mask"][:, 0] = True
        call.update({name: call[name].to(dtype) for name in ("x", "timestep", "text") if name in call})
    return RandomGraph(seed, model, calls)


def graphs(dtype: torch.dtype = torch.float32) -> SearchStrategy[RandomGraph]:
    """A Hypothesis strategy of random models with calls, all equally likely.

    A model takes about a second to trace and to prove a pass on, so set ``max_examples`` and ``deadline=None``.
    Hypothesis draws only the seed, so it cannot make a failing model smaller.

    Args:
        dtype: As for :func:`random_graph`.

    Raises:
        MissingPackageError: If Hypothesis is not installed.
    """
    try:
        from hypothesis import strategies
    except ImportError:
        raise MissingPackageError(
            "fxquant.testing.graphs needs Hypothesis, which is not installed: pip install hypothesis; or use "
            "fxquant.testing.random_graph(seed), which does not need it"
        ) from None
    # From ranges above 2^24, Hypothesis draws small numbers more often.
    return strategies.integers(0, 2**24 - 1).map(lambda seed: random_graph(seed, dtype))
