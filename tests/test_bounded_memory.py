"""A conversion in bounded memory gives the plan and the checkpoint of one without a bound."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

import fxquant
from fxquant.errors import CheckpointError, ConfigurationError, MemoryLimitError
from fxquant.memory.bound import resident
from fxquant.pipeline.recipes import make_recipe
from fxquant.planning import working_sets
from tests.adapters.fluxes import MODEL, images, make_pipe
from tests.memory.tight import tight
from tests.tiny import calibrate, make_dit, make_pipeline

_SVDQUANT = str(make_recipe("svdquant-gptq-w4a8")).replace("split-low-rank{", "split-low-rank{rank=2 ")
RECIPES = ("rtn-w8a8", "ptq4dit-w4a8", "ptq4dit-gptq-w4a8", _SVDQUANT)
IDS = ("rtn-w8a8", "ptq4dit-w4a8", "ptq4dit-gptq-w4a8", "svdquant-gptq-w4a8")


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT of two blocks in several shards."""
    folder = tmp_path_factory.mktemp("dit")
    make_dit(2).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX model in several shards."""
    folder = tmp_path_factory.mktemp("flux")
    MODEL.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def _of_dit(folder: Path) -> tuple[Any, Callable[[], Any]]:
    model = DiTTransformer2DModel.from_pretrained(folder).eval()
    return model, calibrate(model)


def _of_flux(folder: Path) -> tuple[Any, Callable[[], Any]]:
    pipe = make_pipe(FluxTransformer2DModel.from_pretrained(folder).eval())
    return pipe.transformer, lambda: images(pipe)


def _content(folder: Path) -> dict[str, Any]:
    """The files of a checkpoint; of the plan all but the seconds that passes took."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}
    plan = json.loads((folder / "plan.json").read_text())
    plan["passes"] = [{key: value for key, value in entry.items() if key != "seconds"} for entry in plan["passes"]]
    plan.pop("digest")
    return {**found, "plan": plan, "config": (folder / "config.json").read_text()}


def _check_equal(
    load: Callable[[], tuple[Any, Callable[[], Any]]], recipe: str, place: Path, backend: str = "fake-quant"
) -> None:
    options: Any = {"recipe": recipe, "backend": backend, "measure": 2}
    model, run = load()
    fxquant.save(fxquant.compile(model, calibrate=run, **options), place / "memory")
    model, run = load()
    with tight(place) as bound:
        made = fxquant.compile(model, calibrate=run, **options)
        assert bound.scratch.nbytes > 0
        fxquant.save(made, place / "bounded")
    assert _content(place / "bounded") == _content(place / "memory")
    assert {path.name for path in place.iterdir()} == {"memory", "bounded"}


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_dit_is_equal_bit_for_bit(dit: Path, recipe: str, tmp_path: Path) -> None:
    _check_equal(lambda: _of_dit(dit), recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_flux_is_equal_bit_for_bit(flux: Path, recipe: str, tmp_path: Path) -> None:
    _check_equal(lambda: _of_flux(flux), recipe, tmp_path)


def test_a_model_in_memory_is_equal_too(tmp_path: Path) -> None:
    def load() -> tuple[Any, Callable[[], Any]]:
        model = make_dit(1)
        return model, calibrate(model)

    _check_equal(load, "rtn-w8a8", tmp_path)


@pytest.mark.exhaustive
def test_the_native_backend_is_equal_too(tmp_path: Path) -> None:
    def load() -> tuple[Any, Callable[[], Any]]:
        model = make_dit(1)
        return model, calibrate(model)

    _check_equal(load, "rtn-w8a8", tmp_path, "native")


def test_a_run_that_keeps_what_it_finished_is_equal_too(tmp_path: Path) -> None:
    recipe = "ptq4dit-gptq-w4a8"
    model = make_dit(1)
    fxquant.save(fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), measure=0), tmp_path / "memory")
    for name in ("first", "resumed"):
        model = make_dit(1)
        with tight(tmp_path):
            options = {"calibrate": calibrate(model), "measure": 0, "resume": tmp_path / "parts"}
            fxquant.save(fxquant.compile(model, recipe=recipe, **options), tmp_path / name)
        assert _content(tmp_path / name) == _content(tmp_path / "memory")


def test_compile_alone_takes_a_bound(tmp_path: Path) -> None:
    model = make_dit(1)
    made = fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), max_memory="64GB", scratch=tmp_path)
    fxquant.save(made, tmp_path / "bounded")
    other = make_dit(1)
    fxquant.save(fxquant.compile(other, recipe="rtn-w8a8", calibrate=calibrate(other)), tmp_path / "memory")
    assert _content(tmp_path / "bounded") == _content(tmp_path / "memory")


def test_a_bound_that_is_too_small_is_refused_before_calibration(tmp_path: Path) -> None:
    model = make_dit(1)
    with pytest.raises(MemoryLimitError, match="Give at least") as raised:
        fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), max_memory="10MB", scratch=tmp_path)
    assert raised.value.smallest > 10**8 and not list(tmp_path.iterdir())
    enough = raised.value.smallest
    fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), max_memory=enough, scratch=tmp_path)


def test_the_layer_that_is_too_large_is_named_before_calibration(tmp_path: Path) -> None:
    model, calls = make_dit(1), []

    def run() -> None:
        calls.append(calibrate(model)())

    with tight(tmp_path) as bound:
        bound.limit = resident() + (1 << 40)
        fxquant.compile(model, recipe="rtn-w8a8", calibrate=run, measure=0)
        bound.limit = 1 << 20
        with pytest.raises(
            MemoryLimitError, match=r"layer transformer_blocks\.0\.\S+ needs .* Give at least"
        ) as raised:
            fxquant.compile(model, recipe="ptq4dit-gptq-w4a8", calibrate=run)
    assert raised.value.smallest > 10**8 and len(calls) == 1


def test_activations_that_are_too_large_are_refused_before_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = make_dit(1), []
    monkeypatch.setattr(working_sets, "_FOLDED", 0)  # So that the call is larger than any layer of so small a model.
    with tight(tmp_path) as bound:
        bound.limit = 1 << 20
        with pytest.raises(MemoryLimitError, match=r"one call of the model with \d+ samples needs .* Give at least"):
            fxquant.compile(model, recipe="rtn-w8a8", calibrate=lambda: calls.append(calibrate(model)()))
    assert not calls


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    model = make_dit(1)

    def fails() -> None:
        calibrate(model)()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fxquant.compile(model, recipe="rtn-w8a8", calibrate=fails, max_memory="64GB", scratch=tmp_path)
    assert not list(tmp_path.iterdir())
    fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model))


def test_a_pipeline_is_read_in_another_dtype_without_weights_in_memory(tmp_path: Path) -> None:
    make_pipeline(make_dit(2)).save_pretrained(tmp_path / "pipe", max_shard_size="40KB")
    plain = fxquant.load_pipeline(tmp_path / "pipe", torch_dtype=torch.bfloat16)
    (tmp_path / "scratch").mkdir()
    with tight(tmp_path / "scratch") as bound:
        pipe = fxquant.load_pipeline(tmp_path / "pipe", torch_dtype=torch.bfloat16)
        assert not list((tmp_path / "scratch").iterdir())
        bound.release()
        for name, part in (("transformer", plain.transformer), ("vae", plain.vae)):
            read = getattr(pipe, name).state_dict()
            assert all(torch.equal(value, read[key]) for key, value in part.state_dict().items())
            assert all(value.dtype == read[key].dtype for key, value in part.state_dict().items())
            anonymous = bound._weights.take([*getattr(pipe, name).parameters()])
            assert all(bound.scratch.holds(tensor) or tensor.nbytes < 64 for tensor in anonymous)


@pytest.mark.parametrize("damage", ["is missing", "to another model"])
def test_a_bad_shard_is_named(dit: Path, damage: str, tmp_path: Path) -> None:
    make_pipeline(make_dit(2)).save_pretrained(tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "transformer")
    shutil.copytree(dit, tmp_path / "pipe" / "transformer")
    shard = sorted((tmp_path / "pipe" / "transformer").glob("*-00002-of-*.safetensors"))[0]
    if damage == "is missing":
        shard.unlink()
    else:
        tensors = load_file(shard)
        save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=damage) as raised:
        fxquant.load_pipeline(tmp_path / "pipe")
    assert shard.name in str(raised.value)


def test_other_devices_are_refused(tmp_path: Path) -> None:
    model = make_dit(1).to("meta")
    with pytest.raises(ConfigurationError, match=r"max_memory bounds the memory of the CPU|without values"):
        fxquant.compile(model, recipe="rtn-w8a8", calibrate=lambda: None, max_memory="64GB", scratch=tmp_path)
