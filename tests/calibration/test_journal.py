"""An interrupted calibration continues behind its last call, and ends with the same bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.calibration import journal
from fxquant.calibration.calibrate import Calibration
from fxquant.errors import ResumeWarning
from fxquant.runtime.float_model import weights_digest
from fxquant.runtime.model import GraphModel
from tests.tiny import inputs, make_dit

STEPS = (900, 600, 300, 0)


@pytest.fixture(autouse=True)
def after_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep statistics after each call, however long this takes on a busy machine."""
    monkeypatch.setattr(journal, "SHORT", float("inf"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether it was observed, of each call that is computed."""
    calls: list[bool] = []
    compute = Calibration.compute

    def counted(self: Calibration, number: int, call: Any, observed: bool) -> Any:
        calls.append(observed)
        return compute(self, number, call, observed)

    monkeypatch.setattr(Calibration, "compute", counted)
    yield calls


class Interrupted(BaseException):
    """Stands for the end of the process."""


def sampler(
    model: nn.Module, stop: int | None = None, seed: int = 0, sizes: tuple[int, ...] = (8,)
) -> Callable[[], None]:
    """Two runs of a sampler, in which each call depends on the outputs of the calls before. It writes in place."""

    def calibrate() -> None:
        made = 0
        for run in range(2):
            for size in sizes:
                given = inputs(batch=2, size=size, seed=seed + run)
                x = given.pop("hidden_states")
                for step in STEPS:
                    if made == stop:
                        raise Interrupted
                    given["timestep"] = torch.full((2,), step)
                    with torch.no_grad():
                        out = model(hidden_states=x, **given).sample
                    x.sub_(0.1 * out[:, :4])
                    made += 1

    return calibrate


def compiled(model: nn.Module, calibrate: Callable[[], None], **options: Any) -> GraphModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxquant.QualityWarning)
        return fxquant.compile(model, **{"recipe": "ptq4dit-gptq-w4a8", "calibrate": calibrate, **options})


def saved(model: GraphModel, statistics: fxquant.Statistics, folder: Path) -> dict[str, bytes]:
    """Files of the checkpoint and of the statistics, without the times that passes took."""
    assert model.plan is not None
    for entry in model.plan.passes:
        entry["seconds"] = 0.0
    fxquant.save(model, folder / "q", overwrite=True)
    statistics.save(folder / "statistics")
    files = {path.name: path.read_bytes() for path in (folder / "q").iterdir()}
    return files | {"statistics": (folder / "statistics").read_bytes()}


def whole(folder: Path, recipe: str, sizes: tuple[int, ...] = (8,)) -> dict[str, bytes]:
    model, statistics = make_dit(), fxquant.Statistics(keep_calls=3)
    return saved(compiled(model, sampler(model, sizes=sizes), recipe=recipe, statistics=statistics), statistics, folder)


def attempt(
    folder: Path, stop: int | None, recipe: str, sizes: tuple[int, ...] = (8,)
) -> tuple[Any, fxquant.Statistics]:
    model, statistics = make_dit(), fxquant.Statistics(keep_calls=3)
    calibrate = sampler(model, stop, sizes=sizes)
    try:
        found = compiled(model, calibrate, recipe=recipe, statistics=statistics, resume=folder)
    except Interrupted:
        return None, statistics
    return found, statistics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [("ptq4dit-gptq-w4a8", (8,)), ("single-step-w4a8", (8,)), ("rtn-w8a8", (8, 4))],
)
def test_it_ends_with_the_same_bits_and_computes_each_call_once(
    recipe: str, sizes: tuple[int, ...], tmp_path: Path, computed: list[bool]
) -> None:
    expected = whole(tmp_path, recipe, sizes)
    calls = list(computed)
    computed.clear()
    for stop in (1, 2, 6, 7):
        assert attempt(tmp_path / "parts", stop, recipe, sizes)[0] is None
    found, statistics = attempt(tmp_path / "parts", None, recipe, sizes)
    assert computed == calls
    assert saved(found, statistics, tmp_path) == expected
    again, statistics = attempt(tmp_path / "parts", None, recipe, sizes)
    assert computed == calls  # A finished calibration computes nothing.
    assert saved(again, statistics, tmp_path) == expected


def test_another_run_starts_anew_and_says_so(tmp_path: Path, computed: list[bool]) -> None:
    expected = whole(tmp_path, "rtn-w8a8")
    assert attempt(tmp_path / "parts", 5, "ptq4dit-w8a8")[0] is None
    computed.clear()
    with pytest.warns(ResumeWarning, match="another run, which differs in recipe; they are not used"):
        found, statistics = attempt(tmp_path / "parts", None, "rtn-w8a8")
    assert len(computed) == 8
    assert saved(found, statistics, tmp_path) == expected


@pytest.mark.parametrize("first", [1, 6])
def test_other_calls_are_noticed_wherever_they_begin(first: int, tmp_path: Path, computed: list[bool]) -> None:
    """Another number of calls, and other inputs from the first call or from a later one on."""
    model = make_dit()
    with pytest.raises(Interrupted):
        compiled(model, sampler(model, 6), resume=tmp_path / "parts")

    def other() -> None:
        for number in range(first):
            model(**inputs(batch=2, timestep=STEPS[number % 4], seed=number))

    def longer() -> None:
        with pytest.raises(Interrupted):
            sampler(model, 4)()
        other()

    expected, statistics = fxquant.Statistics(), fxquant.Statistics()
    compiled(model, longer, statistics=expected)
    computed.clear()
    with pytest.warns(ResumeWarning, match="call 4 of this run has other inputs"):
        compiled(model, longer, statistics=statistics, resume=tmp_path / "parts")
    assert len(computed) == 4 + first
    for folder, one in (("a", expected), ("b", statistics)):
        one.save(tmp_path / folder)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    computed.clear()
    compiled(model, longer, resume=tmp_path / "parts")
    assert not computed


def test_fewer_calls_are_noticed(tmp_path: Path) -> None:
    model = make_dit()
    with pytest.raises(Interrupted):
        compiled(model, sampler(model, 6), resume=tmp_path / "parts")

    def shorter() -> None:
        with pytest.raises(Interrupted):
            sampler(model, 3)()

    expected, statistics = fxquant.Statistics(), fxquant.Statistics()
    compiled(model, shorter, statistics=expected)
    with pytest.warns(ResumeWarning, match="makes only 3 of the 6 calls that are kept"):
        compiled(model, shorter, statistics=statistics, resume=tmp_path / "parts")
    for folder, one in (("a", expected), ("b", statistics)):
        one.save(tmp_path / folder)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("file", ["calibration", "call-000002", "timestep", "moments"])
def test_a_damaged_file_is_said_and_computed_anew(file: str, tmp_path: Path, computed: list[bool]) -> None:
    recipe = "ptq4dit-gptq-w4a8"
    expected = whole(tmp_path, recipe)
    assert attempt(tmp_path / "parts", 6, recipe)[0] is None
    path = next((tmp_path / "parts" / "calibration").glob(f"{file}*"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content if file != "calibration" else content[:-5])  # It ends with its header, not with tensors.
    computed.clear()
    with pytest.warns(ResumeWarning, match="is damaged"):
        found, statistics = attempt(tmp_path / "parts", None, recipe)
    assert len(computed) == 8
    assert saved(found, statistics, tmp_path) == expected


def test_statistics_wait_if_keeping_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[bool]
) -> None:
    monkeypatch.setattr(journal, "SHORT", 0.0)
    monkeypatch.setattr(journal, "SHARE", 0.0)
    recipe = "rtn-w8a8"
    expected = whole(tmp_path, recipe)
    assert attempt(tmp_path / "parts", 6, recipe)[0] is None
    computed.clear()
    found, statistics = attempt(tmp_path / "parts", None, recipe)
    assert len(computed) == 7  # Only the first call was kept together with its statistics.
    assert saved(found, statistics, tmp_path) == expected
    computed.clear()
    found, statistics = attempt(tmp_path / "parts", None, recipe)
    assert not computed  # At the end everything is kept.
    assert saved(found, statistics, tmp_path) == expected


def with_other_epsilon(model: nn.Module) -> nn.Module:
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 0.5
    return model


def with_other_activation(model: nn.Module) -> nn.Module:
    for part in model.modules():
        if hasattr(part, "approximate"):
            part.approximate = "none"
    return model


def with_other_elements(model: nn.Module) -> nn.Module:
    """Changes elements between those of which short digests are made."""
    before = weights_digest(model)
    weight = model.get_parameter("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight")
    with torch.no_grad():
        weight.view(-1)[1 :: weight.numel() // 1024] += 5
    assert weights_digest(model) == before
    return model


@pytest.mark.parametrize("change", [with_other_epsilon, with_other_activation, with_other_elements])
def test_a_model_that_computes_something_else_starts_anew(
    change: Callable[[nn.Module], nn.Module], tmp_path: Path, computed: list[bool]
) -> None:
    """Its class is the same, and so are its weights, or the elements of which there is a short digest."""
    first, changed = make_dit(), change(make_dit())
    compiled(first, sampler(first), recipe="rtn-w4a8", resume=tmp_path)
    calls = len(computed)
    with pytest.warns(ResumeWarning, match="or the model computes something else"):
        made = compiled(changed, sampler(changed), recipe="rtn-w4a8", resume=tmp_path)
    assert len(computed) == 2 * calls
    fresh = compiled(changed, sampler(changed), recipe="rtn-w4a8")
    assert made.plan is not None and fresh.plan is not None
    assert made.plan.fingerprint() == fresh.plan.fingerprint()
