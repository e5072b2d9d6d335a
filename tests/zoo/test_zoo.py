"""Every diffusion transformer of the zoo: captured, absorbed exactly, quantized, run at other sizes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxquant
from fxquant.errors import CaptureError
from fxquant.observers import Statistics
from tests.zoo.audit import STEPS, audit
from tests.zoo.coverage import exceptions, row
from tests.zoo.models import CAPTURED, ENTRIES, REFUSED, Entry

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


@pytest.mark.parametrize("entry", CAPTURED, ids=lambda entry: entry.id)
def test_absorption_is_exact_and_covers_what_the_page_says(entry: Entry) -> None:
    found = audit(entry)
    assert found.error < 1e-12
    page = COVERAGE.read_text()
    assert row(entry, found) in page, "docs/coverage.md is out of date; write it anew with: make coverage"
    for line in exceptions(found):
        assert f"- {entry.name}{entry.variant}: {line}\n" in page


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", CAPTURED, ids=lambda entry: entry.id)
def test_quantizes_and_runs_at_other_sizes(entry: Entry) -> None:
    model, statistics = entry.model(), Statistics()
    quantized = fxquant.compile(
        model,
        recipe="ptq4dit-w8a8",
        calibrate=lambda: [run(model, entry.call(step=step, seed=seed)) for seed, step in enumerate(STEPS)],
        timestep=entry.timestep,
        statistics=statistics,
        measure=0,
    )
    floor = 20.0  # Random weights and a handful of samples; a wrong graph is below 0 dB.
    others: list[dict[str, Any]] = [{"batch": 3}]
    if entry.other_size is not None:
        others.append({"size": entry.other_size})
    if entry.other_prompt is not None:
        others.append({"prompt": entry.other_prompt})
    for options in others:
        call = entry.call(seed=7, step=500.0, **options)
        assert sqnr(run(quantized, call), run(model, call)) > floor, options
    plan = quantized.plan
    for layer in plan.layers.values():
        if layer.weight_bits == 8 and layer.role == "block":
            layer.weight_bits = 4
    call = entry.call(seed=7, step=500.0)
    four = fxquant.compile(model, plan=plan, timestep=entry.timestep)
    assert 3 < sqnr(run(four, call), run(model, call)) < sqnr(run(quantized, call), run(model, call))


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_branches_on_values_is_refused_with_its_line(name: str) -> None:
    entry = next(entry for entry in ENTRIES if entry.name == name)
    model = entry.model()
    with pytest.raises(CaptureError, match=r"torch\.export follows one path") as caught:
        fxquant.compile(
            model,
            recipe="ptq4dit-w8a8",
            calibrate=lambda: run(model, entry.call()),
            timestep=entry.timestep,
        )
    assert f'{REFUSED[name]}", line ' in str(caught.value)
