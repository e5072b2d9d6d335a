"""Streams the tensors of an offloaded model to a device in each call.

Group offload of diffusers and sequential offload of accelerate end here. A graph reads its tensors by name. The code of
an offloaded graph moves each tensor right before the op that reads it, and forgets the moved copy right behind that op.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxquant.capture.graph import CapturedGraph
from fxquant.errors import ConfigurationError

SLOT = "offloaded"
"""Name of the stand-in among the modules of a model that accelerate offloads."""

Code = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Group:
    """Options of an offload.

    Attributes:
        non_blocking: Copy without waiting, where the memory is pinned.
    """

    non_blocking: bool = False


@dataclass
class Streaming:
    """Runs graphs on a device that does not hold their tensors.

    Attributes:
        device: The device.
        options: How tensors are copied.
    """

    device: torch.device
    options: Group
    _codes: dict[int, tuple[Any, Code]] = field(default_factory=dict)

    def arrived(self, arguments: Any) -> Any:
        """The same arguments with their tensors on the device."""
        return pytree.tree_map(lambda leaf: leaf.to(self.device) if isinstance(leaf, Tensor) else leaf, arguments)

    def run(self, captured: CapturedGraph, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """The outputs of a graph for inputs on the device."""
        module = captured.module
        kept = self._codes.get(id(module))
        if kept is None or kept[0] is not module._code:
            kept = self._codes[id(module)] = module._code, streamed(module, self.device, self.options)
        return kept[1](module, *inputs)


def streamed(module: fx.GraphModule, device: torch.device, options: Group) -> Code:
    """The code of a graph, as a function of its module and inputs, that moves each tensor for each op that reads it."""
    graph = copy.deepcopy(module.graph)
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        for user in list(node.users):
            with graph.inserting_before(user):
                here = graph.create_node("get_attr", node.target)
                moved = graph.call_method("to", (here, device), {"non_blocking": options.non_blocking})
            user.replace_input_with(node, moved)
        graph.erase_node(node)
    code: Code = type(fx.GraphModule(module, graph)).forward
    return code


class Slot(nn.Module):
    """Stands in for the graphs of a model while accelerate attaches hooks that offload it.

    accelerate attaches a hook to every module with tensors of its own. The hook says which device computes. The graphs
    themselves must get no hooks, because these replace tensors by empty ones until a module is called.

    Args:
        offload: Called with the device that computes.
    """

    marker: Tensor
    _offload: Callable[[torch.device], None]

    def __init__(self, offload: Callable[[torch.device], None]) -> None:
        super().__init__()
        self.register_buffer("marker", torch.empty(0), persistent=False)
        object.__setattr__(self, "_offload", offload)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_hf_hook":
            if getattr(getattr(value.weights_map, "dataset", None), "save_folder", None) is not None:
                raise ConfigurationError(
                    "a captured model cannot be offloaded to files. Use accelerate.cpu_offload or "
                    "pipe.enable_sequential_cpu_offload(), which keep its tensors in CPU memory"
                )
            value.weights_map = {}  # The model keeps its own tensors.
            self._offload(torch.device(value.execution_device))
        super().__setattr__(name, value)


def is_offloading(hook: Any) -> bool:
    """Whether a hook of accelerate announces that the weights below are moved in each call.

    Raises:
        ConfigurationError: If they are to be spread over several devices by a device map.
    """
    parts = [part for part in getattr(hook, "hooks", (hook,)) if getattr(part, "io_same_device", False)]
    if any(part.tied_params_map is not None for part in parts):
        raise ConfigurationError(
            "a captured model runs on one device, and a device map with several cannot spread it. Move it with "
            ".to(device); if it does not fit, use model.enable_group_offload(device)"
        )
    return any(part.execution_device is None for part in parts)
