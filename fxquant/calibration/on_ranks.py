"""One calibration by several processes: each makes its share of the calls, and all end with the same statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fxquant.calibration.calibrate import Calibration, make_calls
from fxquant.calibration.kept_calls import Spread
from fxquant.calibration.refusals import not_called
from fxquant.capture.calls import CallSpec
from fxquant.capture.fidelity import example
from fxquant.ir.tensors import bind
from fxquant.statistics.collection import Statistics
from fxquant.statistics.merging import merge_ranks

if TYPE_CHECKING:
    from fxquant.distributed.team import Team


def calibrate_on_ranks(
    start: Callable[[Statistics], Calibration],
    model: nn.Module,
    calibrate: Callable[[], Any],
    statistics: Statistics,
    team: Team,
    ready: Callable[[Calibration], object] = lambda _: None,
) -> Calibration:
    """Run the callables of all ranks, each of which calls the model for its share of the data.

    The ranks may make calls of different kinds, and in different orders; a rank may make none. The kinds of call are
    numbered by rank, and within a rank by their first call.

    Args:
        start: Makes a calibration, with a new plan, that records into the given statistics.
        model: The float model.
        calibrate: Makes the calls of this rank.
        statistics: Receives what all ranks recorded.
        team: The ranks.
        ready: Called with the calibration of this rank's calls, before the first one.

    Returns:
        The finished calibration. Its graphs, statistics, plan and kept calls are the same on all ranks.

    Raises:
        CalibrationError: If the callable failed, or no rank called the model.
        RankError: If another rank failed or died.
    """
    own = statistics.for_rank(team.rank)
    calibration = start(own)
    ready(calibration)
    make_calls(calibration, model, calibrate)
    calibration.end_calls()
    calls = sum(team.gather(calibration.calls))
    if not calls:
        raise not_called(model)
    merged = merge_ranks(own, team, statistics.seed)
    samples = _together(calibration._samples, team)
    inputs = [_inputs_of(calibration, kind, team) for kind in merged.calls.kinds]
    statistics.merge(merged)
    if [graph.call.to_json() for graph in calibration.prepared] == merged.calls.kinds:
        calibration.statistics = statistics
    else:  # Decisions of passes depend on the order of the graphs.
        calibration = _anew(start(statistics), merged, inputs, team)
    calibration.calls = calls
    for number, spread in enumerate(inputs):
        calibration._inputs[number] = spread
    calibration._samples = samples
    calibration.finish()
    return calibration


def _anew(calibration: Calibration, merged: Statistics, inputs: list[Spread[list[Tensor]]], team: Team) -> Calibration:
    """Capture the graphs of all kinds of call in the common order."""
    for entry, kept in zip(merged.calls.kinds, inputs, strict=True):
        spec = CallSpec.from_json(entry)
        if calibration.original is not None:
            calibration.original.warm(example(spec, team.device), calibration.architecture)
        captured = calibration.architecture.capture_spec(spec, team.device)
        bind(captured.module, calibration.weights)
        calibration.adopt(captured, kept.kept[:1] if calibration.prepare.prove else [])
    return calibration


def _inputs_of(calibration: Calibration, kind: dict[str, Any], team: Team) -> Spread[list[Tensor]]:
    """The kept inputs of one kind of call, of all ranks."""
    number = next((n for n, graph in enumerate(calibration.prepared) if graph.call.to_json() == kind), None)
    return _together(None if number is None else calibration._inputs[number], team)


def _together(own: Spread[Any] | None, team: Team) -> Spread[Any]:
    """The items that all ranks kept of a stream, in the order of the ranks, of which the wanted number is spread."""
    gathered = team.gather((0, []) if own is None else (own.wanted, own.chosen()))
    found: Spread[Any] = Spread(max(wanted for wanted, _ in gathered))
    found.kept = [item for _, items in gathered for item in items]
    return found
