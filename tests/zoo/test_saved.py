"""A saved checkpoint of every zoo model gives the same bits in a new process, or saving is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxquant
from fxquant.errors import CalibrationError, CheckpointError, PortabilityWarning
from tests.zoo.models import CAPTURED, Entry

ROOT = Path(__file__).resolve().parents[2]
_REASONS = {
    "-fused": "to_qkv",
    "-all-experts": "cannot be traced|was changed",
    "Transformer2DModel": "has shape",  # Its from_config makes a model of another class, with different layers.
}
REFUSED = {
    entry: reason
    for entry in CAPTURED
    for kind, reason in _REASONS.items()
    if entry.name == kind or entry.variant.endswith(kind)
}
"""Models that cannot be made from their class and config, with a pattern of the error."""

LOADED = [entry for entry in CAPTURED if entry not in REFUSED]
QUICK = {"DiT2D", "OwnDiT"}
_BATCH = 8  # Models per process, because starting a process takes longer than loading a few models.

_OTHER_PROCESS = """
import json, sys, torch
from pathlib import Path
from tests.zoo.test_saved import load_and_run
folder = Path(sys.argv[1])
for name in json.loads(sys.argv[2]):
    torch.save(load_and_run(folder, name), folder / f"{name}.pt")
"""


def run(model: nn.Module, entry: Entry, **options: Any) -> Tensor:
    """First output of a call at a timestep of 500."""
    with torch.no_grad():
        found = model(**entry.call(seed=7, step=500.0, **options))
    return next(leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor))


def compiled(entry: Entry, recipe: str = "rtn-w8a8") -> fxquant.GraphModel:
    model = entry.model()
    return fxquant.compile(
        model, recipe=recipe, calibrate=lambda: run(model, entry), timestep=entry.timestep, measure=0
    )


def load_and_run(folder: Path, name: str) -> Tensor:
    """Load and run a checkpoint, in another process. Models that are not from diffusers need an instance to load."""
    entry = next(entry for entry in CAPTURED if entry.id == name)
    return run(fxquant.load(folder / name, model=None if entry.make is None else entry.model()), entry)


def batches() -> list[object]:
    quick = [entry for entry in LOADED if entry.id in QUICK]
    rest = [entry for entry in LOADED if entry.id not in QUICK]
    slow = [rest[start : start + _BATCH] for start in range(0, len(rest), _BATCH)]
    return [
        # `make test` starts new processes in tests/storage, tests/pretrained and tests/docs.
        pytest.param(quick, id="a few", marks=pytest.mark.exhaustive),
        *(pytest.param(entries, id=f"{entries[0].id} and on", marks=pytest.mark.exhaustive) for entries in slow),
    ]


@pytest.mark.filterwarnings("ignore", "error::fxquant.errors.PortabilityWarning")
@pytest.mark.parametrize("entries", batches())
def test_a_new_process_gives_the_same_bits(entries: list[Entry], tmp_path: Path) -> None:
    expected = {}
    for entry in entries:
        quantized = compiled(entry)
        expected[entry.id] = run(quantized, entry)
        fxquant.save(quantized, tmp_path / entry.id)
    command = [sys.executable, "-c", _OTHER_PROCESS, str(tmp_path), json.dumps(list(expected))]
    subprocess.run(command, check=True, cwd=ROOT)
    for name, output in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), output), name


# `make test` runs these; `make test-all` runs every model.
OTHER_SIZES = {"MiniMaxMusic31D"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", ["ptq4dit-w8a8", pytest.param("dynamic-w8a8", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=entry.id, marks=[] if entry.id in OTHER_SIZES else [pytest.mark.exhaustive])
        for entry in CAPTURED
    ],
)
def test_other_sizes_after_loading(entry: Entry, recipe: str, tmp_path: Path) -> None:
    """Calls that calibration did not see are captured by the loaded model as by the one that was saved."""
    quantized = compiled(entry, recipe)
    fxquant.save(quantized, tmp_path / "model", needs_model=entry in REFUSED)
    needs_model = entry in REFUSED or entry.make is not None
    loaded = fxquant.load(tmp_path / "model", model=entry.model() if needs_model else None)
    calls: list[dict[str, Any]] = [{}, {"batch": 3}]
    if entry.other_size is not None or entry.other_prompt is not None:
        calls.append({"batch": 3, "size": entry.other_size, "prompt": entry.other_prompt})
    for options in calls:
        assert torch.equal(run(loaded, entry, **options), run(quantized, entry, **options))


def refused() -> list[object]:
    """All refused models, exhaustive except the first of each reason.

    Models that were changed by hand are refused in tests/capture/test_rebuilding.py too, much smaller ones.
    """
    reasons = [_REASONS["-all-experts"], *REFUSED.values()]
    return [
        pytest.param(entry, id=entry.id, marks=[pytest.mark.exhaustive] if reason in reasons[:number] else [])
        for number, (entry, reason) in enumerate(REFUSED.items(), 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("entry", refused())
@pytest.mark.filterwarnings("ignore")
def test_what_is_refused_is_loaded_with_the_model(entry: Entry, tmp_path: Path) -> None:
    quantized = compiled(entry)
    with pytest.raises(CheckpointError, match=REFUSED[entry]):
        fxquant.save(quantized, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    fxquant.save(quantized, tmp_path / "model", needs_model=True)
    with pytest.raises(CheckpointError, match="is read with the float model"):
        fxquant.load(tmp_path / "model")
    loaded = fxquant.load(tmp_path / "model", model=entry.model())
    assert torch.equal(run(loaded, entry), run(quantized, entry))


def test_fused_projections_are_told_before_calibration() -> None:
    entry = next(entry for entry in REFUSED if "fused" in entry.variant)
    with pytest.warns(PortabilityWarning, match="unfuse_qkv_projections"), pytest.raises(CalibrationError):
        fxquant.compile(entry.model(), recipe="rtn-w8a8", calibrate=[].pop, timestep=entry.timestep)
