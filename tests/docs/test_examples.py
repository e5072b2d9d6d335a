"""Examples of the documentation do what their page says."""

from __future__ import annotations

import ast
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.channels.rules import RULES
from fxquant.numerics.sqnr import sqnr_db
from fxquant.pipeline.backend import Backend
from fxquant.pipeline.recipes import make_recipe
from tests.docs.pages import ROOT, blocks_of
from tests.support import absorb, count, proved
from tests.tiny import calibrate, make_dit, run


def blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return [block.code for block in blocks_of(f"docs/{page}", "python")]


def test_the_rule_of_the_page_is_a_rule() -> None:
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).abs())

    (code,) = blocks("channel-rules.md")
    target = torch.ops.aten.abs.default
    assert target not in RULES
    try:
        exec(compile(code, "channel-rules.md", "exec", dont_inherit=True), {})
        proved(absorb(Behind(), torch.randn(3, 5, 8, dtype=torch.float64)), into=["first"])
    finally:
        RULES.pop(target, None)


def test_the_pass_of_the_page_is_that_of_the_examples() -> None:
    """Line by line, so that the page shows what the tests of the package prove and measure."""
    shown = "\n".join(blocks("write-a-pass.md"))
    package = ROOT / "examples" / "passes" / "example_passes" / "low_rank_branch.py"
    source = package.read_text(encoding="utf-8")
    parts = [ast.get_source_segment(source, part) or "" for part in ast.parse(source).body[2:]]
    assert len(parts) > 6
    for part in parts:
        assert part in shown, part


def test_the_golden_text_of_the_page_is_that_of_the_examples() -> None:
    golden = (ROOT / "examples" / "passes" / "tests" / "low_rank_branch.txt").read_text(encoding="utf-8")
    (text,) = [block.code for block in blocks_of("docs/write-a-pass.md", "text") if "low_rank_in" in block.code]
    assert text in golden


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    """The backend of the page, from its blocks that define it."""
    page = ModuleType("page")
    with mock.patch.dict(sys.modules, page=page):
        for code in blocks("write-a-backend.md")[:2]:
            exec(compile(code, "write-a-backend.md", "exec", dont_inherit=True), vars(page))
        yield page.Int8Storage()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["rtn-w3a6", pytest.param("dynamic-w4a8", marks=pytest.mark.exhaustive), "htg-w8a8"])
def test_the_backend_of_the_page_agrees_with_the_reference(backend: Backend, recipe: str) -> None:
    model, chosen = make_dit(), make_recipe(recipe, "all")
    if recipe.startswith("htg"):
        chosen = chosen.with_options("group-timesteps", groups=2)
    mine = fxquant.compile(model, recipe=chosen, calibrate=calibrate(model), backend=backend)
    reference = fxquant.compile(model, plan=mine.plan)
    assert count(mine.graphs[0], torch.ops.fxquant.linear.default) == 0
    for options in ({}, {"size": 4}, {"batch": 1}):  # The second one captures another graph.
        assert sqnr_db(run(reference, **options), run(mine, **options)) > 90
    assert torch.equal(run(copy.deepcopy(mine)), run(mine))


@pytest.mark.slow
def test_the_backend_of_the_page_lowers_loaded_models(backend: Backend, tmp_path: Path) -> None:
    model = make_dit()
    recipe = make_recipe("htg-w4a8").with_options("group-timesteps", groups=2)
    mine = fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), backend=backend)
    fxquant.save(mine, tmp_path / "dit")
    loaded = fxquant.load(tmp_path / "dit", backend=backend)
    assert torch.equal(run(loaded), run(mine))
    assert torch.equal(run(loaded, size=4), run(mine, size=4))
    assert all(tensor.dtype == torch.int8 for name, tensor in loaded.tensors().items() if name.endswith("_int8"))
