"""The function ``profile``: runs both graphs alternately and combines the times of their nodes into rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from fxquant.errors import ConfigurationError
from fxquant.inspect.profiling.attribution import Attribution, Place, attribute
from fxquant.inspect.profiling.results import FLOAT, QUANTIZED, NodeTime, Profile, Row
from fxquant.inspect.profiling.roofline import measure_roofline, timed
from fxquant.inspect.profiling.stand_ins import batch_of, fill, make_inputs
from fxquant.inspect.profiling.timing import Times, Watch, Work, total
from fxquant.pipeline.backend import Backend, resolve_backend
from fxquant.planning.plan import Plan
from fxquant.runtime.model import GraphModel
from fxquant.runtime.wrappers import unwrapped

_WARM_UP = 2


def profile(
    model: nn.Module | str | Path,
    *,
    backend: str | Backend | None = None,
    device: str | torch.device | None = None,
    batch: int | None = None,
    rounds: int = 10,
    threads: int | None = None,
    compiled: bool = False,
    against_float: bool = True,
) -> Profile:
    """Measure the time of a quantized model, layer by layer and kind by kind, compared with float.

    Both graphs run op by op and as a whole, alternately, so that a machine that slows down slows both. The float model
    is the same architecture with random weights, because times do not depend on them. Its inputs are those of the first
    captured call, with noise in place of latents. The peaks of the machine are measured first.

    Args:
        model: What :func:`fxquant.compile` or :func:`fxquant.load` returned, or the folder of a checkpoint or of a
            pipeline with one.
        backend: For a folder: a backend other than the one that the model was compiled for.
        device: For a folder: the device to run on; the CPU by default.
        batch: Samples per call. If None: 2, or the only batch size that the graph serves.
        rounds: Number of measured runs, after two warm-up runs.
        threads: Number of torch threads during the profile; None, the default, does not change it.
        compiled: Whether to time both models under ``torch.compile`` as well, which takes a minute or more.
        against_float: Whether to run the float model too, which needs memory for float weights.

    Raises:
        ConfigurationError: If the model is not quantized, or an option is out of range.
        CheckpointError: If the folder holds no checkpoint, or a damaged one.
        BackendError: If the backend cannot run the model.
        UnknownNameError: If there is no such backend.
    """
    if rounds < 1:
        raise ConfigurationError(f"{rounds} rounds are too few; at least one is needed")
    if threads is not None and threads < 1:
        raise ConfigurationError(f"{threads} threads are too few; at least one is needed")
    quantized = _quantized(model, backend, device)
    assert quantized.plan is not None and quantized.backend is not None
    plan, place = quantized.plan, quantized.device
    call = quantized.captured[0].call
    size = batch_of(call, batch)
    inputs = make_inputs(call, plan, size, place)
    original = quantized.architecture.capture_spec(call, place).module
    lowered = quantized.captured[0].module
    graphs = {QUANTIZED: lowered}
    if against_float:
        fill(original, place)
        graphs[FLOAT] = original
    with _threads(threads), torch.no_grad():
        roofline = measure_roofline(quantized.dtype, place)
        watches = {name: Watch(module, plan, place) for name, module in graphs.items()}
        nodes, calls = _rounds(watches, inputs, rounds)
        if compiled:
            calls |= _compiled(graphs, inputs, rounds, place)
    found = attribute(lowered.graph, original.graph)
    timings = {name: _node_times(name, watch, nodes[name], found) for name, watch in watches.items()}
    return Profile(
        model_class=plan.model_class,
        backend=plan.backend,
        device=str(place),
        batch=size,
        roofline=roofline,
        calls=calls,
        rows=tuple(_rows(timings, watches, found, plan, quantized.backend)),
        nodes=tuple(node for name in watches for node in timings[name]),
    )


def _quantized(
    model: nn.Module | str | Path, backend: str | Backend | None, device: str | torch.device | None
) -> GraphModel:
    if isinstance(model, (str, Path)):
        from fxquant.inspect.plans import checkpoint_folder
        from fxquant.storage.checkpoint import load

        runner = None if backend is None else resolve_backend(backend)
        return load(checkpoint_folder(model), backend=runner, device="cpu" if device is None else device)
    if backend is not None or device is not None:
        raise ConfigurationError("a model has its backend and device already; give the folder that fxquant.save wrote")
    inner = unwrapped(model)
    if not isinstance(inner, GraphModel) or inner.plan is None:
        raise ConfigurationError(
            f"profile takes a quantized model or the folder of one, not a {type(model).__name__}; "
            "make one with fxquant.compile"
        )
    return inner


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def _rounds(
    watches: dict[str, Watch], inputs: list[Tensor], rounds: int
) -> tuple[dict[str, list[list[float]]], dict[str, Times]]:
    """Seconds of each node, one list per round, and times of whole calls, for each graph."""
    nodes: dict[str, list[list[float]]] = {name: [] for name in watches}
    calls: dict[str, list[float]] = {name: [] for name in watches}
    for number in range(-_WARM_UP, rounds):
        for name, watch in watches.items():
            watch.run(*inputs)
            module = watch.module
            _, seconds = timed(lambda module=module: module(*inputs), watch.device)  # type: ignore[misc]
            if number >= 0:
                nodes[name].append(watch.seconds)
                calls[name].append(1e3 * seconds)
    return nodes, {name: Times(tuple(values)) for name, values in calls.items()}


def _compiled(
    graphs: dict[str, fx.GraphModule], inputs: list[Tensor], rounds: int, device: torch.device
) -> dict[str, Times]:
    made = {f"{name}, compiled": torch.compile(module) for name, module in graphs.items()}
    calls: dict[str, list[float]] = {name: [] for name in made}
    for number in range(-_WARM_UP, rounds):
        for name, module in made.items():
            _, seconds = timed(lambda module=module: module(*inputs), device)  # type: ignore[misc]
            if number >= 0:
                calls[name].append(1e3 * seconds)
    return {name: Times(tuple(values)) for name, values in calls.items()}


def _node_times(graph: str, watch: Watch, rounds: list[list[float]], found: Attribution) -> list[NodeTime]:
    places = found.lowered if graph == QUANTIZED else found.original
    return [
        NodeTime.of(graph, node, places[node.name].name, Times(tuple(1e3 * seconds for seconds in column)))
        for node, column in zip(watch.called, zip(*rounds, strict=True), strict=True)
    ]


def _rows(
    timings: dict[str, list[NodeTime]], watches: dict[str, Watch], found: Attribution, plan: Plan, backend: Backend
) -> Iterator[Row]:
    placed: dict[Place, dict[str, list[Times]]] = {}
    work: dict[Place, dict[str, Work]] = {}
    for graph, nodes in timings.items():
        places = found.lowered if graph == QUANTIZED else found.original
        for node in nodes:
            place, own = places[node.name], watches[graph].work[node.name]
            placed.setdefault(place, {}).setdefault(graph, []).append(node.times)
            before = work.setdefault(place, {}).get(graph, Work())
            work[place][graph] = Work(before.operations + own.operations, before.traffic + own.traffic)
    order = [name for name in found.original.values() if name.is_layer]
    for place, times in placed.items():
        done = work[place]
        kernel, precision, kind = _what_runs(place, plan, backend)
        names = {place.name, *found.inside.get(place, ())}
        yield Row(
            layers=tuple(dict.fromkeys([*(p.name for p in order if p.name in names), place.name])),
            is_layer=place.is_layer,
            kind=kind,
            precision=precision,
            kernel=kernel,
            falls_back=backend.falls_back(kernel),
            floating=total(times[FLOAT]) if FLOAT in times else None,
            quantized=total(times[QUANTIZED]) if QUANTIZED in times else None,
            # A backend's kernel may hide its products; then the products of the replaced float ops are counted.
            operations=max(part.operations for part in done.values()),
            traffic=done.get(QUANTIZED, Work()).traffic,
        )


_KIND_OF_LAYER = {"linear": "linear", "conv": "convolution", "embedding": "embedding"}


def _what_runs(place: Place, plan: Plan, backend: Backend) -> tuple[str, str, str]:
    """Kernel, precision and kind of a row."""
    if place.is_layer and place.name in plan.layers:
        layer = plan.layers[place.name]
        return backend.kernel(layer), str(layer.precision), _KIND_OF_LAYER.get(layer.kind, layer.kind)
    if place.kind == "attention" and place.name in plan.attentions:
        attention = plan.attentions[place.name]
        bits = "float" if attention.bits is None else f"a{attention.bits}"
        return backend.attention_kernel(attention), bits, place.kind
    return "", "", place.kind
