"""The page of behaviours is backed by tests, and what no other test shows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.utils import constants

import fxquant
from fxquant.runtime.model import GraphModel
from tests.runtime.uses import PAGE, USES, Result, Use, page
from tests.tiny import calibrate, inputs, make_dit, run

TESTS = Path(__file__).parents[1]
ROWS = [use for uses in USES.values() for use in uses]


def source_of(test: str) -> ast.FunctionDef:
    """The function of a test."""
    place, _, name = test.partition("::")
    folder, _, file = place.rpartition("/")
    tree = ast.parse((TESTS / folder / f"test_{file}.py").read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == f"test_{name}"]
    assert found, f"there is no test_{name} in tests/{folder}/test_{file}.py"
    return found[0]


def expects_an_error(test: str) -> bool:
    """Whether a test expects an error."""
    return any(isinstance(node, ast.Attribute) and node.attr == "raises" for node in ast.walk(source_of(test)))


@pytest.mark.parametrize("use", ROWS, ids=lambda use: use.what)
def test_every_row_is_shown_by_tests(use: Use) -> None:
    assert use.tests
    errors = [expects_an_error(test) for test in use.tests]
    assert use.result is not Result.REFUSED or all(errors)


def test_the_page_is_up_to_date() -> None:
    """If it fails: ``python -m tests.runtime.uses`` writes it again."""
    assert PAGE.read_text(encoding="utf-8") == page()


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    model = make_dit()
    return fxquant.compile(model, recipe="rtn-w8a16", calibrate=calibrate(model), measure=0)


def test_outputs(quantized: GraphModel) -> None:
    first, second = quantized(**inputs()), quantized(**inputs())
    assert torch.equal(first.sample, second.sample)
    found = quantized(**inputs(), return_dict=False)
    assert type(found) is tuple and len(found) == len(first)
    assert torch.equal(found[0], first.sample)
    assert type(first) is type(make_dit()(**inputs()))


def test_shards_that_are_loaded_in_parallel(
    quantized: GraphModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized.save_pretrained(tmp_path / "model", max_shard_size="5KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    monkeypatch.setattr(constants, "HF_ENABLE_PARALLEL_LOADING", True)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "model")
    assert torch.equal(run(loaded), run(quantized))


def test_nothing_is_trained(quantized: GraphModel) -> None:
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
    assert quantized.num_parameters(only_trainable=True) == 0
    assert not quantized(**inputs()).sample.requires_grad
