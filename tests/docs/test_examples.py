"""Examples of the documentation do what their page says."""

from __future__ import annotations

import sys
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor, nn

from fxquant.channels.rules import RULES
from fxquant.pipeline.pipeline import PASSES, Pipeline
from fxquant.planning.plan import Plan
from tests.docs.pages import blocks_of
from tests.support import absorb, captured, count, proved


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


def test_the_pass_of_the_page_is_a_pass() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.neg().neg() + 1

    module = captured(Twice(), torch.randn(3, 4)).module
    page = ModuleType("page")  # Dataclasses look up the module that they stand in.
    try:
        with mock.patch.dict(sys.modules, page=page):
            exec(compile(blocks("passes.md")[0], "passes.md", "exec", dont_inherit=True), vars(page))
        (record,) = Pipeline.parse("fuse-double-negation").run(module, Plan("", "", None))
        assert record.edits == 1
        assert count(module, torch.ops.aten.neg.default) == 0
    finally:
        PASSES._objects.pop("fuse-double-negation", None)
