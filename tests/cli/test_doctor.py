"""``fxquant doctor``."""

from __future__ import annotations

import json
import platform

import pytest
import torch
from typer.testing import CliRunner

from fxquant.backends.native import machine as native_machine
from fxquant.backends.torchao import parts
from fxquant.cli.__main__ import app
from fxquant.inspect import machine
from fxquant.pipeline.backend import BACKENDS


def test_json() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["backends"]) == set(BACKENDS)
    assert found["processor"]["threads of torch"] == torch.get_num_threads()
    assert found["backends"]["fake-quant"]["cpu"].startswith("runs")


def test_text() -> None:
    done = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    assert done.exit_code == 0
    for part in ("versions", "AVX-512 VNNI", "native", "torch.compile", torch.__version__):
        assert part in done.stdout


def test_why_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_machine, "missing_kernels", lambda: "there is no C++ compiler")
    monkeypatch.setattr(native_machine, "has_tiles", lambda: False)
    monkeypatch.setattr(parts, "missing", lambda: "torchao is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = machine.examine()["backends"]
    assert "not the compiled kernels, because there is no C++ compiler" in found["native"]["cpu"]
    assert found["native"]["cuda"] == "does not run: torch finds no NVIDIA GPU here"
    assert found["torchao"]["cpu"] == "does not run: torchao is not installed"


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    assert machine.examine()["versions"]["no-such-package"] is None
    assert "not installed" in CliRunner().invoke(app, ["doctor"], catch_exceptions=False).stdout
