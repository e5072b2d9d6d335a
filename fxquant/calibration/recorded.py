"""A second conversion from the statistics of an earlier calibration: nothing is observed again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.calibration.calibrate import Calibration, calls_redirected
from fxquant.calibration.kept_calls import Spread, calls_wanted, some_inputs
from fxquant.calibration.samples import KEPT_SAMPLES, Sample, timestep_of
from fxquant.capture.calls import CallSpec
from fxquant.capture.fidelity import example
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.trace import Architecture
from fxquant.errors import CalibrationError, FxquantError
from fxquant.ir.tensors import bind
from fxquant.pipeline.conduct import ask
from fxquant.pipeline.pipeline import Pass
from fxquant.statistics.collection import Statistics
from fxquant.statistics.kept_calls import KeptCall, KeptCalls


def calibrate_from_statistics(calibration: Calibration, device: torch.device) -> None:
    """Finish a calibration with what its statistics hold already.

    The graphs of all kinds of call that were seen are captured again. The calls that the statistics kept serve passes
    that learn from calls, and the measurement of the output error.

    Args:
        calibration: A new calibration, whose statistics come from an earlier one.
        device: Device of the model.

    Raises:
        CalibrationError: If the statistics lack what the recipe needs; the message says what, and what to do.
    """
    statistics = calibration.statistics
    if not statistics.calls.kinds:
        raise CalibrationError(
            "the statistics do not say how the model was called: an earlier version recorded them, or they were made "
            "by hand. Pass calibrate= as well, or plan= of the first conversion"
        )
    for number, entry in enumerate(list(statistics.calls.kinds)):
        spec = CallSpec.from_json(entry)
        if calibration.original is not None:
            calibration.original.warm(example(spec, device), calibration.architecture)
        captured = calibration.architecture.capture_spec(spec, device)
        bind(captured.module, calibration.weights)
        kept = statistics.calls.of_kind(number)
        inputs = [inputs_on(call, captured.call, device) for call in kept]
        calibration.adopt(captured, inputs[:1] if calibration.prepare.prove else [])
        most = calibration.most_samples
        stride = max(1, -(-len(kept) // most)) if most else 1
        chosen = list(zip(kept, inputs, strict=True))[::stride] if most else []
        samples = [_sample(captured, call.timestep, own) for call, own in chosen]
        calibration.recall(number, inputs, samples)
    calibration.finish()
    _check_complete(calibration)


def record_calls(
    model: nn.Module, architecture: Architecture, kinds: Sequence[CallSpec], most: int, calibrate: Callable[[], Any]
) -> KeptCalls:
    """Run a function that calls the float model, and keep some of the calls. The model itself computes.

    Args:
        model: The float model.
        architecture: The same model without weights.
        kinds: The kinds of call to keep; calls of other kinds are run and not kept.
        most: The most calls to keep.
        calibrate: Runs the model.

    Raises:
        CalibrationError: If the function fails, or makes no call of these kinds.
    """
    kept = KeptCalls(most)
    numbers = [kept.kind(kind.to_json()) for kind in kinds]
    forward = model.forward
    lock = threading.Lock()

    def recorded(*args: Any, **kwargs: Any) -> Any:
        call = architecture.canonical(args, kwargs)
        spec, number = next(((s, n) for s, n in zip(kinds, numbers, strict=True) if s.fits(call)), (None, 0))
        if spec is not None:
            with lock:
                step = timestep_of(call, architecture.timestep)
                priority = kept.wants(number, step)
                if priority is not None:
                    inputs = some_inputs(spec, spec.inputs(call.leaves), KEPT_SAMPLES)
                    kept.keep(number, step, priority, inputs)
        return forward(*args, **kwargs)

    try:
        with calls_redirected(model, recorded), torch.no_grad():
            calibrate()
    except FxquantError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"the function that runs the model raised {type(error).__name__}: {error}. The model is unchanged"
        ) from error
    if not len(kept):
        raise CalibrationError(
            f"the function that runs the model made no call like those of calibration: {kinds[0]}; it must call the "
            "float model itself, such as the pipeline that holds it"
        )
    return kept


def kept_inputs(
    captured: CapturedGraph, statistics: Statistics | None, passes: Sequence[Pass], device: torch.device
) -> list[list[Tensor]]:
    """Inputs of kept calls of a graph, as many as passes want; none if no call of this kind was kept."""
    kinds = [] if statistics is None else [CallSpec.from_json(kind) for kind in statistics.calls.kinds]
    if statistics is None or captured.call not in kinds:
        return []
    chosen: Spread[KeptCall] = Spread(calls_wanted(passes))
    for call in statistics.calls.of_kind(kinds.index(captured.call)):
        if chosen.wants_next():
            chosen.keep(call)
    return [inputs_on(call, captured.call, device) for call in chosen.chosen()]


def inputs_on(call: KeptCall, spec: CallSpec, device: torch.device) -> list[Tensor]:
    """The inputs of a kept call on a device. Python numbers stay on the CPU, as graphs expect them."""
    pairs = zip(call.inputs, spec.tensors, strict=True)
    return [tensor if leaf.number else tensor.to(device) for tensor, (_, leaf) in pairs]


def arguments_of(spec: CallSpec, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """The keyword arguments of a call of the model whose graph reads these inputs."""
    values: Mapping[str, Tensor] = dict(zip((name for name, _ in spec.tensors), inputs, strict=True))
    return spec.arguments(lambda name, leaf: values[name].item() if leaf.number else values[name])


def _sample(captured: CapturedGraph, timestep: float, inputs: Sequence[Tensor]) -> Sample:
    """A few samples of a kept call, with the float output, which the float graph computes."""
    some = some_inputs(captured.call, inputs, KEPT_SAMPLES)
    with torch.no_grad():
        output = next(leaf for leaf in captured.module(*some) if isinstance(leaf, Tensor))
    return Sample(timestep, arguments_of(captured.call, some), output.clone())


def _check_complete(calibration: Calibration) -> None:
    """Refuse a recipe that needs values that the statistics lack.

    Raises:
        CalibrationError: Names the first layer, and says what is missing.
    """
    plan, statistics = calibration.plan, calibration.statistics
    needed = {name: layer.observed for name, layer in plan.layers.items() if layer.observed is not None}
    sides = {
        f"{name}:{side}": key
        for name, attention in plan.attentions.items()
        if attention.bits is not None
        for side, key in attention.observed.items()
    }
    missing = [name for name, key in (needed | sides).items() if key not in statistics]
    if missing:
        raise CalibrationError(
            f"the statistics do not hold the inputs of {len(missing)} of {len(needed | sides)} observed layers, such "
            f"as {missing[0]!r}, which this recipe quantizes or balances. The recipe that recorded them observed other "
            "layers; calibrate with this recipe, or quantize the same layers as it did"
        )
    for name, layer in plan.layers.items():
        step = next((step for step in calibration.convert if ask(step, "wants_moments", layer)), None)
        if step is not None and layer.observed is not None and statistics[layer.observed].moments is None:
            raise CalibrationError(
                f"{step.name} needs second moments of the input of layer {name!r}, and the recipe that recorded the "
                "statistics needed none; calibrate with this recipe, or choose rounding=nearest"
            )
    learner = next((step for step in calibration.convert if ask(step, "wants_samples")), None)
    if learner is not None and not len(statistics.calls):
        raise CalibrationError(
            f"{learner.name} learns from calibration calls, and the statistics keep none; record them with "
            "fxquant.Statistics(keep_calls=32), or on the command line with --keep-statistics"
        )
