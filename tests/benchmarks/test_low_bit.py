"""The benchmark of low bits: its models, its file of measurements, and the parts of its ablation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.low_bit import ablation, grids, measure, random_models, tables
from benchmarks.low_bit.__main__ import main
from benchmarks.low_bit.measure import Measured, Results, Subject
from fxquant.numerics.sqnr import sqnr_db
from fxquant.pipeline.recipes import make_recipe
from fxquant.testing import calibration, example_calls, tiny_dit


@pytest.mark.parametrize(
    ("make", "planting"),
    [(random_models.flux_like, "_plant_flux"), (random_models.pixart_like, "_plant_pixart")],
)
def test_planted_models_compute_the_same(
    make: Callable[[], nn.Module], planting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = make()
    monkeypatch.setattr(random_models, planting, lambda model: None)
    plain = make()
    weights = zip(plain.parameters(), planted.parameters(), strict=True)
    assert any(float(b.detach().abs().max()) > 5 * float(a.detach().abs().max()) for a, b in weights), (
        "nothing is salient"
    )
    with torch.no_grad():
        for call in random_models.calls(plain, [900, 10], seed=0, batch=2):
            assert sqnr_db(plain(**call)[0], planted(**call)[0]) > 110


ROOT = Path(__file__).resolve().parents[2]


def subject(name: str) -> Subject:
    model = tiny_dit()
    tests = [((), call) for call in example_calls(model, (800.0, 300.0), batch=3)]
    return Subject(name, model, calibration(model), tests)


@pytest.mark.filterwarnings("ignore")
def test_measurements_are_kept_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def counted(name: str) -> Subject:
        asked.append(name)
        return subject(name)

    monkeypatch.setitem(measure.SUBJECTS, "plain", counted)
    jobs = [("plain", make_recipe("rtn-w8a8")), ("plain", make_recipe("rtn-w4a4-g32")), *tables.jobs(["plain"])[:1]]
    path = tmp_path / "out" / "found.json"
    results = Results(path)
    results.fill(jobs, "test")
    assert asked == ["plain"]
    found, refused = results.of(*jobs[0]), results.of(*jobs[1])
    assert found is not None and len(found.steps) == 2 and found.worst <= found.mean and found.mean > 15
    assert refused is not None and not refused.steps and "32" in refused.error  # The model is 16 wide.
    again = Results(path)
    again.fill(jobs, "test")
    assert asked == ["plain"]
    assert again.of(*jobs[0]) == found
    assert f"{found.mean:.1f} / {found.worst:.1f}" in tables.text(again, ["plain"])


def test_thirds_of_the_timesteps() -> None:
    assert Measured([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.0, 0.0).thirds == (1.5, 3.5, 5.5)


def test_each_variant_lacks_one_part() -> None:
    eight, four = ablation.variants("w8a8"), ablation.variants("w4a4")
    assert set(four) - set(eight) == {"without rotation"}
    least = ("balancing", "rotation", "branch", "bins", "clipping", "range per token", "GPTQ")
    assert {ablation.WHOLE, *(f"without {part}" for part in least)} <= set(four)
    assert len({str(recipe) for recipe in four.values()}) == len(four)
    assert "rotate-channels" not in str(four["without rotation"]) and "rotate-channels" in str(four["without branch"])


@pytest.mark.slow
def test_the_command_prints_and_draws_what_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    results = Results(tmp_path / "found.json")
    for number, job in enumerate([*tables.jobs(["planted"]), *ablation.jobs(["planted"])]):
        results._held[measure._key(*job)] = Measured([30.0 + number % 7, 20.0, math.inf], 1.5, 1.0)
    results._write()
    arguments = ["--models", "planted", "--print", "--json", str(results.path)]
    page = tmp_path / "results.md"
    page.write_text((ROOT / "docs" / "results.md").read_text(encoding="utf-8"), encoding="utf-8")
    for _ in range(2):  # The second time replaces what the first wrote.
        main([*arguments, "--picture", str(tmp_path / "parts.svg"), "--into", str(page)])
    printed = capsys.readouterr().out
    assert "| planted" in printed and "| without clipping" in printed and "1.50" in printed
    assert "without GPTQ" in (tmp_path / "parts.svg").read_text()
    written = page.read_text(encoding="utf-8")
    assert written.count("## Recipes in every number format") == written.count("| without clipping") // 3 == 1
    assert written.endswith((ROOT / "docs" / "results.md").read_text(encoding="utf-8")[-2_000:])
    page.write_text("# Results\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="lacks the lines"):
        main([*arguments, "--into", str(page)])
    assert page.read_text(encoding="utf-8") == "# Results\n"


def test_the_grid_of_the_table_is_mxfp4() -> None:
    from fxquant.numerics.activations import round_by_token
    from fxquant.numerics.formats import FORMATS

    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 40)[:, None]
    first, *_, last = grids.GRIDS.values()
    assert torch.equal(first(x), round_by_token(x, FORMATS["mxfp4"]))
    assert torch.equal(last(x), round_by_token(x, FORMATS["int4"]))
