"""Training: a smoke run end to end, and a killed run that ends where an uninterrupted one does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples.digits import generate, load_classifier, load_pipeline
from examples.digits.train import SMOKE, main, train
from examples.digits.trainer import Stage, fit


class Killed(Exception):
    """Stands for a kill: it stops the run wherever it is."""


def _weights(out: Path) -> dict[str, torch.Tensor]:
    files = sorted(out.glob("*/**/*.safetensors"))
    return {f"{file.parent.name}.{name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    train(SMOKE, tmp_path / "whole")
    for stage, step in (("vae", 3), ("classifier", 1), ("transformer", 5)):

        def kill(name: str, done: int, total: int, loss: float, at: tuple[str, int] = (stage, step)) -> None:
            if (name, done) == at:
                raise Killed

        with pytest.raises(Killed):
            train(SMOKE, tmp_path / "killed", progress=kill)
    steps: list[tuple[str, int]] = []
    train(SMOKE, tmp_path / "killed", progress=lambda name, done, total, loss: steps.append((name, done)))
    assert steps == [("transformer", 5), ("transformer", 6)], "work before the last snapshot was done again"

    whole, resumed = _weights(tmp_path / "whole"), _weights(tmp_path / "killed")
    assert whole.keys() == resumed.keys() and len(whole) > 50
    for name, value in whole.items():
        assert torch.allclose(value.float(), resumed[name].float(), atol=1e-3), name


@pytest.mark.slow
def test_command_line_writes_a_loadable_pipeline(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    main(["--smoke", "--out", str(tmp_path), "--seed", "1", "--threads", str(threads)])
    pipe, classifier = load_pipeline(tmp_path / "pipeline"), load_classifier(tmp_path / "classifier")
    images = generate(pipe, [0, 9], steps=1)
    assert classifier(2 * images - 1).shape == (2, 10)
    with pytest.raises(ValueError, match="belongs to the run"):
        main(["--smoke", "--out", str(tmp_path), "--seed", "2", "--threads", str(threads)])


def test_missing_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"examples\.digits\.train"):
        load_pipeline(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"examples\.digits\.train"):
        load_classifier(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    stage = Stage("bad", model, lambda _: model(torch.ones(1)).sum() * float("nan"), steps=2, learning_rate=0.1)
    with pytest.raises(FloatingPointError, match="step 0"):
        fit(stage, seed=0, folder=tmp_path)
