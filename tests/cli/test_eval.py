"""``fxquant eval``: figures, limits and refusals on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fxquant
from fxquant.evaluation.evaluate import evaluate
from tests.cli.test_cli import refused, run
from tests.evaluation.pipes import Pooled, make_pipe, quantized_pipe

FAST = ("--images", "13", "--batch", "5", "--steps", "2", "--features", "tests.evaluation.pipes:pooled")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipelines ``float`` and ``w4a8``, and ``reference.npz``."""
    place = tmp_path_factory.mktemp("pipelines")
    make_pipe().save_pretrained(place / "float")
    fxquant.save_pipeline(quantized_pipe(), place / "w4a8")
    generator = np.random.default_rng(0)
    np.savez(place / "reference.npz", arr_0=generator.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8))
    return place


@pytest.mark.slow
def test_figures_limits_and_picture(folders: Path, tmp_path: Path) -> None:
    inputs = (folders / "w4a8", "--reference", folders / "float", "--against", folders / "reference.npz", *FAST)
    work = ("--work", tmp_path / "work", "--picture", tmp_path / "grid.png")
    result = run("eval", *inputs, *work, "--min-psnr", "5", "--max-fid", "1e6", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["failures"] == {} and data["limits"] == {"fid": 1e6, "psnr": 5}
    options = {"images": 13, "batch": 5, "steps": 2, "features": Pooled(), "against": folders / "reference.npz"}
    direct = evaluate(folders / "w4a8", folders / "float", **options)  # type: ignore[arg-type]
    assert direct is not None
    assert data["metrics"] == direct.to_json()["metrics"]
    assert (tmp_path / "grid.png").is_file()
    beyond = run("eval", *inputs, *work, "--min-psnr", "inf", "--max-fid", "inf", "--json")
    assert beyond.exit_code == 1
    assert json.loads(beyond.stdout, parse_constant=pytest.fail)["limits"] == {"fid": "inf", "psnr": "inf"}
    again = run("eval", *inputs, *work, "--min-psnr", "200", "--max-fid", "1e6", "--max-fid-to-float", "0")
    assert again.exit_code == 1
    assert f"psnr is {direct['psnr']:.2f}, {200 - direct['psnr']:.2f} below its limit 200" in again.stderr
    assert "fid_to_float is" in again.stderr and "above its limit 0" in again.stderr
    assert "error: fid is" not in again.stderr
    assert "3 of 3 batches" in again.stderr
    assert "inception_score" in again.stdout and "lpips: needs the weights of AlexNet" in again.stdout


@pytest.mark.slow
def test_refusals(folders: Path, tmp_path: Path) -> None:
    quantized = folders / "w4a8"
    cases = [
        (("--max-lpips", "0.1", "--reference", folders / "float"), "alexnet-owt-7be5be79.pth"),
        (("--max-fid", "5"), "fid needs real images"),
        (("--metrics", "fid,fjd"), "unknown metric 'fjd'"),
        (("--shard", "1-2"), "--shard 1-2: write it as I/N"),
        (("--labels", "three"), "--labels three"),
        (("--labels", "3", "--reference", tmp_path), "is not a pipeline"),
        (("--reference", "./nowhere"), "there is no folder nowhere"),
        (("--against", tmp_path / "no.npz"), "cannot be read as an npz"),
        (("--features-input", "bytes", *FAST[-2:]), "'unit' or 'uint8'"),
        (("--features", "nothing"), "module:attribute"),
        (("--inception", tmp_path / "no.pth"), "--inception"),
        (("--prompts", quantized / "model_index.json", "-r", folders / "float"), "class labels, not prompts"),
        ((), "no metric can run"),
    ]
    for options, reason in cases:
        assert reason in refused("eval", quantized, "--images", "2", "--steps", "1", *options), options


@pytest.mark.slow
def test_shares_and_other_settings(folders: Path, tmp_path: Path) -> None:
    inputs = (folders / "w4a8", *FAST, "--work", tmp_path)
    for share in ("0/2", "1/2"):
        result = run("eval", *inputs, "--shard", share)
        assert result.exit_code == 0 and f"share {share} is made" in result.stderr
        assert result.stdout == ""
    result = run("eval", *inputs)
    assert "3 of 3 batches" in result.stderr and "inception_score" in result.stdout
    assert "seed 0, not 1" in refused("eval", *inputs, "--seed", "1")
    result = run("eval", *inputs, "--seed", "1", "--overwrite")
    assert result.exit_code == 0 and "were removed" in result.stderr


@pytest.mark.exhaustive
def test_torchrun(folders: Path, tmp_path: Path) -> None:
    """Two ranks make one table, equal to that of one process."""
    options = [folders / "w4a8", *FAST, "--json"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fxquant.cli", "eval"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *map(str, options), "--work", str(tmp_path / "work")],
        env=environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    alone = run("eval", *options)
    assert json.loads(result.stdout)["metrics"] == json.loads(alone.stdout)["metrics"]
    assert "this rank's share is made" in result.stderr
