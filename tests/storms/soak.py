"""Uses quantized models for a long time (``make soak``): results stay the same, and nothing grows.

Calls of mixed batch sizes, sizes of images, prompts, timesteps and numbers of torch threads alternate with calls in
several Python threads, loads, copies in half precision, LoRAs, caches of steps and compilation. Each result is compared
with the first one of the same call: bit for bit with the same number of torch threads, else to 1e-4 of its largest
element.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor, fx, nn
from torch._dynamo.guards import CheckFunctionManager
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fxquant
from fxquant.capture.graph import CapturedGraph
from fxquant.errors import BackendError
from fxquant.memory.mappings import trim
from fxquant.runtime.model import GraphModel
from fxquant.testing import tiny_dit, tiny_flux
from fxquant.testing.models import calibration, example_call
from tests.adapters.loras import lora
from tests.mutations.cases import quiet

COUNTED = (GraphModel, fx.GraphModule, fx.Node, nn.Module, Tensor, CapturedGraph, threading.Thread)
"""Classes whose objects are counted."""
WARM_UP = 0.25
"""The part of a run after which memory and objects are counted for the first time."""
GROWTH_MB = 32.0
"""The most MB by which the resident set may grow from then to the end."""
CLOSE = 1e-4
"""The largest difference between results of different numbers of torch threads, relative to the largest element."""
THREADS = 3
_LINE = 200  # Calls per line of progress.

Key = tuple[str, int, int, int, float, int]
"""A call: the model, the batch size, the size of images, the length of prompts, the timestep and the seed."""


@dataclass
class Soaked:
    """What came of a run.

    Attributes:
        done: How often each kind of action was done.
        calls: Number of calls whose result was compared.
        wrong: What was not as promised.
        memory: The resident set in MB after warming up and at the end.
        objects: For each class, the number of its objects after warming up and at the end.
        seconds: How long the run took.
    """

    done: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    objects: dict[str, list[int]] = field(default_factory=dict)
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """What came of it, in words."""
        before, after = self.memory
        grown = [f"{name} {first:,} and {last:,}" for name, (first, last) in self.objects.items()]
        return [
            f"{self.calls} calls in {self.seconds:.0f} s: {', '.join(f'{n} {what}' for what, n in self.done.items())}",
            f"resident set {before:.0f} MB after {WARM_UP:.0%} of the calls, {after:.0f} MB at the end",
            f"objects then and at the end: {', '.join(grown)}",
            f"{len(self.wrong)} wrong",
            *self.wrong,
        ]


class Soak:
    """Models in use.

    Args:
        folder: An empty folder for checkpoints.
        seed: Of what is done.
        families: Names of the models: ``dit`` and ``flux``, each with its backend behind a slash.
        sizes: Sizes of images.
        short: Leave out what takes seconds: copies in half precision and compilation.
    """

    def __init__(
        self, folder: Path, seed: int, families: Sequence[str], sizes: Sequence[int] = (8, 16), short: bool = False
    ) -> None:
        self.random = random.Random(seed)
        self.folder, self.sizes, self.short = folder, sizes, short
        self.result = Soaked()
        self.models: dict[str, GraphModel] = {}
        self.floats: dict[str, nn.Module] = {}
        self.first: dict[tuple[Key, int], Tensor] = {}
        self._lock = threading.Lock()
        self._threads = torch.get_num_threads()
        for name in families:
            kind, _, backend = name.partition("/")
            model = {"dit": tiny_dit, "flux": tiny_flux}[kind](layers=2)
            recipe = "ptq4dit-w4a8" if backend == "fake-quant" else "smoothquant-w8a8"
            try:
                made = fxquant.compile(model, recipe=recipe, backend=backend, calibrate=calibration(model), measure=0)
            except BackendError as error:
                print(f"{name} is left out: {error}", flush=True)
                continue
            self.models[name], self.floats[name] = made, model
            fxquant.save(made, folder / name.replace("/", "-"))

    def run(self, calls: int, seconds: float = float("inf")) -> Soaked:
        """Make at least this many calls, and compare them; fewer if they take longer than some seconds."""
        began = time.perf_counter()
        shares: dict[Callable[[str], None], float] = {self.call: 12, self.threads: 3, self.torch_threads: 2}
        shares |= {self.load: 0.5, self.adapter: 0.5, self.cache: 0.5}
        shares |= {} if self.short else {self.half: 0.3, self.compile: 0.2}
        actions = [*shares]
        try:
            for action in 2 * actions:  # So that nothing is done later for the first time, or replaces something first.
                for name in self.models:
                    action(name)
            for name in self.models:
                for key in self._keys(name):
                    self._compare(name, key)
            told = 0
            while self.result.calls < calls and time.perf_counter() - began < seconds:
                if self.result.calls >= told + _LINE:
                    told = self.result.calls
                    print(f"{told} calls, {time.perf_counter() - began:.0f} s, {_resident():.0f} MB", flush=True)
                (action,) = self.random.choices(actions, [*shares.values()])
                action(self.random.choice(sorted(self.models)))
                self.result.done[action.__name__] += 1
                if not self.result.memory and self.result.calls >= WARM_UP * calls:
                    self._count()
            if not self.result.memory:
                self.result.wrong.append(f"only {self.result.calls} calls, too few to compare memory")
                self._count()
            self._count()
        finally:
            torch.set_num_threads(self._threads)
        self.result.seconds = time.perf_counter() - began
        self._judge()
        return self.result

    # --- what is done ---

    def call(self, name: str) -> None:
        """One call."""
        self._compare(name, self._key(name))

    def threads(self, name: str) -> None:
        """Calls in several Python threads at once, each with its own shapes and timesteps."""
        jobs = [[self._key(name) for _ in range(2)] for _ in range(THREADS)]

        def job(keys: list[Key]) -> None:
            for key in keys:
                self._compare(name, key)

        with ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(job, keys) for keys in jobs]:
                done.result()

    def load(self, name: str) -> None:
        """A checkpoint is loaded and called, and goes."""
        backend = name.partition("/")[2]
        self._compare(name, self._key(name), fxquant.load(self.folder / name.replace("/", "-"), backend=backend))

    def half(self, name: str) -> None:
        """A copy becomes bfloat16 and float32 again."""
        made = copy.deepcopy(self.models[name]).to(torch.bfloat16)
        key = self._key(name)
        if not bool(self._output(made, key).isfinite().all()):
            self.result.wrong.append(f"{key} in bfloat16 is not finite")
        made.to(torch.float32)
        self._output(made, key)

    def adapter(self, name: str) -> None:
        """A LoRA comes, is used, and goes."""
        model, key = self.models[name], self._key(name)
        model.load_lora_adapter(lora(self.floats[name]), adapter_name="a")
        changed = self._output(model, key)
        model.delete_adapters("a")
        self._compare(name, key)
        if torch.equal(changed, self.first[key, torch.get_num_threads()]):
            self.result.wrong.append(f"{key}: the LoRA changed nothing")

    def cache(self, name: str) -> None:
        """Steps are cached for a few calls."""
        model, key = self.models[name], self._key(name)
        model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        with model.cache_context("cond"):
            for step in (900.0, 880.0, 860.0):
                self._output(model, (*key[:4], step, key[5]))
        if not model.cache_counts["skipped"]:
            self.result.wrong.append(f"{key}: no step was skipped")
        model.disable_cache()
        self._compare(name, key)

    def torch_threads(self, name: str) -> None:
        """Later calls run with another number of torch threads."""
        torch.set_num_threads(self.random.choice([1, 2]))
        self.call(name)

    def compile(self, name: str) -> None:
        """A copy is compiled, without code of its own, and goes."""
        made, key = copy.copy(self.models[name]), self._key(name)
        made.compile(backend="eager")
        output, wanted = self._output(made, key), self._output(self.models[name], key)
        if not _close(output, wanted):
            self.result.wrong.append(f"{key} compiled: another result")
        torch._dynamo.reset()
        _forget_compilations()

    # --- what is checked ---

    def _keys(self, name: str) -> list[Key]:
        prompts = (5, 7) if name.startswith("flux") else (5,)
        return [
            (name, batch, size, prompt, step, batch)
            for batch in (1, 2, 3)
            for size in self.sizes
            for prompt in prompts
            for step in (900.0, 500.0, 20.0)
        ]

    def _key(self, name: str) -> Key:
        with self._lock:
            return self.random.choice(self._keys(name))

    def _output(self, model: Any, key: Key) -> Tensor:
        _, batch, size, prompt, step, seed = key
        given = example_call(self.floats[key[0]], batch, step, size, prompt, seed)
        given = {name: self._as(value, model) for name, value in given.items()}
        with torch.no_grad():
            output: Tensor = model(**given)[0]
        return output

    @staticmethod
    def _as(value: Any, model: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
        return value.to(model.dtype) if floats else value

    def _compare(self, name: str, key: Key, model: Any = None) -> None:
        output, threads = self._output(self.models[name] if model is None else model, key), torch.get_num_threads()
        with self._lock:
            self.result.calls += 1
            others = [found for (known, _), found in self.first.items() if known == key]
            wanted = self.first.setdefault((key, threads), output)
            if not torch.equal(output, wanted):
                self.result.wrong.append(f"{key} with {threads} torch threads: another result than the first time")
            if others and not _close(output, others[0]):
                self.result.wrong.append(f"{key}: another result than with other numbers of torch threads")

    def _count(self) -> None:
        hooks = sum(  # First, because the modules of a model are made when somebody asks for them.
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for model in self.models.values()
            for module in model.modules()
        )
        for _ in range(4):  # What one collection frees may hold other cycles.
            gc.collect()
        trim()
        self.result.memory.append(_resident())
        # Torch keeps the shapes of the last traces, as fake tensors, in caches of functions.
        objects = [one for one in gc.get_objects() if not isinstance(one, FakeTensor)]
        counts = {kind.__name__: sum(isinstance(one, kind) for one in objects) for kind in COUNTED}
        counts["objects of fxquant"] = sum(str(type(one).__module__).startswith("fxquant.") for one in objects)
        counts["graphs"] = sum(len(model.captured) for model in self.models.values())
        counts["hooks"] = hooks
        counts["results kept here"] = len(self.first)
        for name, count in counts.items():
            self.result.objects.setdefault(name, []).append(count)

    def _judge(self) -> None:
        first, last = self.result.memory
        if last - first > GROWTH_MB:
            self.result.wrong.append(f"the resident set grew by {last - first:.0f} MB")
        kept = self.result.objects["results kept here"]
        for name, (before, after) in self.result.objects.items():
            slack = (kept[1] - kept[0]) * 3 if name == "Tensor" else 0
            if name != "results kept here" and after > before + slack:
                self.result.wrong.append(f"{name}: {before} became {after}")


def _close(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).abs().max() <= CLOSE * right.abs().max())


def _forget_compilations() -> None:
    """Free what torch keeps of compilations of any model after a reset, so that what fxquant would keep shows.

    Guards stay until what they read is freed, and they read ``torch.ops``. Sizes of inputs are in a cycle through C++,
    and with them the cache of fake tensors.
    """
    for finalizer, held in list(weakref.finalize._registry.items()):  # type: ignore[attr-defined]
        if isinstance(getattr(getattr(held.func, "func", None), "__self__", None), CheckFunctionManager):
            finalizer.detach()
    for one in gc.get_objects():
        if type(one) is ShapeEnv:
            one.tracked_fakes = []
            one.fake_tensor_cache.clear()


def _resident() -> float:
    """Resident set of this process in MB; 0 if the operating system does not report it."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def main() -> int:
    """Run the soak; return 1 if something was wrong, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--models", nargs="+", default=["dit/fake-quant", "flux/fake-quant", "dit/native"])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after this time")
    parser.add_argument("--report", type=Path, help="write what came of it as JSON")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fxquant-soak-"))
    print(f"seed {options.seed}", flush=True)
    try:
        with quiet():
            result = Soak(folder, options.seed, options.models).run(options.calls, 60 * options.minutes)
    finally:
        shutil.rmtree(folder)
    print("\n".join(result.lines()))
    if options.report:
        options.report.write_text(json.dumps(vars(result), indent=1) + "\n")
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
