"""Models with several kinds of call: their graphs share the tensors that are equal, and no others.

An optional input changes who reads a value, and with it what can be folded where. In float64, where nothing is rounded,
each kind of call gives what the model gives: calibrated in any order or not at all, before and after a checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import CalibrationError, CaptureError
from fxquant.numerics.sqnr import sqnr_db
from fxquant.runtime.model import GraphModel

C = 16
DECIDE = "remove-no-ops,assign-precision{precision=w8a8} ; "
BALANCE = DECIDE + "balance-channels,absorb-affines"
SHIFT = (
    DECIDE + "group-timesteps{groups=%d},shift-channels,absorb-shifts,"
    "balance-channels{salience=moving-average},absorb-affines"
)


class Block(nn.Module):
    """A block whose optional input adds a reader to one of its values, or lets a layer read another one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.ada = kind, nn.Linear(C, 4 * C)
        self.n1, self.n2 = nn.LayerNorm(C, elementwise_affine=kind != "weightless"), nn.LayerNorm(C)
        self.to_q, self.to_k, self.to_v, self.to_out, self.late = (nn.Linear(C, C) for _ in range(5))
        self.fc1, self.fc2 = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.table = nn.Parameter(torch.randn(4, C))
        if kind == "convolved":
            self.mix = nn.Conv1d(C, C, 3, padding="same")
        self.places = nn.Parameter(torch.randn(1, 6, C) + torch.linspace(-3, 3, C))

    def forward(self, h: Tensor, c: Tensor, extra: Tensor | None) -> Tensor:
        given, more = extra is not None, 0 if extra is None else extra
        shift, scale, gate, _ = self.ada(c)[:, None].chunk(4, -1)
        if self.kind == "table":  # As PixArt has it: one vector for all blocks, a table for each.
            shift, scale, gate, _ = (self.table[None] + self.ada(c).unflatten(-1, (4, C))).chunk(4, 1)
        places = self.places
        n = self.n1(h) + (places if self.kind == "parameter" else 0)
        if self.kind in ("modulated", "table"):
            n = n * (1 + scale) + shift
        if self.kind == "convolved":
            n = self.mix(n.mT).mT
        q, k, v = (layer(n).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        h = h + gate * self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        m = self.n2(h)
        if given and self.kind in ("norm", "weightless", "modulated", "convolved"):
            h = h + torch.tanh(n) * more
        if given and self.kind == "value":
            h = h + torch.tanh(v.transpose(1, 2).flatten(2)) * more
        if given and self.kind == "parameter":
            h = h + torch.tanh(places) * more
        if given and self.kind == "table":
            h = h + torch.tanh(scale) * more
        if given and self.kind == "layer":  # A layer that the other kind of call does not run.
            h = h + self.late(n) * more
        if given and self.kind == "elsewhere":  # A layer that reads another value than in the other kind of call.
            m = n
        return h + self.fc2(F.gelu(self.fc1(m)))


class Two(nn.Module):
    """A small transformer of such blocks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.cond, self.out = (nn.Linear(i, o) for i, o in ((4, C), (1, C), (C, 4)))
        self.blocks = nn.ModuleList([Block(kind)])
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, mean=0.5, std=0.5)
        self.double().eval()

    def forward(self, x: Tensor, timestep: Tensor, extra: Tensor | None = None) -> Tensor:
        h, c = self.inp(x), F.silu(self.cond(timestep.to(x.dtype)[:, None] / 1000))
        for block in self.blocks:
            h = block(h, c, extra)
        return self.out(h)


def call(kind: str, batch: int = 2, seed: int = 0, step: float | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        "x": torch.randn(batch, 6, 4, generator=generator, dtype=torch.float64),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator)
        if step is None
        else torch.full((batch,), step),
    }
    if kind == "e":
        made["extra"] = torch.randn(batch, 6, C, generator=generator, dtype=torch.float64)
    return made


def compiled(model: nn.Module, recipe: Any, order: str, calibrated: str = "int64") -> GraphModel:
    """Calibrated with calls whose timesteps are of this dtype; those of :func:`error` are int64."""

    def calibrate() -> None:
        for kind in order:
            for seed, step in enumerate((900, 600, 300, 20)):
                model(**call(kind, seed=seed, step=float(step) if calibrated == "float32" else step))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fxquant.compile(model, recipe=recipe, calibrate=calibrate, measure=0)


def error(made: nn.Module, model: nn.Module, kind: str) -> float:
    inputs = call(kind, batch=3, seed=7)
    with torch.no_grad():
        expected = model(**inputs)
        return float((made(**inputs) - expected).abs().max() / expected.abs().max())


KINDS = ["norm", "weightless", "modulated", "value", "parameter", "table", "layer", "elsewhere", "convolved"]
RECIPES = {"balanced": BALANCE, "shifted": SHIFT % 1, "shifted by timestep": SHIFT % 2}
CASES = [(kind, order, "balanced") for kind in KINDS for order in ("pe", "p")]
CASES += [("norm", "ep", "balanced"), ("value", "ep", "balanced")]
CASES += [
    (kind, order, "shifted by timestep") for kind in ("norm", "modulated", "value", "layer") for order in ("pe", "p")
]
CASES += [("norm", "pe", "shifted"), ("elsewhere", "pe", "shifted"), ("elsewhere", "e", "balanced")]
FLOAT = {("norm", "pe", "balanced")}
"""Cases that `make test` also runs with calls of another dtype than those of the calibration."""
SECOND = {(kind, "p", "balanced") for kind in ("weightless", "parameter", "table", "convolved", "modulated")}
SECOND |= {("norm", "p", "shifted by timestep"), ("layer", "pe", "shifted by timestep"), ("norm", "ep", "balanced")}
SECOND |= {("elsewhere", "p", "balanced"), ("value", "p", "shifted by timestep"), ("norm", "pe", "shifted")}
"""Cases that are like another one as far as `make test` is concerned."""


_LAYER = (
    "the plan knows no layer 'blocks.0.late': this call of the model runs more than any calibration call did. "
    "Calibrate with calls like it: (x: float64[batch, 6, 4], timestep: int64[batch], extra: float64[batch, 6, 16])"
)
_FORM = (
    "tensor 'blocks.0.%s.weight' is stored as the calibration calls need it, and this call of the model needs another "
    "form of it, because other parts of the model read the value computed from it; calibrate with a call like this one "
    "as well"
)
_UNREAD = (
    "a call (x: float64[batch, 6, 4], timestep: int64[batch], extra: None) runs a part of the model that no "
    "calibration call ran: it reads 'blocks.0.n2.bias', which no calibration call read; calibrate with a call like "
    "this one as well"
)
REFUSED = {
    ("layer", "p", "balanced", "e"): _LAYER,
    ("layer", "p", "shifted by timestep", "e"): _LAYER,
    ("elsewhere", "e", "balanced", "p"): _UNREAD,
    # A shift by timestep cannot be taken back.
    ("modulated", "p", "shifted by timestep", "e"): _FORM % "ada",
    ("value", "p", "shifted by timestep", "e"): _FORM % "to_v",
}
"""Calls of a kind that was not calibrated and cannot be served: kind of model, order, recipe, kind of call."""


def in_both_dtypes(cases: Sequence[tuple[str, ...]], sample: Collection[tuple[str, ...]]) -> list[Any]:
    """The cases, each calibrated with either dtype of timesteps; exhaustive outside the sample and `SECOND`."""
    found = []
    for dtype in ("int64", "float32"):
        for case in cases:
            rest = [pytest.mark.exhaustive] * (case in SECOND if dtype == "int64" else case not in sample)
            found.append(pytest.param(*case, dtype, marks=rest))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "order", "recipe", "calibrated"), in_both_dtypes(CASES, FLOAT))
def test_every_kind_of_call_is_that_of_the_model(
    kind: str, order: str, recipe: str, calibrated: str, tmp_path: Path
) -> None:
    model = Two(kind)
    made = compiled(model, fxquant.Recipe.parse(RECIPES[recipe]), order, calibrated)
    assert any(layer.balance is not None for layer in made.plan.layers.values())
    fxquant.save(made, tmp_path / "made")
    loaded = fxquant.load(tmp_path / "made", model=model)
    for found in (made, loaded):
        for calls in ("p", "e"):
            message = REFUSED.get((kind, order, recipe, calls))
            if message is None:
                assert error(found, model, calls) < 1e-12
                continue
            with pytest.raises((CaptureError, CalibrationError)) as refused:
                error(found, model, calls)
            assert str(refused.value) == message


QUANTIZED = [
    ("norm", "ptq4dit-gptq-w4a8"),
    ("value", "ptq4dit-gptq-w4a8"),
    ("elsewhere", "ptq4dit-w8a8"),
    ("modulated", "htg-w8a8"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "recipe", "calibrated"), in_both_dtypes(QUANTIZED, []))
def test_quantized_both_kinds_are_as_good(kind: str, recipe: str, calibrated: str, tmp_path: Path) -> None:
    """Neither kind of call is worse than in a model that was calibrated with that kind alone."""
    model = Two(kind)
    made = compiled(model, recipe, "pe", calibrated)
    alone = {calls: compiled(model, recipe, calls, calibrated) for calls in "pe"}
    fxquant.save(made, tmp_path / "made")
    loaded = fxquant.load(tmp_path / "made", model=model)
    for calls in "pe":
        inputs = call(calls, batch=8, seed=7)
        with torch.no_grad():
            expected = model(**inputs)
            outputs = [found(**inputs) for found in (made, loaded, alone[calls])]
        assert torch.equal(outputs[0], outputs[1])
        assert sqnr_db(expected, outputs[0]) > sqnr_db(expected, outputs[2]) - 6.0


def test_tensors_of_equal_folds_are_shared() -> None:
    """A further kind of call costs only the tensors that it needs in another form."""
    model = Two("norm")
    made = compiled(model, fxquant.Recipe.parse(BALANCE), "pe")
    first, second = ({str(node.target) for node in graph.graph.nodes if node.op == "get_attr"} for graph in made.graphs)
    shared = [f"blocks.0.{name}.weight" for name in ("fc1", "fc2", "to_q", "n2")]
    assert first & second >= {*shared}
    places = [[graph.get_parameter(name).data_ptr() for name in shared] for graph in made.graphs]
    assert places[0] == places[1]
    own = {name.rpartition("_")[0] for name in second - first if "balance" not in name}
    assert own == {"blocks.0.n1.weight", "blocks.0.n1.bias"}


@pytest.mark.slow
def test_an_attention_whose_v_is_balanced_otherwise_is_refused() -> None:
    """Its range was found for v as the first kind of call has it."""
    recipe = fxquant.make_recipe("ptq4dit-w8a8", "all")
    with pytest.raises(CalibrationError, match=r"the v of attention 'blocks.0' takes other factors"):
        compiled(Two("value"), recipe, "pe")
    assert len(compiled(Two("norm"), recipe, "pe").graphs) == 2
