"""Processors that lack what this one has, and threads."""

from __future__ import annotations

import json
import os
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

REPORT = """
import warnings
import torch
import fxquant
from fxquant.backends.native import Native  # Imported before processes are made of this one.
from fxquant.backends.onednn_products import sums_exactly
from fxquant.capture.trace import Architecture
from fxquant.numerics.sqnr import sqnr_db
from tests.tiny import calibrate, inputs, make_dit, run
from tests.traces import traced_once

def report():
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
    print(sqnr_db(run(made["fake-quant"], timestep=None), run(made["native"], timestep=None)), flush=True)
"""
ONE = (
    REPORT
    + """
with traced_once():
    report()
"""
)
FORKED = (
    REPORT
    + """
import json, os, sys

environments = json.loads(sys.argv[1])
with traced_once():
    # Tracing computes nothing: what libraries find out about the processor, each process finds out for itself.
    architecture = Architecture.of(make_dit(), "timestep")
    architecture.capture(architecture.canonical((), inputs()))
    for environment in environments:
        print("=====", flush=True)
        child = os.fork()
        if child == 0:
            os.environ.update(environment)
            try:
                report()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0, environment
"""
)
ISAS = ["AVX2", "AVX512_CORE", "SSE41"]


def run_script(script: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    """What models tell in processes with limited oneDNN. Imported and traced once."""
    environments = [{"ONEDNN_MAX_CPU_ISA": isa} for isa in ISAS]
    said = run_script(FORKED, json.dumps(environments), ATEN_CPU_CAPABILITY="default")  # No compiled kernels.
    _, *parts = said.split("=====\n")
    return dict(zip(ISAS, parts, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_right_without_vnni_and_says_what_is_lost(isa: str, told: dict[str, str]) -> None:
    exact, said, kernel, db = told[isa].splitlines()[-4:]
    assert "The fastest kernels are not used, because this processor has no AVX2" in said or machine.has_tiles()
    if exact == "False":
        assert "without VNNI" in said
        assert "half the speed" in said
        assert "in two halves (no VNNI)" in kernel
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


@pytest.mark.slow
def test_without_a_compiler_another_path_runs_and_says_so(tmp_path: Path) -> None:
    # In a process of its own: torch reads CXX when it is imported.
    said = run_script(ONE, CXX=str(tmp_path / "none"), FXQUANT_CACHE=str(tmp_path))
    assert "The fastest kernels are not used" in said
    assert "onednn qlinear u8 x s8" in said
    assert float(said.splitlines()[-1]) > 45.0


def test_the_compiled_kernels_need_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert machine.instructions() is None
    assert "no AVX2 instructions" in str(machine.missing_kernels.__wrapped__())


@pytest.mark.parametrize(
    ("capability", "vnni", "exact", "chosen"),
    [
        ("AVX512", True, True, "vnni"),
        ("AVX512", True, False, "avx2"),  # ONEDNN_MAX_CPU_ISA forbids VNNI.
        ("AVX512", False, False, "avx2"),
        ("AVX2", True, True, "avx2"),  # ATEN_CPU_CAPABILITY forbids AVX-512.
    ],
)
def test_the_best_instructions_that_are_allowed(
    capability: str, vnni: bool, exact: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(onednn_products, "sums_exactly", lambda: exact)
    found = machine.instructions()
    assert found is not None
    assert found.short == chosen
    assert machine.has_bf16_products() == (chosen == "vnni")


@pytest.mark.exhaustive  # On a machine with AVX-512 this compiles the kernels a second time.
def test_the_kernels_of_avx2_are_right() -> None:
    said = run_script(ONE, ATEN_CPU_CAPABILITY="avx2")
    *_, warned, kernels, db = said.splitlines()
    assert warned == "[]"
    assert "native avx2 u8 x s8" in kernels
    assert float(db) > 45.0


def test_attention_in_bfloat16_needs_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing_kernels", lambda: None)
    monkeypatch.setattr(machine, "has_bf16_products", lambda: False)
    with pytest.raises(BackendError, match=r"no AVX-512 BF16.*export the model here"):
        Native().make_ready(["fxquant_native::vnni_linear", "fxquant_native::bf16_attention_values"])


def test_compiled_kernels_that_cannot_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing_kernels", lambda: "there is no C++ compiler")
    with pytest.raises(BackendError, match=r"no compiled kernels: there is no C\+\+ compiler.*onednn"):
        assert Native("compiled").kernels
    with pytest.raises(BackendError, match="choose auto, compiled, onednn or triton"):
        Native("fast")
    with pytest.raises(BackendError, match="choose bf16 or float"):
        Native(attention="int4")
