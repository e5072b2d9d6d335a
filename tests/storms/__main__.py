"""Kills, interrupts and races saves at random times (``make storm``). Nothing may be lost.

Each save runs in its own process, forked from this one, which makes the models once. A third of the kills happens at
any time during a save. The rest happens while the folders are exchanged, which takes a hundredth of the save.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

import fxquant
from fxquant.disk import folders
from fxquant.disk.files import check_digests
from fxquant.errors import CheckpointError, WriteError
from fxquant.runtime.model import GraphModel
from fxquant.storage.skeleton import read_plan
from tests.tiny import calibrate, make_dit, run

Content = dict[str, bytes]
KILLS = {"SIGKILL": signal.SIGKILL, "SIGINT": signal.SIGINT}
_SAVED, _REFUSED, _INTERRUPTED = 0, 3, 4  # Exit codes of a saving process.


class Storm:
    """Two different models, the contents of their checkpoints, and the duration of a save.

    Args:
        folder: An empty folder to work in.
    """

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)  # Forked processes do not have the other threads.
        self.folder = folder
        self.number = 0
        self.models: list[GraphModel] = []
        self.contents: list[Content] = []
        for recipe in ("rtn-w8a8", "rtn-w4a8"):
            model = make_dit()
            self.models.append(fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), measure=0))
            fxquant.save(self.models[-1], folder / recipe)
            self.contents.append(held(folder / recipe))
        run(self.models[0])
        began = time.perf_counter()
        fxquant.save(self.models[0], folder / "rtn-w8a8", overwrite=True)
        self.seconds = time.perf_counter() - began

    def place(self) -> Path:
        """The path of a folder q in a new parent folder."""
        self.number += 1
        return self.folder / str(self.number) / "q"

    def kill(self, how: str, *, overwrite: bool, exchange: bool) -> str:
        """Kill one save; return the state in which it left the folder."""
        place = self.place()
        if overwrite:
            fxquant.save(self.models[0], place)
        late = random.random() < 2 / 3
        reader, writer = os.pipe()

        def save() -> None:
            if not exchange:
                folders.exchange = lambda *_: False  # type: ignore[assignment]
            if late and overwrite and not exchange:  # Kill between the two renames; the save pauses there.
                _wrap("_set_aside", after=lambda: (os.write(writer, b"."), time.sleep(0.002)))
            elif late:
                _wrap("place", before=lambda: os.write(writer, b"."))
            else:
                os.write(writer, b".")
            fxquant.save(self.models[1], place, overwrite=overwrite)

        child = forked(save)
        os.close(writer)
        os.read(reader, 1)
        time.sleep(random.uniform(0, 0.003 if late else self.seconds))
        os.kill(child, KILLS[how])
        os.waitpid(child, 0)
        os.close(reader)
        return self.judged(place, must_stand=overwrite)

    def judged(self, place: Path, must_stand: bool) -> str:
        """Check the result of a killed save: it is complete, errors name leftovers, and the next save removes them."""
        state = "nothing"
        if place.is_dir():
            state = ("old", "new")[self.contents.index(held(place))]
            digests = read_plan(place)["files"]
            check_digests(place, tuple(digests), digests, "plan.json")
        elif must_stand:
            (aside,) = [path for path in folders.leftovers(place) if ".replaced-" in path.name]
            assert self.contents.index(held(aside)) == 0
            assert str(aside) in str(folders.no_folder(place))
            state = "set aside"
        fxquant.save(self.models[1], place, overwrite=True)
        assert held(place) == self.contents[1]
        assert [path.name for path in place.parent.iterdir()] == ["q"], list(place.parent.iterdir())
        return state

    def race(self, *, overwrite: bool, exchange: bool) -> str:
        """Let two processes save to the same place at once; return the outcome."""
        place = self.place()
        ready, go = os.pipe(), os.pipe()

        def saver(model: GraphModel) -> Callable[[], None]:
            def save() -> None:
                if not exchange:
                    folders.exchange = lambda *_: False  # type: ignore[assignment]
                os.write(ready[1], b".")
                os.read(go[0], 1)
                fxquant.save(model, place, overwrite=overwrite)

            return save

        children = [forked(saver(model)) for model in self.models]
        for _ in children:
            os.read(ready[0], 1)
        os.write(go[1], b"..")
        answers = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        for end in (*ready, *go):
            os.close(end)
        won = self.contents.index(held(place))
        beside = [path for path in place.parent.iterdir() if path != place]
        assert answers[won] == _SAVED
        if overwrite:
            assert answers == [_SAVED, _SAVED]
            assert not beside, beside
            return "both saved, one after the other"
        assert answers[1 - won] == _REFUSED, answers
        for kept in beside:
            assert held(kept) == self.contents[1 - won]
        return "second kept beside" if beside else "second refused at once"


def _wrap(method: str, before: Callable[[], object] = bool, after: Callable[[], object] = bool) -> None:
    """Call functions before and after a method of the folder being written."""
    inner = getattr(folders._Scratch, method)

    def wrapped(*args: Any) -> None:
        before()
        inner(*args)
        after()

    setattr(folders._Scratch, method, wrapped)


def held(folder: Path) -> Content:
    """Content of the files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def forked(task: Callable[[], None]) -> int:
    """Run a task in a forked process; return its process id."""
    child = os.fork()
    if child:
        return child
    _answer(task)


def _answer(task: Callable[[], None]) -> NoReturn:
    answer = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        task()
        answer = _SAVED
    except KeyboardInterrupt:
        answer = _INTERRUPTED
    except (WriteError, CheckpointError):
        answer = _REFUSED
    finally:
        os._exit(answer)


def storm(kills: int, races: int, folder: Path) -> list[str]:
    """Run kills, divided over the signals, and races; half with ``overwrite``, half without the atomic exchange.

    Returns:
        One line for each kind.
    """
    made = Storm(folder)
    lines = []
    for overwrite, exchange in itertools.product((True, False), repeat=2):
        said = f"overwrite={overwrite}, {'exchange' if exchange else 'renames'}"
        for how in KILLS:
            kill = functools.partial(made.kill, how, overwrite=overwrite, exchange=exchange)
            lines.append(f"{how:8} {said:28} {_counted(kill, -(-kills // 8))}")
        race = functools.partial(made.race, overwrite=overwrite, exchange=exchange)
        lines.append(f"{'race':8} {said:28} {_counted(race, -(-races // 4))}")
    return lines


def _counted(trial: Callable[[], str], number: int) -> str:
    states: Counter[str] = Counter()
    for _ in range(number):
        try:
            states[trial()] += 1
        except Exception:  # Any exception means that a guarantee was broken.
            traceback.print_exc()
            states["lost"] += 1
    lost = states.pop("lost", 0)
    return f"{number:4}: {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}; {lost} lost"


def main() -> int:
    """Run the storm; return 1 if something was lost, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--races", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    random.seed(options.seed)
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="fxquant-storm-"))
    lines = storm(options.kills, options.races, folder)
    print("\n".join(lines))
    if not all(line.endswith("; 0 lost") for line in lines):
        print(f"what is left of it is in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
