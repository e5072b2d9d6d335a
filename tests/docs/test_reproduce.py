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


def test_each_quantized_model_is_evaluated() -> None:
    made = [words[words.index("--out") + 1] for words in COMMANDS if words[0] == "quantize"]
    assert set(made) == {words[1] for words in COMMANDS if words[0] == "eval"} and len(made) == 8


@pytest.mark.parametrize("which", ["ptq4dit-w8a8", pytest.param("", id="all", marks=pytest.mark.exhaustive)])
def test_the_commands_run(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = make_pipe()
    pipe.register_modules(scheduler=DDPMScheduler())
    for folder in ("dit-256", "dit-512"):
        pipe.save_pretrained(folder)
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    for name in ("VIRTUAL_imagenet256_labeled.npz", "VIRTUAL_imagenet512.npz"):
        np.savez(name, arr_0=images)
    evaluated = []
    for words in COMMANDS:
        if which not in ("", words[-1], words[1]):  # The end of a conversion, and the beginning of an evaluation.
            continue
        result = run(*small(words))
        assert result.exit_code == 0, (words, result.output)
        if words[0] == "eval":
            data = json.loads(result.stdout)
            both = data["metrics"].keys() & data["float_metrics"].keys()
            assert {"fid", "sfid", "inception_score", "precision"} <= both
            evaluated.append((data["images"], "3 of 4 batches" in result.stderr))
    assert evaluated.count((16, True)) == 1 and len(evaluated) == (2 if which else 9)
