"""Random transformers whose calls differ: optional inputs, masks, numbers, layers that only some calls use.

Each graph of :mod:`tests.fuzz.graphs` is independent. A model has several graphs that share one plan and their tensors,
in any order of capture. A change that one graph folds into a tensor must be correct for the other graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from tests.fuzz.cases import pipeline
from tests.fuzz.proof import BAR, CALIBRATED, SenselessError, bar, error

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
        y = self.modulated(self.n1, x, cond)
        if self.mix is not None:
            y = self.mix(y.mT).mT
        if self.choices.places:
            y = y + self.places
        if self.choices.dropout in ("values", "evaluation"):
            y = F.dropout(y, 0.2, self.choices.dropout == "values")
        h = x + self.out(self.attend(self.q(y), self.k(y), self.v(y), None))
        if side and self.choices.side is not None:
            h = h + {"linear": self.also, "residual": lambda z: z, "gelu": F.gelu}[self.choices.side](y)
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


class Drawn(nn.Module):
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
    """One call of a kind."""
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


def run(seed: int) -> None:
    """Compile the model twice, with calibration calls in opposite orders, and compare both with the model.

    Raises:
        SenselessError: If the model allows no comparison.
    """
    r = Random(seed)
    choices, calls = Choices(r), kinds(r)
    before, passes = "remove-no-ops,assign-precision", pipeline(r)
    seen = r.randint(1, len(calls))  # Other kinds come later, and are refused if they run more layers.
    weights = r.getrandbits(32)
    for order in (calls, calls[::-1]):
        model, calibrated = Drawn(choices, weights), order[:seen]
        for kind in order:
            computed(model, filled(kind, 500.0, 0))  # Otherwise compile would report a failure as one of calibration.

        def calibrate(model: nn.Module = model, calibrated: list[Call] = calibrated) -> None:
            for number, step in enumerate(CALIBRATED):
                for kind in calibrated:
                    model(**filled(kind, step, number))

        try:
            compiled = fxquant.compile(
                model, recipe=fxquant.Recipe.parse(f"{before} ; {passes}"), calibrate=calibrate, measure=0
            )
        except fxquant.errors.CalibrationError as refusal:
            raise SenselessError("not all that is observed has the batch in front") from refusal
        for number, kind in enumerate([*order, *order]):
            call = filled(kind, 700.0 * (number % 2), 10 + number)
            right, most = expected(model, call)
            try:
                actual = computed(compiled, call)
            except fxquant.errors.CalibrationError:
                assert kind not in calibrated  # This kind runs layers that no calibration call ran.
                continue
            except fxquant.errors.CaptureError as refusal:
                # It needs another fold of a tensor, and the float weights are gone.
                assert kind not in calibrated and "another form of it" in str(refusal)
                continue
            found = error([actual], [right])
            assert found <= most, (
                f"{sorted(kind)} among {[sorted(k) for k in order]}, {seen} calibrated: off by {found:.1e}"
            )


def expected(model: nn.Module, call: Call) -> tuple[Tensor, float]:
    """The output of the model, and the largest error of an equal model."""
    right = computed(model, call)
    if not float(right.abs().max()) < 1e6:
        raise SenselessError("the outputs grow without bound, or are NaN")
    with torch.no_grad():
        held = [parameter.clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.mul_(1 + 2e-16)
        moved = computed(model, call)
        for parameter, value in zip(model.parameters(), held, strict=True):
            parameter.copy_(value)
    most = bar([moved], [right])
    if most >= 100 * BAR:
        raise SenselessError("the outputs have no digits to compare")
    return right, most


def computed(model: nn.Module, call: Call) -> Tensor:
    """The output, with the same dropout each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**call)
