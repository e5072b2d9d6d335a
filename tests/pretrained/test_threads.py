"""Threads use one quantized model, or make it: each call has the output that it has alone."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor

import fxquant
from fxquant.pretrained.quantize import quantize_at_first_call
from fxquant.runtime.model import GraphModel
from tests.tiny import calibrate, make_dit, make_pipeline, run
from tests.traces import traced_anew

THREADS = 4


def at_once(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of functions that begin at once, each in a thread of its own."""
    ready = threading.Barrier(len(jobs))

    def begin(job: Callable[[], Any]) -> Any:
        ready.wait(60)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [done.result() for done in [pool.submit(begin, job) for job in jobs]]


def calls(model: Any, number: int = THREADS, rounds: int = 1) -> list[Callable[[], list[Tensor]]]:
    """Functions that call a model, each with batch sizes and timesteps of its own."""

    def job(thread: int) -> list[Tensor]:
        steps = [float(100 * thread + 50 * turn) for turn in range(rounds)]
        return [run(model, batch=1 + thread % 3, timestep=step, seed=thread) for step in steps]

    return [lambda thread=thread: job(thread) for thread in range(number)]  # type: ignore[misc]


@pytest.mark.slow
@traced_anew()  # Copies of one trace would share what a trace must not share between threads.
def test_threads_in_the_first_call_of_a_model_that_waits_for_it() -> None:
    config = fxquant.FxQuantConfig("dynamic-w4a8", measure=0)
    alone, shared = make_dit(), make_dit()
    for model in (alone, shared):
        quantize_at_first_call(model, config)
    expected = [job() for job in calls(alone)]
    assert not isinstance(shared, GraphModel)
    found = at_once([*calls(shared), *[lambda: [isinstance(shared.dtype, torch.dtype) for _ in range(1000)]] * 2])
    assert isinstance(shared, GraphModel)
    assert len(shared.graphs) == len(alone.graphs)  # type: ignore[arg-type]
    for outputs, wanted in zip(found, expected, strict=False):
        assert all(map(torch.equal, outputs, wanted))


def test_timesteps_stay_with_the_threads_that_give_them() -> None:
    """The graph looks up shifts by timestep, and a cache keeps the last timestep of each thread."""
    model = make_dit()
    made = fxquant.compile(model, recipe="htg-w4a8", layers="all", calibrate=calibrate(model), measure=0)
    expected = [job() for job in calls(made, rounds=3)]
    for outputs, wanted in zip(at_once(calls(made, rounds=3)), expected, strict=True):
        assert all(map(torch.equal, outputs, wanted))


@pytest.mark.slow
@traced_anew()
def test_pipelines_of_threads_share_a_model_while_others_are_loaded(tmp_path: Path) -> None:
    pipe: Any = make_pipeline()
    pipe.transformer = fxquant.compile(
        pipe.transformer, recipe="dynamic-w8a8", calibrate=calibrate(pipe.transformer), measure=0
    )
    fxquant.save(pipe.transformer, tmp_path / "dit")

    def images(label: int, transformer: Any = None) -> Tensor:
        own: Any = copy.copy(pipe)  # A pipeline holds the schedule of its run, so each thread needs its own.
        own.scheduler = copy.deepcopy(pipe.scheduler)
        own.transformer = transformer or pipe.transformer
        labels, generator = [label] * (1 + label % 2), torch.Generator().manual_seed(label)
        found: Any = own(labels, num_inference_steps=2, generator=generator, output_type="np")
        return torch.from_numpy(found.images)

    expected = [images(label) for label in range(THREADS)]
    jobs: list[Callable[[], Tensor]] = [lambda label=label: images(label) for label in range(THREADS)]  # type: ignore[misc]
    jobs += [lambda label=label: images(label, fxquant.load(tmp_path / "dit")) for label in range(2)]  # type: ignore[misc]
    for found, wanted in zip(at_once(jobs), [*expected, *expected[:2]], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # Not bit for bit while another thread traces.


@pytest.mark.slow
def test_caches_of_threads_are_apart() -> None:
    model = make_dit(layers=3)
    made = fxquant.compile(model, recipe="dynamic-w8a8", calibrate=calibrate(model), measure=0)

    def steps(seed: int) -> list[Tensor]:
        return [run(made, batch=1 + seed, timestep=step, seed=seed) for step in (900.0, 880.0, 860.0)]

    made.enable_cache(FirstBlockCacheConfig(threshold=1.0))
    expected = at_once([lambda: steps(0)]) + at_once([lambda: steps(1)])
    found = at_once([lambda: steps(0), lambda: steps(1), lambda: steps(0), lambda: steps(1)])
    for outputs, wanted in zip(found, expected * 2, strict=True):
        assert all(map(torch.equal, outputs, wanted))
