"""Processors that lack what this one has, and threads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.backends import onednn_products
from fxquant.backends.native import Native, machine
from fxquant.backends.onednn_products import sums_exactly
from fxquant.errors import BackendError
from tests.tiny import calibrate, make_dit, run

SCRIPT = """
import warnings
import fxquant
from fxquant.backends.onednn_products import sums_exactly
from fxquant.numerics.sqnr import sqnr_db
from tests.tiny import calibrate, make_dit, run

made = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for backend in ("native", "fake-quant"):
        model = make_dit()
        made[backend] = fxquant.compile(
            model, recipe="htg-w8a8", backend=backend, calibrate=calibrate(model), measure=0
        )
print(sums_exactly())
print([str(w.message) for w in caught if issubclass(w.category, fxquant.SpeedWarning)])
print({layer.kernel for layer in fxquant.report(made["native"]).layers if layer.precision == "w8a8"})
print(sqnr_db(run(made["fake-quant"], timestep=None), run(made["native"], timestep=None)))
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "SSE41"])
def test_right_without_vnni_and_says_what_is_lost(isa: str) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    exact, told, kernel, db = done.stdout.splitlines()[-4:]
    lost = "The fastest kernels are not used, because this processor has no (VNNI|AVX-512)"
    assert re.search(lost, told) or exact == "True"
    if exact == "False":
        assert "without VNNI" in told
        assert "half the speed" in told
        assert "in two halves (no VNNI)" in kernel
    elif machine.missing_kernels() is None:
        assert told == "[]"
    assert isa != "AVX2" or exact == "False"
    assert float(db) > 45.0


def test_threads_stay_as_the_user_set_them() -> None:
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            model = make_dit()
            made = fxquant.compile(model, recipe="rtn-w8a8", backend="native", calibrate=calibrate(model), measure=0)
            run(made)
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)


def test_a_torch_without_the_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_products, "has_kernels", lambda: False)
    model = make_dit()
    with pytest.raises(BackendError, match=r"no oneDNN quantized linear.*fake-quant"):
        fxquant.compile(model, recipe="rtn-w8a8", backend=Native("onednn"), calibrate=calibrate(model), measure=0)


def test_this_machine_sums_exactly_if_it_has_the_instructions() -> None:
    if torch.cpu._is_vnni_supported() and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        assert sums_exactly()


def run_script(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_compiler_another_path_runs_and_says_so(tmp_path: Path) -> None:
    told = run_script(SCRIPT, CXX=str(tmp_path / "none"), FXQUANT_CACHE=str(tmp_path))
    assert "The fastest kernels are not used" in told
    assert "onednn qlinear u8 x s8" in told
    assert float(told.splitlines()[-1]) > 45.0


def test_without_wide_instructions_another_path_runs_and_says_so() -> None:
    told = run_script(SCRIPT, ATEN_CPU_CAPABILITY="avx2")
    assert "no AVX-512 instructions" in told
    assert float(told.splitlines()[-1]) > 45.0


def test_compiled_kernels_that_cannot_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing_kernels", lambda: "there is no C++ compiler")
    with pytest.raises(BackendError, match=r"no compiled kernels: there is no C\+\+ compiler.*onednn"):
        assert Native("compiled").kernels
    with pytest.raises(BackendError, match="choose auto, compiled, onednn or triton"):
        Native("fast")
    with pytest.raises(BackendError, match="choose bf16 or float"):
        Native(attention="int4")
