"""What inspections are about: a quantized model, a checkpoint, or a plan with the float model it was made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxquant.capture.calls import CallSpec
from fxquant.capture.trace import Architecture
from fxquant.errors import ConfigurationError, UnknownNameError
from fxquant.inspect.plans import checkpoint_folder
from fxquant.pipeline.backend import Backend, resolve_backend
from fxquant.planning.plan import Plan
from fxquant.runtime.float_model import check_model, device_of
from fxquant.runtime.model import GraphModel
from fxquant.runtime.wrappers import unwrapped

Source = nn.Module | Plan | str | Path
"""What is inspected: a model that fxquant made, a plan, or the folder of a checkpoint or of a pipeline with one."""


@dataclass(frozen=True)
class Graphs:
    """A plan with what its graphs are made from.

    Attributes:
        plan: The plan.
        architecture: The model without weights.
        backend: What the graphs are lowered to; None if it is not installed here.
        device: The device of the graphs.
        lowered: The lowered graphs of a model, one per call of the plan; empty for a plan and a checkpoint.
    """

    plan: Plan
    architecture: Architecture
    backend: Backend | None
    device: torch.device
    lowered: Sequence[fx.GraphModule] = ()

    def call(self, graph: int) -> CallSpec:
        """The call that one graph serves.

        Raises:
            ConfigurationError: If there is no graph of this number.
        """
        calls = self.plan.calls
        if not 0 <= graph < len(calls):
            known = "graph 0" if len(calls) == 1 else f"graphs 0 to {len(calls) - 1}"
            raise ConfigurationError(f"there is no graph {graph}; calibration captured {known if calls else 'none'}")
        return calls[graph]


def graphs_of(source: Source, model: nn.Module | type[nn.Module] | None = None) -> Graphs:
    """Resolve what is inspected. Weights are not read.

    Args:
        source: What is inspected.
        model: For a plan: the float model that it was made for. For a checkpoint: as for :func:`fxquant.load`.

    Raises:
        ConfigurationError: If the source is none of these, or a plan comes without its model.
        CheckpointError: If the folder holds no checkpoint, or a damaged one.
    """
    if isinstance(source, (str, Path)):
        return _of_folder(checkpoint_folder(source), model)
    if isinstance(source, Plan):
        if not isinstance(model, nn.Module):
            raise ConfigurationError(
                "a plan alone has no graph; give the float model that it was made for as well (model=), or the folder "
                "of a checkpoint"
            )
        check_model(model)
        architecture = Architecture.of(model, source.timestep)
        device = device_of(model)
        return Graphs(source, architecture, _backend_of(source, device), device)
    inner: Any = unwrapped(source)
    if not isinstance(inner, GraphModel) or inner.plan is None or inner.backend is None:
        raise ConfigurationError(
            "a quantized model, its plan or the folder of a checkpoint can be inspected, not a "
            f"{type(inner).__name__}; make a quantized model with fxquant.compile"
        )
    lowered = [captured.module for captured in inner.lasting]
    return Graphs(inner.plan, inner.architecture, inner.backend, inner.device, lowered)


def plan_if_alone(source: Source) -> Source:
    """The plan in place of a folder that holds nothing but a plan (:meth:`Plan.save`); anything else is unchanged."""
    if not isinstance(source, (str, Path)):
        return source
    from fxquant.storage.aot.model import CONFIG_FILE

    folder = checkpoint_folder(source)
    return source if (folder / CONFIG_FILE).is_file() else Plan.load(folder)


def _of_folder(folder: Path, model: nn.Module | type[nn.Module] | None) -> Graphs:
    from fxquant.storage.skeleton import description_of, read_plan

    found = description_of(folder, read_plan(folder))
    device = torch.device("cpu")
    return Graphs(found.plan, found.build(model), _backend_of(found.plan, device), device)


def _backend_of(plan: Plan, device: torch.device) -> Backend | None:
    try:
        return resolve_backend(plan.backend).on(device)
    except UnknownNameError:  # A checkpoint can be inspected where its backend is not installed.
        return None
