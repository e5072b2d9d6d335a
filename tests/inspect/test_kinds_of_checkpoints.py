"""Every way to inspect, on checkpoints of other models, recipes and backends: it works, or says what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxquant
from fxquant.cli.__main__ import app
from fxquant.disk.files import digest_of
from fxquant.errors import ConfigurationError, MissingTimestepError
from tests.tiny import calibrate, make_dit

LAYER = "transformer_blocks.0.attn1.to_q"
_ADDED_LATER = (
    *("attentions", "products", "reconstruction", "observed_step", "later_steps", "naming", "infinite", "made_with"),
)


class Convolutions(nn.Module):
    """Two convolutions, of a class that a checkpoint cannot name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.silu(self.first(x))) + timestep[:, None, None, None]


def convolutions(folder: Path) -> str:
    model = Convolutions().eval()
    quantized = fxquant.compile(
        model,
        recipe="rtn-w8a8",
        layers="all",
        calibrate=lambda: [model(torch.randn(2, 4, 8, 8), torch.full((2,), step)) for step in (100.0, 900.0)],
    )
    fxquant.save(quantized, folder)
    return "first"


def dit(recipe: str, backend: str = "fake-quant") -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        model = make_dit()
        fxquant.save(fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), backend=backend), folder)
        return LAYER

    return make


def earlier(folder: Path) -> str:
    """As versions wrote it that knew neither attentions nor a log of edits."""
    dit("rtn-w8a8")(folder)
    data = json.loads((folder / "plan.json").read_text())
    for name in _ADDED_LATER:
        data.pop(name, None)
    for entry in data["passes"]:
        entry.pop("changes")
    data["digest"] = digest_of(data)
    (folder / "plan.json").write_text(json.dumps(data, indent=1) + "\n")
    return LAYER


def package(folder: Path) -> str:
    """What tells a folder that was compiled ahead of time."""
    folder.mkdir()
    (folder / "package.json").write_text("{}")
    return LAYER


KINDS: dict[str, Callable[[Path], str]] = {
    "dynamic": dit("dynamic-w8a8"),
    "earlier": earlier,
    "convolutions": convolutions,
    "package": package,
    "native": dit("rtn-w8a8", "native"),
    "torchao": dit("rtn-w8a16", "torchao"),
}
_WORKS = {"report", "graph", "inspect", "explain", "diff", "plot", "profile"}
WORKS = {kind: _WORKS for kind in KINDS} | {"convolutions": {"report", "plot"}, "package": set()}
"""The commands that work on each kind."""
REFUSED = {
    "package": "compiled ahead of time",
    "convolutions": "pass its class or an instance in Python: fxquant.load",
}
REFUSED_ALWAYS = {
    "opt": "is a folder, not the dump of a graph",
    "statistics": "is a folder; give the file of statistics",
    "attribute": "error: .*(not a pipeline|compiled ahead of time|pass its class)",
}
_SLOW = ("native", "torchao")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.exhaustive) if kind in _SLOW else kind for kind in KINDS]
)
def test_commands(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    layer = KINDS[kind](folder)
    commands: dict[str, list[Any]] = {
        "report": [folder],
        "graph": [folder, "--layer", layer],
        "inspect": [folder],
        "explain": [folder, layer],
        "diff": [folder, folder],
        "plot": [folder, "output", "-o", tmp_path / "picture.svg"],
        "profile": [folder, "--rounds", 1, "--no-float"],
        "opt": [folder, "--passes", "remove-no-ops"],
        "statistics": [folder],
        "attribute": [folder, folder],
    }
    for command, arguments in commands.items():
        found = CliRunner().invoke(app, [command, *map(str, arguments)])
        told = " ".join(found.stderr.split())
        assert found.exception is None or isinstance(found.exception, SystemExit), f"{command}: {found.exception!r}"
        assert (found.exit_code == 0) == (command in WORKS[kind]), f"{command}: {told}"
        if command not in WORKS[kind]:
            pattern = REFUSED_ALWAYS.get(command) or REFUSED[kind]
            assert re.search(pattern, told), f"{command}: {told}"


def test_functions_on_a_model_of_another_class(tmp_path: Path) -> None:
    layer, model = convolutions(tmp_path / "checkpoint"), Convolutions().eval()
    shutil.copytree(tmp_path / "checkpoint", tmp_path / "copy")
    story = fxquant.explain(tmp_path / "checkpoint", layer, model=model)
    assert "fxquant::conv2d" in str(story)
    assert story.bytes_before == 4 * (8 * 4 * 9 + 8)
    assert [step.stage for step in fxquant.rewrite_history(tmp_path / "copy", model=model).steps][-1] == "lowered"


def test_a_plan_alone_counts_weights() -> None:
    model = make_dit()
    plan = fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model)).plan
    assert "bytes for the weight; a plan alone does not know the bias" in str(fxquant.explain(plan, LAYER))
    assert "for the weight" not in str(fxquant.explain(plan, LAYER, model=model))
    assert json.loads(json.dumps(fxquant.explain(plan, LAYER).to_json()))["bytes_of_weight"] is True


def test_a_model_without_a_timestep() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval()
    with pytest.raises(MissingTimestepError, match="has no tensor input 'timestep' for the timestep"):
        fxquant.compile(model, recipe="rtn-w8a8", calibrate=lambda: model(torch.randn(2, 4)))
    traced = fxquant.trace(model, timestep=None)
    traced(torch.randn(2, 4))
    for inspect in (fxquant.report, fxquant.rewrite_history, lambda traced: fxquant.explain(traced, "0")):
        with pytest.raises(ConfigurationError, match=r"fxquant.compile"):
            inspect(traced)
