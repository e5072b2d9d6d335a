"""Devices and versions that the kernels do not run on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest
import torch

from fxquant.backends.native import Native
from fxquant.backends.native.gpu import machine
from fxquant.backends.native.gpu.configs import Config, candidates, choose, key
from fxquant.errors import BackendError

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU of the first generation with tensor cores, as torch would tell of it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(machine, "missing_triton", lambda: None)
    machine._missing_on_gpu.cache_clear()
    return monkeypatch


def test_a_gpu_that_is_too_old(gpu: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"Tesla V100 has compute capability 7\.0.*need 8\.0.*'fake-quant'"):
        _ = Native().on(GPU).kernels
    machine._missing_on_gpu.cache_clear()
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert Native().on(GPU).kernels.value == "triton"
    reason = machine.missing(GPU, fp8=True)
    assert reason is not None and "8.9; use a precision such as w8a8" in reason
    machine._missing_on_gpu.cache_clear()


def test_a_model_moves_only_to_a_gpu_with_kernels(gpu: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="Tesla V100"):
        Native().check_device(GPU)
    machine._missing_on_gpu.cache_clear()
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    Native().check_device(GPU)
    machine._missing_on_gpu.cache_clear()


def test_a_triton_that_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise PackageNotFoundError(name)

    for version, message in (
        (none, "not installed; pip install"),
        (lambda name: "3.2.0+git", r"3\.2\.0\+git is too old"),
    ):
        machine.missing_triton.cache_clear()
        monkeypatch.setattr(machine, "version", version)
        with pytest.raises(BackendError, match=message):
            _ = Native().on(GPU).kernels
    machine.missing_triton.cache_clear()


def test_a_processor_runs_them_in_the_interpreter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match=r"only in its interpreter \(TRITON_INTERPRET=1\)"):
        _ = Native("triton").kernels


def test_what_does_not_go_together() -> None:
    with pytest.raises(BackendError, match="'onednn' run on CPUs, and the model is on cuda:0"):
        _ = Native("onednn").on(GPU).kernels


def test_products_of_few_rows_are_cut_otherwise() -> None:
    assert choose("int8", 2, 6912, 1152, "some").block_m == 16
    assert choose("int8", 8192, 4608, 1152, "some").block_m >= 64
    assert {config.block_m for config in candidates("int4", 8)} == {16}
    assert key("int4-g64", 5, 7, 9, "some") == "some/int4-g64/8x9x7"


def test_a_tuned_table_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxquant.backends.native.gpu import configs

    tuned = Config(32, 64, 128, 4, 2)
    monkeypatch.setattr(configs, "_tuned", lambda: {key("int8", 4000, 96, 64, "one"): tuned})
    configs._choose.cache_clear()
    assert choose("int8", 3000, 96, 64, "one") == tuned
    assert choose("int8", 3000, 96, 64, "another") != tuned
    configs._choose.cache_clear()
