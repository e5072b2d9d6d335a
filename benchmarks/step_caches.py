"""What caches of denoising steps gain and cost on a quantized model.

The digits model generates the same images without a cache and with caches of several thresholds: share of the steps
that are skipped, time of the transformer relative to no cache, and PSNR of the images against those without a cache. A
model of the published width has random weights, so its steps say nothing about images: of it, the time of a skipped
step relative to a full one is measured.

    python -m benchmarks.step_caches --steps 25,50 --model dit:4 --json out/step-caches.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig
from torch import Tensor

import fxquant
from benchmarks.models import cast, task_of
from examples.digits.generator import GUIDANCE, generate, load_pipeline
from examples.digits.metrics import psnr

_LABELS = [number % 10 for number in range(20)]
_NEVER, _ALWAYS = FirstBlockCacheConfig(threshold=-1.0), FirstBlockCacheConfig(threshold=1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", default="25,50", help="numbers of denoising steps of the digits model")
    parser.add_argument("--thresholds", default="0.05,0.1,0.2", help="of the first-block cache")
    parser.add_argument("--model", default="dit:4", help="the model of published width")
    parser.add_argument("--recipe", default="ptq4dit-w8a8")
    parser.add_argument("--backend", default="native")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    found = [row for count in options.steps.split(",") for row in _digits(options, int(count))]
    found.append(_one_step(options))
    for row in found:
        print(row)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(vars(options) | {"json": str(options.json), "found": found}, indent=2))


def _digits(options: argparse.Namespace, steps: int) -> list[dict[str, Any]]:
    """One row for each cache; without one, the images are those to compare with."""
    pipe = load_pipeline()

    def images(seed: int = 0) -> Tensor:
        return generate(pipe, _LABELS, seed=seed, steps=steps, guidance=GUIDANCE)

    float_images = images()
    pipe.transformer = model = fxquant.compile(
        pipe.transformer, recipe=options.recipe, backend=options.backend, calibrate=lambda: images(seed=1), measure=0
    )
    spent = _timed(model)
    configs = {f"first block, {text}": FirstBlockCacheConfig(float(text)) for text in options.thresholds.split(",")}
    configs["magnitude, 0.06"] = MagCacheConfig(mag_ratios=_ratios(model, images, steps), num_inference_steps=steps)
    made: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ("none", *configs)}
    skipped = {"none": 0.0}
    for _ in range(options.rounds):  # Interleaved, because the speed of a machine drifts.
        for name, times in seconds.items():
            if name != "none":
                model.enable_cache(configs[name])
            spent.clear()
            made[name] = images()
            times.append(sum(spent))
            if name != "none":
                skipped[name] = model.cache_counts["skipped"] / model.cache_counts["calls"]
                model.disable_cache()
    whole = statistics.median(seconds["none"])
    return [
        {
            "model": "digits", "steps": steps, "cache": name, "skipped": skipped[name],
            "time": statistics.median(times) / whole, "psnr_db": psnr(made[name], made["none"]),
            "psnr_to_float_db": psnr(made[name], float_images),
        }
        for name, times in seconds.items()
    ]  # fmt: skip


def _timed(model: Any) -> list[float]:
    """The seconds of the calls of a model, to which each call adds."""
    spent: list[float] = []
    begun: list[float] = []
    model.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
    model.register_forward_hook(lambda *_: spent.append(time.perf_counter() - begun.pop()))
    return spent


def _ratios(model: Any, images: Any, steps: int) -> list[float]:
    """The ratios that MagCache measures with other images, read from what it keeps before the last step."""
    model.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps + 1))
    memory = model._cache._rule.memory()
    model._cache._rule = _Kept(model._cache._rule, memory)
    images(seed=2)
    model.disable_cache()
    ratios: list[float] = memory.found
    return ratios


class _Kept:
    """A rule whose memory can be read."""

    def __init__(self, rule: Any, memory: Any) -> None:
        self._rule, self.memory = rule, lambda: memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)


@torch.no_grad()
def _one_step(options: argparse.Namespace) -> dict[str, Any]:
    """Time of a step that is skipped, relative to a full step."""
    task = task_of(options.model)
    float_model = task.model()
    model = fxquant.compile(
        float_model, recipe=options.recipe, backend=options.backend, calibrate=lambda: task.calibrate(float_model),
        measure=0,
    )  # fmt: skip
    call = cast(task.timed, torch.float32)
    seconds: dict[str, list[float]] = {"none": [], "never skips": [], "skips": []}
    for _ in range(options.rounds):
        for name, config in (("none", None), ("never skips", _NEVER), ("skips", _ALWAYS)):
            if config is not None:
                model.enable_cache(config)
            model(**call)
            for _ in range(5):
                begin = time.perf_counter()
                model(**call)
                seconds[name].append(time.perf_counter() - begin)
            if config is not None:
                model.disable_cache()
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    relative = {name: middle[name] / middle["none"] for name in ("never skips", "skips")}
    return {"model": options.model, "full_s": middle["none"], **relative}


if __name__ == "__main__":
    main()
