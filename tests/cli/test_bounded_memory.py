"""``fxquant quantize --max-memory``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fxquant.cli.__main__ import app
from fxquant.memory import mappings
from fxquant.memory.bound import current

SHORT = ("--recipe", "rtn-w8a8", "--samples", 2, "--steps", 2, "--measure", 0)


def _run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_are_those_without_a_bound(
    float_folder: Path, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mappings, "_SMALLEST", 64)
    options = (float_folder, *SHORT, "--dtype", dtype)
    done = _run("quantize", *options, "--out", tmp_path / "plain")
    assert done.exit_code == 0, done.output
    done = _run("quantize", *options, "--out", tmp_path / "bounded", "--max-memory", "64GB")
    assert done.exit_code == 0, done.output
    plain = {path.relative_to(tmp_path / "plain"): path for path in (tmp_path / "plain").rglob("*.safetensors")}
    assert len(plain) > 2
    for name, path in plain.items():
        assert path.read_bytes() == (tmp_path / "bounded" / name).read_bytes(), name
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "bounded"} and current() is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--max-memory", "lots"), "is not a size"),
        (("--max-memory", "20MB"), "Give at least"),
        (("--max-memory", "64GB", "--scratch", "/proc/none"), "/proc/none"),
    ],
)
def test_bad_options(float_folder: Path, options: Any, told: str, tmp_path: Path) -> None:
    done = _run("quantize", float_folder, *SHORT, "--out", tmp_path / "q", *options)
    assert done.exit_code != 0 and told in " ".join(done.output.split()), done.output
    assert not (tmp_path / "q").exists()
