"""The checks of the benchmark on GPUs, its turns and its tables. No test looks at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import session as sessions
from benchmarks.gpu.check import Wrong, check_model, check_product
from benchmarks.gpu.job import Exact, Job
from benchmarks.gpu.matmuls import SMALL, Cell, Lost, measure_shape, peaks
from benchmarks.gpu.modes import Mode
from benchmarks.gpu.products import Case, Product, all_products
from benchmarks.gpu.session import Row, Session
from benchmarks.gpu.systems import BF16, Made, System, settings_kept
from benchmarks.gpu.table import page, products_table, systems_table
from benchmarks.gpu.tune import tune
from benchmarks.models import models_of, task_of
from fxquant.backends.native.gpu import configs
from fxquant.backends.native.gpu.configs import candidates, key

CPU = torch.device("cpu")
PLAIN = next(product for product in all_products() if product.name == "torch.mm")


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def case() -> Case:
    return PLAIN.make((33, 64, 48), CPU)


class TestProducts:
    @pytest.mark.parametrize("product", all_products(), ids=lambda product: product.name)
    def test_all_are_right(self, product: Product) -> None:
        cells = measure_shape(SMALL[0], [product], CPU, rounds=1, caches=None)
        assert [(cell.failed, cell.wrong, cell.seconds) for cell in cells] == [(None, False, [])]
        assert cells[0].found is not None and cells[0].found.elements == 33 * 48

    def test_what_is_never_written_is_found(self, case: Case) -> None:
        check_product(case, case.run)
        stale = case.run().clone()
        with pytest.raises(Wrong, match=r"\(100.00%\) differ from float64"):
            check_product(replace(case, target=stale), lambda: stale)
        with pytest.raises(Wrong, match=r"1584 of 1584"):
            check_product(replace(case, target=None), lambda: torch.empty(33, 48, dtype=torch.bfloat16))

    def test_one_wrong_element_is_found(self, case: Case) -> None:
        def off() -> torch.Tensor:
            output = case.run()
            output[5, 7] += 1
            return output

        with pytest.raises(Wrong, match="1 of 1584 elements"):
            check_product(case, off)

    def test_peaks_are_those_of_large_squares(self) -> None:
        cells = [
            Cell((4096, 4096, 4096), "a", "int8", seconds=[2e-4]),
            Cell((4096, 4096, 4096), "b", "int8", seconds=[1e-4]),
            Cell((512, 4096, 4096), "a", "int8", seconds=[1e-9]),
            Cell((8192, 8192, 8192), "c", "fp8", failed="no"),
        ]
        assert peaks(cells) == {"int8": pytest.approx(2 * 4096**3 / 1e-4)}


class TestModels:
    def test_outputs_have_to_be_near_and_new(self) -> None:
        exact = Exact(torch.randn(2, 3), "float32")
        assert check_model(exact.output.bfloat16, exact, 25.0) > 25.0
        stale = exact.output.clone()
        with pytest.raises(Wrong, match=r"100.00% of the output are not finite"):
            check_model(lambda: stale, exact, 25.0)
        with pytest.raises(Wrong, match="is below"):
            check_model(lambda: exact.output * 2, exact, 25.0)
        with pytest.raises(Wrong, match="shape"):
            check_model(exact.output[:1].clone, exact, 25.0)

    def test_a_session_lists_what_fails_and_goes_on(self) -> None:
        def fail(job: Job) -> torch.nn.Module:
            raise RuntimeError("no such thing\nin two lines")

        def worse(job: Job) -> torch.nn.Module:
            model = BF16.make(job)
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            return model

        makings = (BF16, Made("broken", fail, 25.0), Made("worse", worse, 25.0), Made("none", fail, 25.0, ("nowhere",)))
        seen: list[int] = []
        session = Session(Job(task_of("tiny:1"), CPU), 0, lambda: False, lambda rows: seen.append(len(rows)))
        rows = session.measure([System(made, Mode.EAGER) for made in makings])
        assert [row.failed is None for row in rows] == [True, False, False, False]
        assert [row.wrong for row in rows] == [False, False, True, False]
        assert rows[1].failed == "RuntimeError: no such thing"
        assert rows[3].failed == "nowhere is not installed"
        assert seen[-1] == 4 and not any(row.seconds for row in rows)

    def test_when_time_is_up_nothing_is_begun(self) -> None:
        session = Session(Job(task_of("tiny:1"), CPU), 0, lambda: True, lambda rows: None)
        rows = session.measure([System(BF16, Mode.EAGER), System(BF16, Mode.COMPILED)])
        assert [row.failed for row in rows] == ["the time limit was reached"] * 2

    def test_a_lost_device_ends_the_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def lost(error: Exception) -> None:
            raise Lost("the device was lost")

        def fail(job: Job) -> torch.nn.Module:
            raise RuntimeError

        monkeypatch.setattr(sessions, "still_there", lost)
        systems = [System(Made(name, make, 25.0), Mode.EAGER) for name, make in
                   (("bf16", BF16.make), ("broken", fail), ("next", BF16.make))]  # fmt: skip
        session = Session(Job(task_of("tiny:1"), CPU), 0, lambda: False, lambda rows: None)
        with pytest.raises(Lost):
            session.measure(systems)
        assert [row.system for row in session.rows if row.failed] == ["broken, eager", "next, eager"]

    def test_settings_of_libraries_are_undone(self) -> None:
        before = torch._inductor.config.coordinate_descent_tuning, torch.get_float32_matmul_precision()
        with settings_kept():
            torch._inductor.config.coordinate_descent_tuning = not before[0]
            torch.set_float32_matmul_precision("medium")
        assert before == (torch._inductor.config.coordinate_descent_tuning, torch.get_float32_matmul_precision())


class TestTables:
    def test_systems(self) -> None:
        rows = [
            Row("bf16", sqnr_db=40.0, seconds=[0.002, 0.002], ratios=[1.0, 1.0], weights=2 * 10**6, peak=3 * 10**6),
            Row("ours", sqnr_db=30.0, seconds=[0.001], ratios=[2.0]),
            Row("theirs", failed="too old"),
        ]
        text = systems_table(rows)
        assert "2.000 to 2.000" in text and "2.00" in text
        assert "In fewer rounds than the 2 of the others: ours (1)." in text
        assert "- theirs: too old" in text
        checked = systems_table([Row("bf16", sqnr_db=40.0)])
        assert checked.split() == ["system", "SQNR", "dB", "--------", "---------", "bf16", "40.0"]

    def test_products(self) -> None:
        cell = Cell((4096, 1152, 1152), "ours", "int8", seconds=[1e-5])
        text = products_table([cell], {"int8": 2 * cell.rate}, {cell.shape: 3})
        assert "4096 x 1152 x 1152" in text and "1087 (0.50)" in text

    def test_a_page_without_times_says_so(self) -> None:
        text = page({"device": "x86", "python": "3", "versions": {}, "date": "today"}, 0, [("A", "b")])
        assert text.startswith("# Checks of the benchmark for GPUs") and "nothing was timed" in text


def test_models_have_batches() -> None:
    assert models_of("dit,flux:4+8@1", "2,16") == (("dit", 2), ("dit", 16), ("flux:4+8", 1))
    with pytest.raises(ValueError, match="samples come in pairs"):
        models_of("dit@3", "2")
    with pytest.raises(ValueError, match="is not a model"):
        models_of("flux:4@1", "2")


class TestTuning:
    def test_the_fastest_way_that_is_right_is_in_the_table(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shape, out = (100, 64, 48), tmp_path / "table.json"
        out.write_text('{"other/int8/1x2x3": {"block_m": 64, "block_n": 64}}')
        times = iter(range(1000, 0, -1))  # Each way is faster than the one before.
        found = tune([shape], CPU, "some", lambda run: 1e-6 * next(times), out)
        assert set(found) == {key(kind, 100, 48, 64, "some") for kind in ("int8", "int4", "int4-g64", "fp8")}
        assert found[key("int8", 100, 48, 64, "some")] == candidates("int8", 100)[-1]
        assert set(json.loads(out.read_text())) == {"other/int8/1x2x3", *found}
        monkeypatch.setattr(configs, "tuned_files", lambda: [tmp_path / "none.json", out])
        configs._tuned.cache_clear()
        configs._choose.cache_clear()
        try:
            assert configs.choose("int4", 100, 48, 64, "some") == candidates("int4", 100)[-1]
        finally:
            configs._tuned.cache_clear()
            configs._choose.cache_clear()

    def test_ways_that_are_wrong_are_left_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(case: Case, run: Any) -> None:
            raise Wrong("it is wrong")

        monkeypatch.setattr("benchmarks.gpu.tune.check_product", refuse)
        assert tune([(20, 64, 48)], CPU, "some", lambda run: 1.0, tmp_path / "table.json") == {}
