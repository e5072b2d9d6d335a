"""The benchmark's own machinery: turns, groups, failures and tables. No test looks at a time."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from benchmarks.cpu import rounds
from benchmarks.cpu.rounds import Digits, Failed, Measured, Row, Settings, measure, present, sqnr_db
from benchmarks.cpu.systems import REFERENCE, Stored, System, all_systems
from benchmarks.cpu.table import machine, page, table, to_json
from benchmarks.models import cast, linear_shapes, task_of
from benchmarks.shapes import SHAPES

SETTINGS = Settings("tiny:1", batch=2, rounds=2, threads=1, together=3)


def system(name: str, stored: str | None = None) -> System:
    return System(name, lambda task, folder: None, None if stored is None else Stored(stored, lambda t, f: None))


class Fake:
    """A process that answers at once. The log says who was called when."""

    log: list[str]
    broken: dict[str, str]

    def __init__(self, settings, mode, name="", folder="", scratch=""):
        self.mode, self.name, self.scratch, self.calls = mode, name or mode, scratch, 0
        self.log.append(f"{mode} {name}".strip())
        if mode == "serve":
            numpy.save(Path(scratch) / "output.npy", numpy.full(4, 1.0 if name == REFERENCE else 1.1))

    def read(self):
        if self.mode in self.broken.get(self.name, ""):
            raise Failed("ValueError: it does not like the model")
        return {
            "serve": {"started": 1.0, "resident": 10**6, "peak": 2 * 10**6, "output": f"{self.scratch}/output.npy"},
            "prepare": {"done": True},
            "digits": {"sqnr_db": 30.0},
            "roofline": {"operations": 10**9},
        }[self.mode]

    def turn(self):
        self.calls += 1
        self.log.append(self.name)
        if self.broken.get(self.name) == f"turn {self.calls}":
            raise Failed("its process ended with -9")
        return {"seconds": 0.4 if self.name == REFERENCE else 0.1, "rates": {"a": 50.0, "b": 100.0}}

    def close(self):
        self.log.append(f"end {self.name}")


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(Fake, "log", [], raising=False)
    monkeypatch.setattr(Fake, "broken", {}, raising=False)
    monkeypatch.setattr(rounds, "Process", Fake)
    monkeypatch.setattr(rounds, "available_memory", lambda: None)
    return Fake


class TestRounds:
    def test_systems_have_turns(self, fakes):
        found = measure(SETTINGS, [system(REFERENCE), system("a"), system("b")])
        turns = [line for line in fakes.log if " " not in line or line == REFERENCE]
        assert turns == ["roofline", *(2 * [REFERENCE, "a", "b", "roofline"])]
        assert [row.system for row in found.rows] == [REFERENCE, "a", "b"]
        assert found.rows[1].seconds == [0.1, 0.1]
        assert found.rows[1].speedup == pytest.approx(4.0)
        assert found.rows[1].sqnr_db == pytest.approx(20.0)
        assert found.rows[0].sqnr_db is None
        assert found.floor == pytest.approx(0.01), "10**9 operations at the best rate of a round"
        assert fakes.log.count(f"end {REFERENCE}") == 1

    def test_what_fits_is_measured_at_a_time_beside_the_reference(self, fakes):
        found = measure(SETTINGS, [system(REFERENCE), *(system(name) for name in "abc")])
        assert fakes.log.index("end a") < fakes.log.index("serve c")
        assert len(found.rows[0].seconds) == 4
        assert {len(row.seconds) for row in found.rows[1:]} == {2}

    def test_memory_bounds_a_group_too(self, fakes, monkeypatch):
        monkeypatch.setattr(rounds, "available_memory", lambda: 10**6)
        measure(SETTINGS, [system(REFERENCE), system("a"), system("b")])
        assert fakes.log.index("end a") < fakes.log.index("serve b")

    def test_main_systems_are_first_and_the_table_keeps_the_order(self, fakes):
        systems = [system(REFERENCE), system("a"), replace(system("b"), main=True)]
        found = measure(replace(SETTINGS, until=time.monotonic() + 1000), systems)
        assert fakes.log.index("serve b") < fakes.log.index("serve a")
        assert [row.system for row in found.rows] == [REFERENCE, "a", "b"]
        assert all(len(row.seconds) == 2 for row in found.rows)

    def test_nothing_is_started_when_the_time_is_used_up(self, fakes, tmp_path):
        ended = replace(SETTINGS, until=time.monotonic() - 1)
        found = measure(ended, [system(REFERENCE), system("a"), system("b")])
        assert [row.failed for row in found.rows] == [None, rounds.NO_TIME, rounds.NO_TIME]
        assert len(found.rows[0].seconds) == 2
        assert f"- a: {rounds.NO_TIME}" in table(found)
        rows = [Row("a")]
        Digits(ended, tmp_path).fill(rows, [system("a")])
        assert rows[0].digits_failed == rounds.NO_TIME
        assert not any(line.startswith(("serve a", "digits")) for line in fakes.log)

    def test_what_several_load_is_made_once(self, fakes):
        measure(SETTINGS, [system(REFERENCE), system("a", "w8"), system("b", "w8")])
        assert [line for line in fakes.log if line.startswith("prepare")] == ["prepare a"]

    @pytest.mark.parametrize("when", ["serve", "prepare", "turn 1", "turn 2"])
    def test_a_failure_costs_its_own_row(self, fakes, when):
        fakes.broken["a"] = when
        found = measure(SETTINGS, [system(REFERENCE), system("a", "w8"), system("b")])
        assert found.rows[1].failed is not None
        assert len(found.rows[2].seconds) == 2
        text = table(found)
        assert f"- a: {found.rows[1].failed}" in text
        assert json.loads(json.dumps(to_json("t", SETTINGS, found), allow_nan=False))["rows"][1] == {
            "system": "a", "failed": found.rows[1].failed,
        }  # fmt: skip

    def test_without_a_roofline(self, fakes):
        fakes.broken["roofline"] = "roofline"
        found = measure(SETTINGS, [system(REFERENCE)])
        assert found.floor is None
        assert "No roofline: ValueError: it does not like the model." in table(found)
        assert "of int8" not in table(found)

    def test_a_reference_that_fails_ends_it(self, fakes):
        fakes.broken[REFERENCE] = "serve"
        found = measure(SETTINGS, [system(REFERENCE), system("a")])
        assert [row.system for row in found.rows] == [REFERENCE]

    def test_digits_are_asked_for_once(self, fakes, tmp_path):
        fakes.broken["b"] = "digits"
        digits = Digits(SETTINGS, tmp_path)
        systems = [system(name) for name in (REFERENCE, "a", "b", "c")]
        for _ in range(2):
            rows = [Row(REFERENCE), Row("a"), Row("b"), Row("c", failed="no")]
            digits.fill(rows, systems)
            assert [row.digits_db for row in rows] == [None, 30.0, None, None]
            assert "does not like" in rows[2].digits_failed
        assert [line for line in fakes.log if line.startswith("digits")] == ["digits a", "digits b"]


def test_a_process_that_dies_is_a_failure(monkeypatch):
    class Dead:
        stdin, stdout = None, type("Empty", (), {"readline": staticmethod(lambda: "")})()

        def wait(self):
            return -9

    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: Dead())
    with pytest.raises(Failed, match="ended with -9"):
        rounds.Process(SETTINGS, "serve").read()


def test_a_missing_peer_is_left_out_with_a_line(capsys):
    kept = System("here", lambda t, f: None, needs=("torch",))
    gone = System("there", lambda t, f: None, needs=("torch", "no_such_package"))
    assert list(present([kept, gone])) == [kept]
    assert capsys.readouterr().err == (
        "there: left out, because no_such_package is not installed; pip install '.[bench,bench-more]'\n"
    )


def test_the_reference_stands_first_and_names_differ():
    systems = all_systems()
    assert next(iter(systems)) == REFERENCE
    peers = [found for found in systems.values() if found.needs]
    assert {need for peer in peers for need in peer.needs} == {
        "torchao",
        "openvino",
        "nncf",
        "sdnq",
        "optimum.quanto",
    }


class TestModels:
    def test_texts(self):
        assert task_of("dit:4").name == "DiT-XL/2, 256 tokens, 4 of 28 layers, batch 2"
        assert task_of("sd3-medium").name.endswith("24 of 24 layers, batch 2")
        with pytest.raises(ValueError, match=r"'wan' is not a model; write a name and a number of layers, of dit, "):
            task_of("wan")
        with pytest.raises(ValueError, match="is not a model"):
            task_of("dit:x")
        with pytest.raises(ValueError, match="is not a model"):
            task_of("flux:4")
        with pytest.raises(ValueError, match="samples come in pairs"):
            task_of("dit", batch=3)

    @pytest.mark.parametrize("name", SHAPES)
    def test_linear_layers_of_a_block_are_counted(self, name):
        latents = SHAPES[name].latents
        counts = linear_shapes(task_of(f"{name}:{'+'.join('1' for _ in SHAPES[name].layers)}"))
        width = SHAPES[name].config["num_attention_heads"] * SHAPES[name].config["attention_head_dim"]
        tokens = latents[0] if len(latents) == 2 else (latents[1] // 2) ** 2
        assert counts[2 * tokens, width, 4 * width] == 1, "the first half of the feed-forward"
        assert counts[2 * tokens, 4 * width, width] == 1

    def test_the_model_is_the_same_each_time(self):
        task = task_of("tiny:1")
        first, second = (task.model() for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        assert all(parameter.any() for parameter in first.parameters())
        with torch.no_grad():
            output = first(**task.timed)[0]
            low = task.model(torch.bfloat16)(**cast(task.timed, torch.bfloat16))[0]
        assert (output.shape, low.dtype) == ((2, 8, 8, 8), torch.bfloat16)
        assert task_of("tiny:1", batch=4).timed["class_labels"].shape == (4,)


class TestTable:
    def test_numbers(self):
        rows = [
            Row(REFERENCE, seconds=[0.4, 0.4], ratios=[1.0, 1.0], resident=100 * 10**6, peak=200 * 10**6),
            Row("ours", seconds=[0.1, 0.3], ratios=[4.0, 2.0], sqnr_db=40.0, digits_db=45.67, resident=27 * 10**6),
        ]
        found = Measured(rows, operations=10**10, peaks=[100.0, 300.0])
        header, _, first, second, *_ = table(found).splitlines()
        assert header.split("  ")[0] == "system"
        assert first.split() == ["eager", "fp32", "400.0", "400.0", "to", "400.0", "1.00", "0.12", "100", "200"]
        assert second.split() == ["ours", "200.0", "150.0", "to", "250.0", "3.00", "0.25", "40.0", "45.7", "27"]
        assert "10.0 GOP in linear layers at 200 GOP/s" in table(found)

    def test_json_has_no_infinity(self):
        found = Measured([Row(REFERENCE, seconds=[1.0], ratios=[1.0], sqnr_db=math.inf)])
        assert json.loads(json.dumps(to_json("t", SETTINGS, found), allow_nan=False))["rows"][0]["sqnr_db"] == "inf"

    def test_page(self):
        text = page(machine(2), SETTINGS, [("a model", "| a table |")])
        assert f"torch {torch.__version__}" in text
        assert "## a model\n\n| a table |\n" in text


def test_sqnr():
    assert sqnr_db(numpy.ones(4), numpy.ones(4)) == math.inf
    assert sqnr_db(numpy.ones(4), numpy.full(4, 1.01)) == pytest.approx(40.0)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_small_run(tmp_path, monkeypatch):
    command = ["benchmarks.cpu", "--model", "tiny:1", "--rounds", "1", "--threads", "1"]
    command += ["--only", "native W8A8, eager", "--no-digits", "--json", str(tmp_path / "cpu.json")]
    command += ["--markdown", str(tmp_path / "cpu.md")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(Path(__file__).parents[2])  # The worker processes import benchmarks from there.
    runpy.run_module("benchmarks.cpu", run_name="__main__", alter_sys=True)
    data = json.loads((tmp_path / "cpu.json").read_text())
    reference, ours = data["models"][0]["rows"]
    assert (reference["system"], ours["system"], ours["failed"]) == (REFERENCE, "native W8A8, eager", None)
    assert ours["sqnr_db"] > 30
    assert 0 < ours["resident_bytes"] <= ours["peak_bytes"]
    assert data["models"][0]["operations"] > 0
    assert "| native W8A8, eager" in (tmp_path / "cpu.md").read_text()
