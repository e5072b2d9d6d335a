"""The demo's table: which rows it has, in which order they are printed, and what one row holds."""

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from rich.console import Console

from examples.digits import compare, demo, rows
from examples.digits.compare import Result
from examples.digits.rows import Job, Measured
from fxquant.evaluation.result import Evaluation
from fxquant.pipeline.recipes import make_recipe


def result_of(job: Job) -> Result:
    return Result(job.model, job.recipe, job.layers, 40.0, 20.0, 50.0, 0.5, 1.0, 4.0, 3.0)


def test_rows_are_printed_in_order_whichever_is_measured_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(jobs: dict[str, list[Job]], count: int, out: Path) -> Iterator[tuple[Job, Measured]]:
        for model in ("planted", "plain"):
            for job in jobs[model]:
                yield job, Measured(result_of(job), torch.zeros(2, 3, 32, 32))

    monkeypatch.setattr(demo, "measure_all", measured)
    text = StringIO()
    methods, console = {"w8a8": ("rtn", "ptq4dit")}, Console(file=text, width=200)
    results = demo.run(tmp_path, 2, methods, demo.PRECISIONS, console)
    printed = [(line.split()[0], line.split()[1]) for line in text.getvalue().splitlines()]
    assert printed == [
        ("plain", "float"),
        ("planted", "float"),
        ("plain", "rtn-w8a8"),
        ("planted", "rtn-w8a8"),
        ("plain", "ptq4dit-w8a8"),
        ("planted", "ptq4dit-w8a8"),
        ("plain", "ptq4dit-w8a8"),
        ("plain", "ptq4dit-w4a8"),
    ]
    assert [(result.model, result.recipe) for result in results] == printed
    assert len(json.loads((tmp_path / "results.json").read_text())) == 8
    assert (tmp_path / "samples.png").stat().st_size > 1000


def test_the_evaluation_is_printed_below_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(jobs: dict[str, list[Job]], count: int, out: Path) -> Iterator[tuple[Job, Measured]]:
        for job in (job for each in jobs.values() for job in each):
            found = Evaluation({"psnr": 41.5}, images=count) if job == rows.EVALUATED else None
            yield job, Measured(result_of(job), torch.zeros(2, 3, 32, 32), found)

    monkeypatch.setattr(demo, "measure_all", measured)
    text = StringIO()
    demo.run(tmp_path, 2, demo.METHODS, (), Console(file=text, width=200))
    below = text.getvalue().partition("fxquant eval of ptq4dit-gptq-w4a8 (plain)")[2].splitlines()
    assert below[-1].split() == ["psnr", "41.50", "higher", "2"]


def test_the_demo_shows_each_method_once_and_the_choice_of_layers_on_one_model() -> None:
    jobs = [job for model in rows.MODELS for job in demo.jobs_of(model, demo.METHODS, demo.SHOWN_WITH_ALL_LAYERS)]
    assert len(jobs) == len(set(jobs)) == 19
    assert [job for job in jobs if job.layers == "all"] == [Job("plain", "ptq4dit-w4a8", "all")]


@pytest.mark.slow
def test_the_float_row_compares_the_model_with_itself(pipe: DiTPipeline, tmp_path: Path) -> None:
    ((_, found),) = rows.rows(pipe, "plain", [Job("plain", "float", "")], 66, tmp_path)
    assert found.images.shape == (rows.SHOWN, 3, 32, 32)
    assert found.result.accuracy > 0.9 and found.result.seconds == 0
    assert demo.row(found.result).split()[2:4] == ["-", "-"]


@pytest.mark.exhaustive
def test_the_size_is_that_of_a_checkpoint(pipe: DiTPipeline, tmp_path: Path) -> None:
    calibrated = compare.Calibrated(pipe, pipe.transformer, "default")
    quantized, _ = calibrated.quantize(make_recipe("htg-w4a8"))
    quantized.save_pretrained(tmp_path / "checkpoint")
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoint").glob("*.safetensors"))
    assert compare.checkpoint_megabytes(quantized) == size / 1e6
    # The bits of activations are those of the recipe too, not those of the shared calibration.
    plan = calibrated.quantize(make_recipe("ptq4dit-w6a4"))[0].plan
    assert {(layer.weight_bits, layer.activation_bits) for layer in plan.layers.values()} >= {(6, 4)}
    assert not any(layer.activation_bits == 8 for layer in plan.layers.values())
