"""Calibrations that are refused, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fxquant.capture.threads import autocast_dtype
from fxquant.capture.whole import whole_of
from fxquant.errors import CalibrationError, NotCalledError
from fxquant.planning.plan import Plan
from fxquant.statistics.kept_calls import Run


def refuse_autocast(leaves: Sequence[Any]) -> None:
    """Refuse a call under ``torch.autocast``.

    Args:
        leaves: The inputs of the call.

    Raises:
        CalibrationError: If it is made under autocast.
    """
    devices = {"cpu", *(leaf.device.type for leaf in leaves if isinstance(leaf, Tensor))}
    dtype = next(filter(None, map(autocast_dtype, sorted(devices))), None)
    if dtype is not None:
        raise CalibrationError(
            f"calibrate calls the model under torch.autocast, which computes in {dtype} whatever the model's dtype; "
            f"convert the model with model.to({dtype}) and call it outside of torch.autocast"
        )


def not_called(model: nn.Module) -> NotCalledError:
    """The error of a calibration whose callable did not call the model."""
    whole = whole_of(model)
    if whole is not None:
        return NotCalledError(
            f"calibrate returned without calling the {whole.path} of this {whole.model_class.__name__}; it must "
            "use this very object, for example in a pipeline that makes images, without output_type='latent'"
        )
    return NotCalledError(
        f"calibrate returned without calling the model ({type(model).__name__}); it must call this very object, "
        "for example through the pipeline that holds it"
    )


def refuse_other_steps(run: Run | None, plan: Plan) -> None:
    """Refuse statistics of other denoising steps than the recipe observes.

    Args:
        run: What the statistics were recorded from; None if nothing was recorded.
        plan: Says which steps are observed.

    Raises:
        CalibrationError: Names both.
    """
    if run is not None and (run.step, run.later) != (plan.observed_step, plan.later_steps):
        held, wanted = (
            "all steps" if step is None else f"step {step}" + (f" and {later} later" if later else "")
            for step, later in ((run.step, run.later), (plan.observed_step, plan.later_steps))
        )
        raise CalibrationError(
            f"the statistics hold {held} of the sampler, and the recipe observes {wanted}; calibrate with this recipe"
        )
