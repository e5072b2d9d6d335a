"""Kills ``fxquant quantize --resume`` at random moments and repeats the command (``make chaos``).

Each trial runs the command until it is killed (SIGKILL), once more to be killed again in a third of the trials, and
then to its end. The plan and the checkpoint have to be those of a run that nobody killed, byte for byte, but for the
times that passes took. What was computed in all runs of a trial has to be at most one call or one layer per kill more
than in that run.

The commands run in forks of this process, which imports torch once: a process of its own for each command would spend
most of the time with imports, and most kills would come there.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fxquant.calibration import journal
from fxquant.calibration.calibrate import Calibration
from fxquant.planning import kept_weights
from tests.conversions import rebuilt_once
from tests.storms.forks import exit_code, forked, killed, main
from tests.tiny import make_dit, make_pipeline
from tests.traces import traced_once

RECIPES = (
    "ptq4dit-gptq-w4a8",
    "single-step-w4a8",
    "svdquant-w4a4",
    "rtn-reconstruct-w4a8",
    "transformer=ptq4dit-w8a8,vae=rtn-w8a16",
)
"""Recipes of the transformer, or several parts of the pipeline with theirs."""

_OPTIONS = ("--samples", "10", "--steps", "4", "--measure", "2", "--overwrite")

Files = dict[str, bytes]


@dataclass
class Outcome:
    """What the kills of all trials did.

    Attributes:
        kills: Number of killed processes.
        where: In which stage they were.
        lost: Calls, layers and blocks that were finished and nevertheless computed again: the most per kill.
        wrong: What was not as promised.
    """

    kills: int = 0
    where: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The outcome as text."""
        places = ", ".join(f"{count} in {stage}" for stage, count in sorted(self.where.items()))
        lost = ", ".join(f"{count} {what}" for what, count in sorted(self.lost.items()))
        return [
            f"{self.kills} processes killed: {places}",
            f"finished work that one kill lost, at most: {lost or 'nothing'}",
            f"{len(self.wrong)} wrong",
            *self.wrong,
        ]


class Chaos:
    """The float pipeline, and what each recipe makes of it without interruption.

    Args:
        folder: An empty folder to work in.
        recipes: Names of recipes.
        layers: Number of blocks of the model.
    """

    def __init__(self, folder: Path, recipes: Sequence[str] = RECIPES, layers: int = 2) -> None:
        torch.set_num_threads(1)  # Forked processes do not have the other threads.
        self.folder, self.recipes = folder, recipes
        make_pipeline(make_dit(layers)).save_pretrained(folder / "float")
        self.outcome = Outcome()
        self.whole: dict[str, tuple[Files, Counter[str]]] = {}
        self.seconds: dict[str, float] = {}
        for recipe in recipes:
            name = recipe.replace("=", "-")
            warm, place = folder / f"warm-{name}", folder / f"whole-{name}"
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                assert not quantize(folder / "float", recipe, warm)  # Forks inherit the traces.
            began = time.perf_counter()
            self.ended(self.forked(recipe, place))
            self.seconds[recipe] = time.perf_counter() - began
            self.whole[recipe] = held(place / "q"), counted(place)

    def trial(self, number: int) -> None:
        """Kill the command once or twice, run it to its end, and compare."""
        recipe = self.recipes[number % len(self.recipes)]
        place = self.folder / str(number)
        kills = sum(self.killed(recipe, place) for _ in range(2 if random.random() < 1 / 3 else 1))
        self.ended(self.forked(recipe, place))
        expected, once = self.whole[recipe]
        found = held(place / "q")
        differ = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        if differ:
            self.outcome.wrong.append(f"trial {number}, {recipe}: {', '.join(sorted(differ))} differ")
        more = counted(place) - once
        for what, count in more.items():
            self.outcome.lost[what] = max(self.outcome.lost[what], math.ceil(count / max(kills, 1)))
        if sum(more.values()) > kills:
            self.outcome.wrong.append(f"trial {number}, {recipe}: {dict(more)} computed again after {kills} kills")
        if [path.name for path in place.iterdir() if path.name.startswith(".")]:
            self.outcome.wrong.append(f"trial {number}: {place} holds what a killed process left")
        if not self.outcome.wrong:
            shutil.rmtree(place)

    def killed(self, recipe: str, place: Path) -> bool:
        """Run the command and kill it at a random moment; False if it had ended before."""
        if not killed(self.forked(recipe, place), self.seconds[recipe]):
            return False
        self.outcome.kills += 1
        self.outcome.where[stage_of(place)] += 1
        return True

    def forked(self, recipe: str, place: Path) -> int:
        """Start the command in a fork; returns its process id."""
        place.mkdir(exist_ok=True)

        def run() -> int:
            log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            with (place / "output").open("a") as output, contextlib.redirect_stdout(output):
                os.dup2(output.fileno(), 2)
                _watch(lambda what: os.write(log, f"{what}\n".encode()))
                return quantize(self.folder / "float", recipe, place)

        return forked(run)

    def ended(self, child: int) -> None:
        """Wait for a command that nobody kills."""
        code = exit_code(child)
        if code:
            self.outcome.wrong.append(f"a command ended with {code}; see the files named output in {self.folder}")


def quantize(model: Path, recipe: str, place: Path) -> int:
    """The command, in this process; returns its exit code."""
    from fxquant.cli.__main__ import app

    what = ["--components", recipe] if "=" in recipe else ["-r", recipe_text(recipe)]
    options = ["quantize", str(model), *what, *_OPTIONS]
    try:
        app([*options, "--out", str(place / "q"), "--resume", str(place / "parts")])
    except SystemExit as error:
        return int(error.code or 0) if isinstance(error.code, (int, type(None))) else 1
    return 0


def recipe_text(recipe: str) -> str:
    """The recipe, with few steps where it learns, and branches that are small enough for a small model."""
    from fxquant.pipeline.recipes import make_recipe

    made = make_recipe(recipe)
    small = {"reconstruct-blocks": {"iterations": 10, "samples": 16}, "split-low-rank": {"rank": 2}}
    for name in {step.name for step in made.convert} & small.keys():
        made = made.with_options(name, **small[name])
    return str(made)


def _watch(tell: Callable[[str], Any]) -> None:
    """Tell of each call and layer when it is computed, and keep all of them, however fast they are."""
    journal.SHORT = math.inf
    kept_weights.WORTH_KEEPING = 0.0
    compute, kept = Calibration.compute, kept_weights.kept

    def computed(self: Calibration, *given: Any) -> Any:
        found = compute(self, *given)
        tell("calls")
        return found

    def rounded(*given: Any) -> Any:
        def told() -> Any:
            found = given[-1]()
            tell("layers")
            return found

        return kept(*given[:-1], told)

    from fxquant.passes import _quantization, split_low_rank
    from fxquant.reconstruction import engine
    from fxquant.storage import diffusers_io

    learn = engine.learn

    def learned(*given: Any) -> Any:
        found = learn(*given)
        tell("blocks")
        return found

    Calibration.compute = computed  # type: ignore[method-assign]
    _quantization.kept = split_low_rank.kept = rounded
    engine.learn = learned
    diffusers_io.save_pipeline = _before(diffusers_io.save_pipeline, lambda: tell("saving"))


def _before(function: Callable[..., Any], do: Callable[[], Any]) -> Callable[..., Any]:
    def both(*given: Any, **options: Any) -> Any:
        do()
        return function(*given, **options)

    return both


def counted(place: Path) -> Counter[str]:
    """How many calls, layers and blocks were computed."""
    told = (place / "log").read_text().split()
    return Counter(what for what in told if what != "saving")


def stage_of(place: Path) -> str:
    """In which stage a killed command was."""
    log = place / "log"
    told = log.read_text().split() if log.exists() else []
    return {"calls": "calibration", "layers": "rounding", "blocks": "reconstruction"}.get(
        told[-1] if told else "", "saving" if told else "loading"
    )


def held(folder: Path) -> Files:
    """The files of a quantized pipeline by name, without the times that passes took."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in [name for name in files if Path(name).name == "plan.json"]:
        plan = json.loads(files[name])
        for entry in plan["passes"]:
            entry.pop("seconds")
        plan.pop("digest", None)
        files[name] = json.dumps(plan, sort_keys=True).encode()
    return files


def chaos(kills: int, folder: Path, recipes: Sequence[str] = RECIPES, layers: int = 2) -> Outcome:
    """Run trials until this many processes were killed."""
    with traced_once(), rebuilt_once():
        made = Chaos(folder, recipes, layers)
        number = 0
        while made.outcome.kills < kills and number < 4 * kills and not made.outcome.wrong:
            made.trial(number)
            number += 1
    return made.outcome


def _run(kills: int, folder: Path) -> tuple[list[str], bool]:
    outcome = chaos(kills, folder)
    return outcome.lines(), not outcome.wrong


if __name__ == "__main__":
    sys.exit(main(__doc__, "chaos", _run))
