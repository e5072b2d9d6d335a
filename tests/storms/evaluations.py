"""Kills evaluations at random moments and repeats them (a part of ``make chaos``).

Each trial evaluates a small pipeline until it is killed (SIGKILL), repeats this one to three times in the same folder,
and then lets it end. The figures and the images have to be those of an evaluation that nobody killed, byte for byte. A
batch whose file is there is not made again, so one kill loses at most one batch, and nothing else is left.

The evaluations run in forks of this process, which imports torch once.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fxquant.evaluation.evaluate import evaluate
from fxquant.evaluation.generation import Sampling
from tests.evaluation.pipes import Pooled, make_pipe, quantized_pipe
from tests.storms.forks import exit_code, forked, killed, main

_IMAGES, _BATCH = 30, 5
Files = dict[str, bytes]


@dataclass
class Outcome:
    """What the kills of all trials did.

    Attributes:
        kills: Number of killed processes.
        lost: Most batches that one kill lost.
        wrong: What was not as promised.
    """

    kills: int = 0
    lost: int = 0
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The outcome as text."""
        return [f"{self.kills} evaluations killed", f"batches that one kill lost, at most: {self.lost}", *self.wrong]


class Evaluations:
    """Two pipelines, and what their evaluation gives without interruption.

    Args:
        folder: An empty folder to work in.
    """

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)  # Forked processes do not have the other threads.
        self.folder, self.outcome = folder, Outcome()
        self.pipes = quantized_pipe(), make_pipe()
        self._evaluate(folder / "warm")
        began = time.perf_counter()
        self._ended(self._forked(folder / "whole"))
        self.seconds = time.perf_counter() - began
        self.whole = held(folder / "whole")
        self.made = made(folder / "whole")

    def trial(self, number: int) -> None:
        """Kill an evaluation some times, let it end, and compare."""
        place = self.folder / str(number)
        kills = sum(self._killed(place) for _ in range(random.randint(1, 3)))
        self._ended(self._forked(place))
        found = held(place)
        differ = sorted(name for name in self.whole.keys() | found.keys() if self.whole.get(name) != found.get(name))
        if differ:
            self.outcome.wrong.append(f"trial {number}: {', '.join(differ)} differ")
        more = made(place) - self.made
        self.outcome.lost = max(self.outcome.lost, -(-more // max(kills, 1)))
        if more > kills:
            self.outcome.wrong.append(f"trial {number}: {more} batches made again after {kills} kills")

    def _killed(self, place: Path) -> bool:
        found = killed(self._forked(place), self.seconds)
        self.outcome.kills += found
        return found

    def _evaluate(self, place: Path) -> None:
        options = {"images": _IMAGES, "batch": _BATCH, "steps": 2}
        found = evaluate(*self.pipes, features=Pooled(), work=place / "work", **options)  # type: ignore[arg-type]
        assert found is not None
        (place / "figures.json").write_text(json.dumps(found.to_json()))

    def _forked(self, place: Path) -> int:
        place.mkdir(exist_ok=True)

        def run() -> int:
            log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            make = Sampling.batch_of

            def counted(*given: object) -> torch.Tensor:
                images = make(*given)  # type: ignore[arg-type]
                os.write(log, b"x")
                return images

            Sampling.batch_of = counted  # type: ignore[method-assign, assignment]
            self._evaluate(place)
            return 0

        return forked(run)

    def _ended(self, child: int) -> None:
        code = exit_code(child)
        if code:
            self.outcome.wrong.append(f"an evaluation ended with {code}")


def held(place: Path) -> Files:
    """All files of an evaluation by name, but for the count of made batches."""
    files = [path for path in place.rglob("*") if path.is_file() and path.name != "log"]
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


def made(place: Path) -> int:
    """How many batches were made."""
    return len((place / "log").read_bytes())


def storm(kills: int, folder: Path) -> Outcome:
    """Run trials until this many evaluations were killed."""
    trials = Evaluations(folder)
    number = 0
    while trials.outcome.kills < kills and number < 4 * kills and not trials.outcome.wrong:
        trials.trial(number)
        number += 1
    return trials.outcome


def _run(kills: int, folder: Path) -> tuple[list[str], bool]:
    outcome = storm(kills, folder)
    return outcome.lines(), not outcome.wrong


if __name__ == "__main__":
    sys.exit(main(__doc__, "chaos", _run))
