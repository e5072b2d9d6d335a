"""The benchmark of other quantizers, on a tiny model."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from benchmarks.models import task_of
from benchmarks.other_tools import TOOLS, balanced_task, mean_sqnr


@pytest.mark.slow
def test_a_balanced_task_computes_the_same_and_is_quantized() -> None:
    pytest.importorskip("torchao")
    task = task_of("tiny:1", 2)
    task = replace(task, tests=tuple(task.calls[:1]))
    balanced = balanced_task(task, "smoothquant-w8a8")
    with torch.no_grad():
        reference = [task.model()(**call)[0] for call in task.tests]
        again = balanced.model()(**task.tests[0])[0]
    assert not torch.equal(again, reference[0]) and (again - reference[0]).abs().max() < 1e-3 * reference[0].abs().max()
    tool = next(tool for tool in TOOLS if tool.name.startswith("torchao"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert 10 < mean_sqnr(tool, balanced, reference) < 100


def test_names_of_tools_are_unique() -> None:
    assert len({tool.name for tool in TOOLS}) == len(TOOLS)
