"""What a tensor-parallel model knows of its ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fxquant.capture.graph import CapturedGraph
from fxquant.errors import ConfigurationError
from fxquant.ir.tensors import fake_mode_of, get_tensor, set_tensor
from fxquant.parallel.cuts import Cuts
from fxquant.parallel.insertion import Seat, insert
from fxquant.parallel.plan import TensorParallelPlan
from fxquant.parallel.styles import Styles, styles_of


@dataclass(eq=False)
class Parallel:
    """The ranks of a tensor-parallel model.

    Attributes:
        plan: How the layers are divided.
        mesh: The ranks, a 1-d mesh.
        bytes_whole: Bytes of the tensors of the whole model.
    """

    plan: TensorParallelPlan
    mesh: DeviceMesh
    bytes_whole: int
    _cuts: Cuts = field(repr=False)
    _parts: dict[str, Tensor] = field(repr=False)
    _like: dict[str, Tensor] = field(repr=False)  # Of divided tensors: the whole one, on the meta device.

    def dtensors(self) -> dict[str, DTensor]:
        """The divided tensors by name, as DTensors over the parts of this rank.

        Their shards follow one another in the order of ranks. Of a layer that is divided in several runs, each shard
        holds a share of every run; packed codes are packed for each rank.
        """
        return {
            name: DTensor.from_local(part, self.mesh, [Shard(self._cuts[name].division.axis)], run_check=False)
            for name, part in self._parts.items()
        }

    def further(self, owner: Any, make_graph: Any, call: Any, branching: Any = None) -> CapturedGraph:
        """Make the graph of one rank for another call."""
        if branching is not None:
            raise ConfigurationError(
                "LoRAs cannot be loaded into a tensor-parallel model; fold them into the float model, or load them "
                "into a model on one rank"
            )
        captured: CapturedGraph = make_graph(_Whole(owner, self._like), call)
        styles = styles_of(captured.module.graph, self.plan.size, self.plan._held, self.plan._shared)
        self.divide(captured.module, styles, True)
        return captured

    def divide(self, module: fx.GraphModule, styles: Styles, further: bool) -> None:
        """Rewrite a graph to that of this rank, with the parts of this rank."""
        seat = Seat(self.mesh.get_local_rank(), self.plan.size, str(self.mesh.get_group().group_name))
        insert(module, styles, seat, self._cuts, self.plan._shared, further)
        if further:
            self.take_parts(module)

    def take_parts(self, module: fx.GraphModule) -> None:
        """Let a graph read the parts of this rank."""
        mode = fake_mode_of(module.graph)
        for node in module.graph.nodes:
            target = str(node.target)
            if node.op == "get_attr" and target in self._cuts:
                if get_tensor(module, target) is not self._parts[target]:
                    set_tensor(module, target, self._parts[target])
                with mode:
                    node.meta["val"] = torch.empty(self._parts[target].shape, dtype=self._parts[target].dtype)


class _Whole:
    """A tensor-parallel model as it was before it was divided, for graphs of further calls."""

    def __init__(self, model: Any, like: Mapping[str, Tensor]) -> None:
        self._model, self._like = model, like

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; divided ones have their whole shape and no values."""
        return {**self._model.tensors(), **self._like}


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of tensors."""
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors.values())
