"""The benchmark of linears with weights alone, on a small linear."""

from __future__ import annotations

import pytest
import torch

from benchmarks.low_bit import weight_only
from fxquant.backends.native import machine
from fxquant.numerics.sqnr import sqnr_db

pytestmark = pytest.mark.skipif(machine.missing_kernels() is not None, reason="there are no compiled kernels here")


def test_systems_compute_the_same() -> None:
    calls, x = weight_only.systems(40, 128, torch.float32), torch.randn(9, 128)
    exact = calls["float"](x)
    compared = [name for name in calls if f"{name} decoded" in calls]
    assert set(compared) == {"nf4-g0", "nf4-g64", "mxfp4-g32", "nvfp4-g16", "fp8-g0"}
    for name in compared:
        assert sqnr_db(calls[f"{name} decoded"](x), calls[name](x)) > 120.0
        assert sqnr_db(exact, calls[name](x)) > 15.0
    for group in (0, 16, 32, 64):
        assert sqnr_db(exact, calls[f"int4-g{group}"](x)) > 15.0


@pytest.mark.slow
def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        weight_only.main(["--shape", "64", "64", "--rows", "2", "--rounds", "1"])
    finally:
        torch.set_num_threads(before)
    text = capsys.readouterr().out
    assert "float32, 2 rows" in text and "bfloat16, 2 rows" in text
    assert text.count("nvfp4-g16") == 2


def test_memory_is_that_of_the_call() -> None:
    held = []
    x, megabyte = torch.zeros(1), 1 << 20

    def call(x: torch.Tensor) -> torch.Tensor:
        held.append(torch.ones(64 * megabyte // 4))
        return x

    assert 60.0 < weight_only.peak_mib(call, x, lambda: None) < 80.0
    assert not held, "the call ran in another process"
    with pytest.raises(RuntimeError, match="ended without a result"):
        weight_only.peak_mib(call, x, lambda: 1 / 0)
