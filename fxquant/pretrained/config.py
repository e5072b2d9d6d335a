"""``FxQuantConfig``: what ``from_pretrained`` of diffusers is to do to a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.pipeline.needs import why_calibrated
from fxquant.pipeline.recipes import Recipe, make_recipe
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics


class Method(StrEnum):
    """The name by which diffusers finds the quantizer."""

    FXQUANT = "fxquant"


class FxQuantConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` of diffusers quantizes a model.

    It is given as ``quantization_config=``, alone or for a component of a pipeline in a ``PipelineQuantizationConfig``.
    What the arguments mean is described at :func:`fxquant.compile`.

    A recipe that needs no calibration is carried out at the first call of the model, because the graph is traced from a
    call: until then the object holds the float weights and stays a float model, into which a LoRA can still be fused.
    With ``calibrate`` or a plan the model is quantized before ``from_pretrained`` returns it.

    Args:
        recipe: A name with a precision, such as ``"rtn-w4a16"`` or ``"dynamic-w8a8"``, or a recipe.
        backend: Name of the backend.
        layers: ``"default"``, ``"blocks"`` or ``"all"``.
        timestep: Name of the ``forward`` argument that holds the timestep.
        plan: In place of a recipe: a plan of an earlier run, or the folder of one, to carry out again.
        calibrate: Gets the float model and runs it in the way in which it will be used.
        statistics: In place of ``calibrate``: statistics of an earlier calibration, or their file. With a plan, for
            roundings that use more than the weights.
        measure: Number of calls on which the output error is measured; 0 for none.
        recorded: Entries of a ``config.json``; not for callers.

    Raises:
        ConfigurationError: If neither or both of ``recipe`` and ``plan`` are given, or ``calibrate`` cannot be called.
        UnknownNameError: If there is no such recipe.
    """

    def __init__(
        self,
        recipe: str | Recipe | None = None,
        *,
        backend: str = "fake-quant",
        layers: str = "default",
        timestep: str = "timestep",
        plan: Plan | str | Path | None = None,
        calibrate: Callable[[nn.Module], Any] | None = None,
        statistics: Statistics | str | Path | None = None,
        measure: int = 8,
        recorded: Mapping[str, Any] | None = None,
    ) -> None:
        self.quant_method = Method.FXQUANT
        self.backend = backend
        self.layers = layers
        self.timestep = timestep
        self.plan = plan
        self.calibrate = calibrate
        self.statistics = statistics
        self.measure = measure
        self.recorded = None if recorded is None else dict(recorded)
        self.recipe = recipe
        if recorded is not None:
            return
        if (recipe is None) == (plan is None):
            raise ConfigurationError(
                'FxQuantConfig takes a recipe, such as recipe="rtn-w4a16", or a plan, and not both'
            )
        if calibrate is not None and not callable(calibrate):
            raise ConfigurationError(
                f"calibrate is a {type(calibrate).__name__}; give a function of the model that runs it"
            )
        if recipe is not None:
            make_recipe(recipe, layers)

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> FxQuantConfig | tuple[FxQuantConfig, dict[str, Any]]:
        """The entries of a ``config.json`` that describe a model that is quantized already."""
        config = cls(recorded=config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The entries as JSON values. Functions, plans and statistics are left out, except for their paths."""
        if self.recorded is not None:
            return dict(self.recorded)
        paths = {"plan": self.plan, "statistics": self.statistics}
        return {
            "quant_method": str(self.quant_method),
            "backend": self.backend,
            "layers": self.layers,
            "recipe": None if self.recipe is None else str(self.recipe),
            **{name: str(path) for name, path in paths.items() if isinstance(path, (str, Path))},
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """What diffusers shows of it."""
        return self.to_dict()

    def check_complete(self) -> None:
        """Refuse a recipe that needs a calibration, before any weight is read.

        Raises:
            CalibrationError: Says what to give, or which recipes need none.
        """
        if self.recipe is None or self.calibrate is not None or self.statistics is not None:
            return
        reason = why_calibrated(make_recipe(self.recipe, self.layers))
        if reason is not None:
            raise CalibrationError(
                f"recipe {str(self.recipe)!r} needs a calibration: {reason}. Give "
                "FxQuantConfig(calibrate=function), a function that gets the model and runs it; or statistics= or "
                "plan= of an earlier run; or a recipe that needs none, such as rtn-w8a16, rtn-w4a16-g64 or "
                "dynamic-w8a8. To calibrate with a whole pipeline, load it in float and call fxquant.compile"
            )
