"""Captures every diffusion transformer of the zoo, absorbs exactly, quantizes, and runs at other sizes."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxquant
from fxquant.errors import CaptureError
from fxquant.planning.kinds import KINDS
from tests.zoo.audit import STEPS, audit
from tests.zoo.coverage import HEAD, exceptions, row, summary, title
from tests.zoo.models import CAPTURED, ENTRIES, NOT_TRANSFORMERS, QUANTIZED_SAMPLE, REFUSED, SAMPLE, Entry

REFUSED_SAMPLE = {"HiDreamImageTransformer2DModel", "WanAnimate2Transformer3DModel"}
SHIFTED_SAMPLE = {"DiT2D", "PixArt2D-Sigma"}
COVERAGE = Path(__file__).resolve().parents[2] / "docs" / "coverage.md"


def run(model: nn.Module, call: dict[str, Any]) -> Tensor:
    """First output of a call."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model(**call)
    return next(leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor))


def sqnr(actual: Tensor, expected: Tensor) -> float:
    """Signal to quantization noise, in dB."""
    return float(10 * torch.log10(expected.square().sum() / (actual - expected).square().sum()))


def params(sample: Collection[str]) -> list[Any]:
    """All models, exhaustive outside of the sample."""
    return [
        pytest.param(entry, id=entry.id, marks=[] if entry.id in sample else [pytest.mark.exhaustive])
        for entry in CAPTURED
    ]


@pytest.mark.slow
@pytest.mark.parametrize("entry", params(SAMPLE))
def test_absorption_is_exact_and_covers_what_the_page_says(entry: Entry) -> None:
    found = audit(entry)
    assert found.error < 1e-12
    page = COVERAGE.read_text()
    assert row(entry, found) in page, "docs/coverage.md is out of date; write it anew with: make coverage"
    for line in exceptions(found):
        assert f"- {entry.name}{entry.variant}: {line}\n" in page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", params({"DiT2D", "SD32D", "PixArt2D-Sigma"}))
def test_rotations_and_branches_are_exact(entry: Entry) -> None:
    passes = "balance-channels,absorb-affines,rotate-channels{least=2},split-low-rank{rank=1}"
    assert audit(entry, passes).error < 1e-12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", params(SHIFTED_SAMPLE))
def test_shifts_are_exact(entry: Entry) -> None:
    passes = "group-timesteps{groups=2},shift-channels,absorb-shifts,balance-channels{salience=max},absorb-affines"
    found = audit(entry, passes)
    assert found.error < 1e-12
    if entry.id in SHIFTED_SAMPLE:
        assert any(layer.shift is not None for layer in found.plan.layers.values()), "nothing was shifted"


def quantize(entry: Entry, model: nn.Module, recipe: str) -> fxquant.GraphModel:
    """The model quantized with a recipe, calibrated at a few timesteps."""
    return fxquant.compile(
        model,
        recipe=recipe,
        calibrate=lambda: [run(model, entry.call(step=step, seed=seed)) for seed, step in enumerate(STEPS)],
        timestep=entry.timestep,
        measure=0,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", params(QUANTIZED_SAMPLE))
def test_quantizes_and_runs_at_other_sizes(entry: Entry) -> None:
    model = entry.model()
    quantized = quantize(entry, model, "ptq4dit-w8a8")
    fixed = quantized.captured[0].static_batch
    assert (fixed is not None) == ("| fixed |" in line_of(entry))
    assert fixed is None or fixed in fxquant.report(quantized).fixed
    floor = 20.0  # Random weights and a handful of samples; a wrong graph is below 0 dB.
    call = entry.call(3, seed=7, step=500.0)
    # A list with one item per sample, such as the shapes of images, has another structure at another batch size.
    other_list = quantized.architecture.canonical((), call).names != quantized.captured[0].call.names
    graphs = 1 if fixed is None and not other_list else 2
    assert sqnr(run(quantized, call), run(model, call)) > floor
    assert len(quantized.graphs) == graphs
    if entry.other_size is not None or entry.other_prompt is not None:
        other = entry.call(3, seed=7, step=500.0, size=entry.other_size, prompt=entry.other_prompt)
        assert sqnr(run(quantized, other), run(model, other)) > floor
        assert len(quantized.graphs) == graphs + 1
    four = quantize(entry, model, "ptq4dit-w4a8")
    call = entry.call(seed=7, step=500.0)
    assert 3 < sqnr(run(four, call), run(model, call)) < sqnr(run(quantized, call), run(model, call))


def line_of(entry: Entry) -> str:
    """The row of a model on the page."""
    name = title(entry)
    return next(line for line in COVERAGE.read_text().splitlines() if line.startswith(f"| {name} |"))


def test_the_page_is_whole() -> None:
    """Other tests compare each row of the page; this one tests that there are no other rows and that sums agree."""
    page = COVERAGE.read_text()
    assert page.startswith(HEAD)
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.endswith(("| any |", "| fixed |"))]
    assert [cells[0].strip() for cells in rows] == [title(entry) for entry in CAPTURED]
    columns = (1, 2, 3, 4, 5, 6)
    linears, free, vector, nonlinear, other, tokens = (sum(int(cells[column]) for cells in rows) for column in columns)
    assert summary(len(rows), free + vector, linears - nonlinear) in page
    kinds = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith(tuple(f"| {k} |" for k in KINDS))]
    assert [cells[0].strip() for cells in kinds] == list(KINDS)
    totals = [sum(int(cells[column]) for cells in kinds) for column in columns]
    assert totals == [linears, free, vector, nonlinear, other, tokens]
    assert tokens <= nonlinear + other
    # q, k and v, attention outputs and first feed-forward linears. Where each token has a timestep of its own, the
    # modulation of q, k and v is as large as the activation, and only dearest=tokens allows its factors.
    for cells in kinds[:3]:
        assert (int(cells[2]) + int(cells[3])) / int(cells[1]) > 0.88, cells
    for name, refusal in REFUSED.items():
        assert f"- {name}: {refusal.reason}" in page


def test_every_transformer_of_diffusers_is_in_the_zoo_or_has_a_reason() -> None:
    names = [name for name in dir(diffusers) if "Transformer" in name or "DiT" in name]
    classes = {name: getattr(diffusers, name) for name in names}
    models = {name for name, cls in classes.items() if isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)}
    assert len(models) > 70
    assert models - {entry.name for entry in ENTRIES} == set(NOT_TRANSFORMERS)
    assert set(REFUSED) <= models


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in REFUSED_SAMPLE else [pytest.mark.exhaustive])
        for name, refusal in REFUSED.items()
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_cannot_be_captured_is_refused_with_the_reason(name: str) -> None:
    entry, refusal = next(entry for entry in ENTRIES if entry.name == name), REFUSED[name]
    model = entry.model()
    with pytest.raises(CaptureError, match=refusal.error) as caught:
        fxquant.compile(
            model,
            recipe="ptq4dit-w8a8",
            calibrate=lambda: run(model, entry.call()),
            timestep=entry.timestep,
        )
    if refusal.file is not None:
        assert f'{refusal.file}", line ' in str(caught.value)
