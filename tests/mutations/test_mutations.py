"""Damaged checkpoints and packages load with the same output, or a typed error is raised within limits.

``FXQUANT_FUZZ_LOAD=5000`` in the environment requests 5000 cases, different ones each time; ``make fuzz-load`` sets it.
"""

from __future__ import annotations

import os
import random
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.errors import FxquantError
from tests.mutations.damage import damage
from tests.tiny import calibrate, make_dit, run
from tests.traces import traced_anew

ASKED = int(os.environ.get("FXQUANT_FUZZ_LOAD", "0"))
SHARD = 50
SECONDS, MEGABYTES = 5.0, 200
"""Limits of a refusal: CPU seconds (or three times the CPU time of loading, on a busy machine), and megabytes."""


RECIPES = ("ptq4dit-w4a8", "htg-w4a8", "dynamic-w8a8", "smoothquant-w4a16-g4")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Tensor]:
    """Checkpoints of several recipes, each with the output of its model."""
    found, root, model = {}, tmp_path_factory.mktemp("checkpoints"), make_dit()
    for recipe in RECIPES:
        layers = "all" if recipe.startswith("htg") else "default"
        made = fxquant.compile(model, recipe=recipe, layers=layers, calibrate=calibrate(model), measure=0)
        fxquant.save(made, root / recipe)
        found[root / recipe] = run(fxquant.load(root / recipe))
    return found


@pytest.mark.parametrize("shard", range(max(1, -(-ASKED // SHARD))))
def test_damaged_checkpoints(checkpoints: dict[Path, Tensor], tmp_path: Path, shard: int) -> None:
    all_of(checkpoints, tmp_path, min(ASKED or 12, SHARD), fxquant.load)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Tensor]:
    """A package, with the output of its model."""
    folder, model = tmp_path_factory.mktemp("packages") / "package", make_dit()
    made = fxquant.compile(model, recipe="dynamic-w8a8", calibrate=calibrate(model), measure=0)
    fxquant.export_aot(made, folder)
    return {folder: run(fxquant.load_package(folder))}


@pytest.mark.slow  # One run of the C++ compiler.
@pytest.mark.exhaustive  # ``make test`` damages each file of a package in tests/storage/aot.
@pytest.mark.parametrize("shard", range(max(1, -(-ASKED // (10 * SHARD)))))
def test_damaged_packages(packages: dict[Path, Tensor], tmp_path: Path, shard: int) -> None:
    all_of(packages, tmp_path, min(-(-ASKED // 10) or 20, SHARD), fxquant.load_package)


def all_of(wholes: dict[Path, Tensor], scratch: Path, cases: int, load: Callable[[Path], torch.nn.Module]) -> None:
    """Run `cases` cases and report all failures together."""
    seed = random.SystemRandom().randrange(2**32) if ASKED else 0
    outcomes, failures = Counter[str](), []
    for number in range(cases):
        try:
            outcomes[one_case(wholes, scratch, f"{seed}-{number}", load)] += 1
        except AssertionError as failure:
            failures.append(str(failure))
    print(f"{load.__name__}, seed {seed}: {outcomes['refused']} refused, {outcomes['equal']} equal of {cases}")
    assert not failures, "\n".join(failures)


def one_case(wholes: dict[Path, Tensor], scratch: Path, seed: str, load: Callable[[Path], torch.nn.Module]) -> str:
    """Damage a copy, load it and call the loaded model; return ``refused`` or ``equal``."""
    rng = random.Random(seed)
    whole = rng.choice(sorted(wholes))
    folder = scratch / seed
    shutil.copytree(whole, folder)
    told = f"{seed} {whole.name} {damage(folder, rng)}"
    before = _start_watching()
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = "equal" if _same(run(load(folder)), wholes[whole]) else "other"
    except FxquantError as error:
        outcome = "refused"
        assert len(str(error)) < 4000, f"{told}: a message of {len(str(error))} characters"
    except Exception as error:
        raise AssertionError(f"{told}: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(folder)
    seconds, megabytes = time.process_time() - began, _highest() - before
    assert outcome != "other", f"{told}: loaded, and computes something else"
    if outcome == "refused":
        assert seconds < SECONDS or seconds < 3 * _seconds_to_load(whole, load), f"{told}: {seconds:.1f} s"
        assert megabytes < MEGABYTES, f"{told}: {megabytes} MB"
    return outcome


def _seconds_to_load(whole: Path, load: Callable[[Path], torch.nn.Module]) -> float:
    """CPU seconds of a whole load, its trace included."""
    with traced_anew():
        began = time.process_time()
        load(whole)
        return time.process_time() - began


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and bool(torch.equal(left, right))


def _start_watching() -> int:
    """Reset the peak memory of this process; return its present memory in MB."""
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")
    return _highest()


def _highest() -> int:
    """Peak memory of this process in MB; 0 if the operating system does not report it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")), 0)
