"""The commands of ``docs/reproduce.md`` run in a small form: a DiT with random weights, few images and steps, a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMScheduler

from tests.cli.test_cli import run
from tests.docs.pages import commands_of
from tests.evaluation.pipes import make_pipe

SMALL = {"--samples": "2", "--steps": "2", "--batch": "5", "--device": "cpu"}
"""What takes the place of the values of options."""

IMAGES = {"10000": "11", "50000": "16"}
COMMANDS = list(commands_of("docs/reproduce.md", "fxquant"))


def small(words: list[str]) -> list[str]:
    """A command with small values; the small model's layers have too few columns for groups of 64."""
    words = [word.replace("-g64", "-g8") for word in words]
    found = [SMALL.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    found = [
        IMAGES.get(word, word) if before == "--images" else word
        for before, word in zip(["", *found], found, strict=False)
    ]
    return found + (["--features", "tests.evaluation.pipes:pooled", "--json"] if words[0] == "eval" else [])


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_each_quantized_model_is_evaluated_with_the_steps_of_the_tables() -> None:
    made = [value(words, "--out") for words in COMMANDS if words[0] == "quantize"]
    evaluated = {(words[1], int(value(words, "--steps"))) for words in COMMANDS if words[0] == "eval"}
    assert {model for model, _ in evaluated} == {*made} and len(made) == 9
    for model in ("ptq4dit-w8a8", "ptq4dit-w4a8", "ptq4dit-gptq-w4a8"):
        assert {steps for name, steps in evaluated if name == model} == {250, 100, 50}
    assert {steps for name, steps in evaluated if "512" in name} == {100, 50}


def test_settings_are_those_of_the_papers() -> None:
    for words in COMMANDS:
        assert value(words, "--guidance") == "1.5"
        if words[0] == "quantize":
            settings = int(value(words, "--samples")), int(value(words, "--steps"))
            assert settings == {"dit-512": (64, 10)}.get(words[1], (32, 100 if "htg" in words[-1] else 25))
            assert value(words, "--layers") == "all"
        else:  # Models share float images only of the same steps.
            assert value(words, "--work") == f"runs/{words[1]}-{value(words, '--steps')}"
            assert value(words, "--float-work").endswith(f"-{value(words, '--steps')}")
            assert (
                ("512" in value(words, "--float-work")) == ("512" in words[1]) == ("512" in value(words, "--against"))
            )


@pytest.mark.slow
@pytest.mark.parametrize("work", ["runs/ptq4dit-w8a8-250", pytest.param("", id="all", marks=pytest.mark.exhaustive)])
def test_the_commands_run(work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = make_pipe()
    pipe.register_modules(scheduler=DDPMScheduler())
    for folder in ("dit-256", "dit-512"):
        pipe.save_pretrained(folder)
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    for name in ("VIRTUAL_imagenet256_labeled.npz", "VIRTUAL_imagenet512.npz"):
        np.savez(name, arr_0=images)
    evaluations = [words for words in COMMANDS if words[0] == "eval" and work in ("", value(words, "--work"))]
    models = {words[1] for words in evaluations}
    evaluated = []
    for words in COMMANDS:
        if words not in evaluations and (words[0] == "eval" or value(words, "--out") not in models):
            continue
        result = run(*small(words))
        assert result.exit_code == 0, (words, result.output)
        if words[0] == "eval":
            data = json.loads(result.stdout)
            both = data["metrics"].keys() & data["float_metrics"].keys()
            assert {"fid", "sfid", "inception_score", "precision"} <= both
            evaluated.append((data["images"], "3 of 4 batches" in result.stderr))
    assert evaluated.count((16, True)) == 1 and len(evaluated) == (2 if work else len(evaluations))
