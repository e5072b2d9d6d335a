"""What the processes of the tests do. Each function gets its rank and the number of ranks first."""

from __future__ import annotations

import copy
import os
import signal
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import fxquant
from fxquant.distributed.agreement import check_alike
from fxquant.distributed.team import Team
from tests.adapters.fluxes import MODEL, PROMPT, make_pipe
from tests.conversions import rebuilt_once, worked_out_once
from tests.test_two_experts import clip, pipeline
from tests.tiny import make_dit
from tests.tiny import run as run_dit
from tests.traces import known_memos, memos, traced_once

Calls = Sequence[dict[str, Any]]


def jobs(rank: int, size: int, wanted: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The results of several functions of this module, or what they raise, each with its arguments.

    The processes trace a model once for all of them.
    """
    found: list[Any] = []
    with group(), traced_once(), rebuilt_once(), memos(known_memos), worked_out_once():
        for function, *arguments in wanted:
            try:
                found.append(function(rank, size, *arguments))
            except Exception as error:
                error.add_note(traceback.format_exc())
                found.append(error)
            dist.barrier()  # A function that fails on one rank ends later on the others.
    return found


def quantize(
    rank: int, size: int, folder: Path, recipe: str, shares: Sequence[Calls], options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Quantize a tiny DiT; this rank calibrates with its share of the calls."""
    statistics = fxquant.Statistics(keep_calls=32)
    more: dict[str, Any] = {"statistics": statistics, "group": dist.group.WORLD, **(options or {})}
    model = make_dit(2)
    with mock.patch.object(Team, "add_up_often", autospec=True, side_effect=Team.add_up_often) as added:
        quantized = compiled(model, recipe, shares[rank], **more)
    statistics.save(folder / f"{rank}.statistics")
    return {**facts(quantized), "gradients": added.call_count}


def compiled(model: Any, recipe: Any, calls: Calls, **options: Any) -> Any:
    """Compile a model on calls, without warnings."""

    def calibrate() -> None:
        for call in calls:
            run_dit(model, **call)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fxquant.compile(model, recipe=recipe, calibrate=calibrate, **options)


def compiled_from(model: Any, recipe: Any, statistics: fxquant.Statistics, **options: Any) -> Any:
    """Compile a model from statistics, without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fxquant.compile(model, recipe=recipe, statistics=statistics, **options)


def facts(quantized: Any) -> dict[str, Any]:
    """What all ranks should have in common."""
    plan = quantized.plan.to_json()
    plan.pop("passes", None)
    return {"plan": plan, "tensors": {name: tensor.clone() for name, tensor in quantized.tensors().items()}}


def flux(rank: int, size: int, folder: Path, recipe: str) -> dict[str, Any]:
    """Quantize the transformer of a FLUX pipeline; each rank makes an image of its own."""
    from fxquant.passes.split_low_rank import SplitLowRank

    pipe, statistics = flux_pipe(), fxquant.Statistics(keep_calls=32)
    fitted, original = [], SplitLowRank._fitted

    def fit(self: Any, layer: Any, *given: Any) -> Any:
        fitted.append(layer.name)
        return original(self, layer, *given)

    with warnings.catch_warnings(), mock.patch.object(SplitLowRank, "_fitted", fit):
        warnings.simplefilter("ignore")
        quantized = fxquant.compile(
            pipe.transformer,
            recipe=recipe,
            calibrate=lambda: pipe(**PROMPT, generator=torch.Generator().manual_seed(rank)),
            measure=0,
            statistics=statistics,
            group=dist.group.WORLD,
        )
    statistics.save(folder / f"{rank}.statistics")
    return {**facts(quantized), "fitted": fitted}


def flux_pipe() -> Any:
    """A tiny FLUX pipeline."""
    return make_pipe(copy.deepcopy(MODEL))


def experts(rank: int, size: int) -> dict[str, Any]:
    """Quantize the two experts of a pipeline in one calibration; each rank makes a clip of its own."""
    pipe = pipeline()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = fxquant.compile_pipeline(
            pipe, recipe="rtn-w8a8", calibrate=lambda: clip(pipe, seed=rank), measure=2, group=dist.group.WORLD
        )
    return {name: facts(model) for name, model in made.items()}


def twice(rank: int, size: int, folder: Path, calls: Calls) -> None:
    """Quantize twice with the same statistics."""
    statistics = fxquant.Statistics()
    for _ in range(2):
        mine = calls[len(calls) * rank // size : len(calls) * (rank + 1) // size]
        compiled(make_dit(2), "rtn-w8a8", mine, statistics=statistics, group=dist.group.WORLD)
    statistics.save(folder / f"{rank}.statistics")


def quantize_other(rank: int, size: int, calls: Calls) -> None:
    """The last rank has another model."""
    model = make_dit(2)
    if rank == size - 1:
        model.transformer_blocks[1].attn1.to_q.weight.data += 1
    compiled(model, "rtn-w8a8", calls, group=dist.group.WORLD)


def quantize_recipes(rank: int, size: int, recipes: Sequence[str], calls: Calls) -> None:
    """Each rank has a recipe of its own."""
    compiled(make_dit(2), recipes[rank], calls, group=dist.group.WORLD)


def quantize_broken(rank: int, size: int, calls: Calls) -> None:
    """One weight cannot be rounded, on the rank that rounds it."""
    from fxquant.errors import NonFiniteError
    from fxquant.passes import _rounders

    original = _rounders.GPTQ.quantize

    def quantize(self: Any, name: str, *arguments: Any) -> Any:
        if name == "transformer_blocks.1.ff.net.2":
            raise NonFiniteError(f"layer {name}: cannot be factorized")
        return original(self, name, *arguments)

    with mock.patch.object(_rounders.GPTQ, "quantize", quantize):
        compiled(make_dit(2), "ptq4dit-gptq-w4a8", calls, group=dist.group.WORLD)


def quantize_until(rank: int, size: int, recipe: Any, shares: Sequence[Calls], step: int) -> None:
    """The last rank fails in a step of learning, while the others wait for its gradients."""
    original, steps = Team.add_up_often, []

    def add_up(self: Team, tensors: Any) -> None:
        steps.append(0)
        if rank == size - 1 and len(steps) == step:
            raise MemoryError("no more memory")
        original(self, tensors)

    with mock.patch.object(Team, "add_up_often", add_up):
        compiled(make_dit(2), recipe, shares[rank], group=dist.group.WORLD)


def resumed(rank: int, size: int, folder: Path, recipe: str, shares: Sequence[Calls]) -> dict[str, Any]:
    """Quantize without interruption, then again with a failure on one rank while it rounds, and then to the end."""
    from fxquant.calibration.calibrate import Calibration
    from fxquant.errors import NonFiniteError, RankError
    from fxquant.passes import _rounders
    from fxquant.planning import kept_weights

    compute, quantize = Calibration.compute, _rounders.GPTQ.quantize
    calls: list[int] = []
    layers: list[str] = []
    stops = [2] if rank == size - 1 else []

    def counted(self: Any, *given: Any) -> Any:
        calls.append(1)
        return compute(self, *given)

    def rounded(self: Any, name: str, *given: Any) -> Any:
        if stops and len(layers) == stops[0]:
            stops.clear()
            raise NonFiniteError("interrupted")
        layers.append(name)
        return quantize(self, name, *given)

    def made(**options: Any) -> Any:
        statistics = fxquant.Statistics(keep_calls=8)
        model = make_dit(2)
        return facts(
            compiled(model, recipe, shares[rank], statistics=statistics, group=dist.group.WORLD, measure=0, **options)
        )

    whole = made()
    with (
        mock.patch.object(Calibration, "compute", counted),
        mock.patch.object(_rounders.GPTQ, "quantize", rounded),
        mock.patch.object(kept_weights, "WORTH_KEEPING", 0.0),
    ):
        try:
            made(resume=folder)
        except (NonFiniteError, RankError):
            dist.barrier()
        again = made(resume=folder)
    return {"whole": whole, "again": again, "calls": len(calls), "layers": layers}


class group:
    """The process group of all ranks, as a context."""

    def __enter__(self) -> None:
        dist.init_process_group("gloo")

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()


def exchange(rank: int, size: int) -> dict[str, Any]:
    """Values of every kind that a team exchanges."""
    with group(), Team(dist.group.WORLD) as team:
        total = torch.arange(5.0) * (rank + 1)
        team.add_up(total)
        sums = [team.count("steps", rank + 1)]
        team.wait()
        return {
            "gathered": team.gather({"rank": rank, "tensor": torch.full((rank + 1,), rank)}),
            "from 1": team.broadcast(f"of {rank}" if rank == 1 else None, 1),
            "total": total,
            "count": max(*sums, team.count("steps", 0)),
            "share": list(team.share(10)),
            "first": team.claim("message"),
        }


def fail(rank: int, size: int, how: str, wait: float, on: int = 1, busy: float = 0.0) -> float:
    """One rank fails while the others wait; returns how long they waited. The last one begins to wait later."""
    began = time.monotonic()
    with group(), Team(dist.group.WORLD) as team:
        team.wait()
        if rank == on:
            time.sleep(wait)
            if how == "raises":
                raise ValueError("no more ink")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(busy if rank == size - 1 else 0.0)
        began = time.monotonic()
        try:
            team.gather(rank)
        except fxquant.FxquantError as error:
            error.waited = time.monotonic() - began  # type: ignore[attr-defined]
            raise
    return time.monotonic() - began


def slow(rank: int, size: int, seconds: float) -> float:
    """Rank 0 takes longer than the timeout of the process group."""
    import datetime

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=1))
    began = time.monotonic()
    with Team(dist.group.WORLD) as team:
        if rank == 0:
            time.sleep(seconds)
        team.gather(rank)
    dist.destroy_process_group()
    return time.monotonic() - began


def differ(rank: int, size: int, given: Sequence[dict[str, Any]]) -> None:
    """Ranks compare what they were given."""
    with group(), Team(dist.group.WORLD) as team:
        check_alike(team, given[rank])
