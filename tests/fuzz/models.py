"""Random transformers whose calls differ: optional inputs, masks, numbers, layers that only some calls use.

Each graph of :mod:`tests.fuzz.graphs` is independent. A model has several graphs that share one plan and their tensors,
in any order of capture. A change that one graph folds into a tensor must be correct for the other graphs.
"""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor, nn

import fxquant
from fxquant.testing.random_models import Call, Choices, RandomTransformer, filled, kinds
from tests.fuzz.cases import low_bits, pipeline
from tests.fuzz.proof import BAR, CALIBRATED, SenselessError, bar, error


def run(seed: int) -> None:
    """Compile the model twice, with calibration calls in opposite orders, and compare both with the model.

    Raises:
        SenselessError: If the model allows no comparison.
    """
    r = Random(seed)
    choices, calls = Choices(r), kinds(r)
    before, passes = "remove-no-ops,assign-precision", pipeline(r) + low_bits(Random(seed))
    seen = r.randint(1, len(calls))  # Other kinds come later, and are refused if they run more layers.
    weights = r.getrandbits(32)
    for order in (calls, calls[::-1]):
        model, calibrated = RandomTransformer(choices, weights), order[:seen]
        for kind in order:
            computed(model, filled(kind, 500.0, 0))  # Otherwise compile would report a failure as one of calibration.

        def calibrate(model: nn.Module = model, calibrated: list[Call] = calibrated) -> None:
            for number, step in enumerate(CALIBRATED):
                for kind in calibrated:
                    model(**filled(kind, step, number))

        try:
            compiled = fxquant.compile(
                model, recipe=fxquant.Recipe.parse(f"{before} ; {passes}"), calibrate=calibrate, measure=0
            )
        except fxquant.errors.CalibrationError as refusal:
            raise SenselessError("not all that is observed has the batch in front") from refusal
        for number, kind in enumerate([*order, *order]):
            call = filled(kind, 700.0 * (number % 2), 10 + number)
            right, most = expected(model, call)
            try:
                actual = computed(compiled, call)
            except fxquant.errors.CalibrationError:
                assert kind not in calibrated  # This kind runs layers that no calibration call ran.
                continue
            except fxquant.errors.CaptureError as refusal:
                # It needs another fold of a tensor, and the float weights are gone.
                assert kind not in calibrated and "another form of it" in str(refusal)
                continue
            found = error([actual], [right])
            assert found <= most, (
                f"{sorted(kind)} among {[sorted(k) for k in order]}, {seen} calibrated: off by {found:.1e}"
            )


def expected(model: nn.Module, call: Call) -> tuple[Tensor, float]:
    """The output of the model, and the largest error of an equal model."""
    right = computed(model, call)
    if not float(right.abs().max()) < 1e6:
        raise SenselessError("the outputs grow without bound, or are NaN")
    with torch.no_grad():
        held = [parameter.clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.mul_(1 + 2e-16)
        moved = computed(model, call)
        for parameter, value in zip(model.parameters(), held, strict=True):
            parameter.copy_(value)
    most = bar([moved], [right])
    if most >= 100 * BAR:
        raise SenselessError("the outputs have no digits to compare")
    return right, most


def computed(model: nn.Module, call: Call) -> Tensor:
    """The output, with the same dropout each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**call)
