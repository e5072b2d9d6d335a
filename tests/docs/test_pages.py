"""Every Python block of the documentation runs, in the order of its page, in an empty folder."""

from __future__ import annotations

import ast
import functools
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DiTPipeline

import fxquant
from fxquant.authoring import register_format, register_stage, unregister_stage
from fxquant.channels.rules import RULES
from fxquant.ir import stages
from fxquant.ir.stages import Stage, in_order
from fxquant.numerics.formats.registry import FORMATS
from fxquant.pipeline.backend import BACKENDS
from fxquant.pipeline.pipeline import PASSES
from fxquant.pipeline.recipes import RECIPES
from tests.docs.pages import ROOT, Block, blocks_of, pages
from tests.docs.preludes import ALIKE, PRELUDES, QUICKLY
from tests.numerics.formats.own import BytesOfScales
from tests.tiny import make_pipeline

WITH_CODE = [page for page in pages() if blocks_of(page, "python")]


ALL = [
    *(pytest.param(page, ALIKE.get(page, set()), id=page) for page in WITH_CODE),
    *(pytest.param(page, set(), id=f"{page}, whole", marks=pytest.mark.exhaustive) for page in ALIKE),
]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "left_out"), ALL)
def test_code_runs(page: str, left_out: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiTPipeline, "from_pretrained", lambda *_, **__: make_pipeline())
    if page in QUICKLY:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    module = ModuleType("page")  # Dataclasses look up the module that they stand in.
    monkeypatch.setitem(sys.modules, "page", module)
    with registries_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(PRELUDES.get(page, ""), vars(module))
        for block in blocks_of(page, "python"):
            if block.not_run is None and block.section not in left_out:
                run(block, module)


@pytest.mark.parametrize("page", WITH_CODE)
def test_code_that_is_not_run_uses_names_that_exist(page: str) -> None:
    for block in blocks_of(page, "python"):
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fxquant":
                assert hasattr(fxquant, node.attr), f"{page}:{block.line} uses fxquant.{node.attr}"


def test_preludes_belong_to_pages() -> None:
    assert set(PRELUDES) <= set(WITH_CODE)
    for page, sections in ALIKE.items():
        assert sections <= {block.section for block in blocks_of(page, "python")}


def run(block: Block, module: ModuleType) -> None:
    """Run a block; tracebacks show its line on the page."""
    code = compile("\n" * (block.line - 1) + block.code, str(ROOT / block.page), "exec", dont_inherit=True)
    exec(code, vars(module))


@contextmanager
def registries_kept() -> Iterator[None]:
    """Within this context code may register whatever other packages register; afterwards it is gone."""
    registries = PASSES, RECIPES, BACKENDS, FORMATS
    held: list[dict[Any, Any]] = [*(registry._objects for registry in registries), RULES, stages._REGISTERED]
    known = {*in_order()}
    with ExitStack() as stack:
        stack.callback(lambda: [unregister_stage(each) for each in reversed(in_order()) if each not in known])
        for objects in held:
            stack.enter_context(mock.patch.dict(objects))
        yield


def test_registries_are_as_before_afterwards() -> None:
    """The order of stages and formats too: pages once left both to the tests that followed in the process."""
    before, formats = [*in_order()], [*FORMATS]
    with registries_kept():
        register_format(BytesOfScales.name)(BytesOfScales())
        first = register_stage("page-first", after=Stage.TRANSFORMED)
        register_stage("page-second", after=first)
        assert BytesOfScales.name in FORMATS
    assert in_order() == before
    assert [*FORMATS] == formats
