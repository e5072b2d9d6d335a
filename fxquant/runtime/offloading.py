"""Streams the tensors of an offloaded model to a device in each call.

Group offload of diffusers and sequential offload of accelerate end here. A graph reads its tensors by name. The code of
an offloaded graph moves each tensor right before the op that reads it, and forgets the moved copy right behind that op.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxquant.errors import ConfigurationError, SpeedWarning

SLOT = "offloaded"
"""Name of the stand-in among the modules of a model that accelerate offloads."""

Code = Callable[..., tuple[Any, ...]]
F = TypeVar("F", bound=Callable[..., Any])


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
    _warned: bool = False

    def moved(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor on the device."""
        return tensor.to(self.device, non_blocking=self.options.non_blocking)

    def warn_uncompiled(self) -> None:
        """Warn once that the whole graph is not compiled, because its code moves tensors."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                "this model is offloaded, and its tensors move one by one, so it runs without being compiled. "
                "compile_repeated_blocks() works with offloading; or end it by disable_group_offload(), or by "
                "pipe.remove_all_hooks() after pipe.enable_sequential_cpu_offload()",
                SpeedWarning,
                stacklevel=4,
            )

    def arrived(self, arguments: Any) -> Any:
        """The same arguments with their tensors on the device."""
        return pytree.tree_map(lambda leaf: leaf.to(self.device) if isinstance(leaf, Tensor) else leaf, arguments)

    def run(self, module: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """The outputs of a graph for inputs on the device."""
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
        end: Called when the hook is removed.
    """

    marker: Tensor
    _offload: Callable[[torch.device], None]
    _end: Callable[[], None]

    def __init__(self, offload: Callable[[torch.device], None], end: Callable[[], None]) -> None:
        super().__init__()
        self.register_buffer("marker", torch.empty(0), persistent=False)
        object.__setattr__(self, "_offload", offload)
        object.__setattr__(self, "_end", end)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name == "_hf_hook":
            self._end()

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


def meanwhile_on_its_device(function: F) -> F:
    """Decorate a function that makes a model in place of a float model: it takes one that is offloaded as a whole.

    The made model is offloaded in place of the float model; if the function fails, the float model stays offloaded.
    """

    @functools.wraps(function)
    def with_hook_off(model: Any, *args: Any, **options: Any) -> Any:
        with on_its_device(model) as hand_on:
            made = function(model, *args, **options)
            hand_on(made)
        return made

    return with_hook_off  # type: ignore[return-value]


@contextlib.contextmanager
def on_its_device(model: Any) -> Iterator[Callable[[Any], None]]:
    """A context in which a model that is offloaded as a whole is on its device and has no hook.

    The hook of ``pipe.enable_model_cpu_offload()`` is taken off, because it would move the weights while graphs are
    traced. A pipeline that is run meanwhile attaches a hook again after each call. At the end the model gets the newest
    hook, or the one does that was made in its place: call what the context gives with it.
    """
    offloaded = [model]
    hooks: Any = sys.modules.get("accelerate.hooks")
    hook: Any = getattr(model, "__dict__", {}).get("_hf_hook")
    if hooks is None or type(hook) is not hooks.CpuOffload:
        yield offloaded.append
        return
    _take_hook(model)
    model.to(hook.execution_device)
    try:
        yield offloaded.append
    finally:
        newest = _take_hook(model) or hook
        model.to("cpu")
        hooks.add_hook_to_module(offloaded[-1], newest)


def _take_hook(model: Any) -> Any:
    """Take a hook of accelerate off a model, and return it. The model has its own ``forward`` again."""
    attributes = vars(model)
    hook, old = attributes.pop("_hf_hook", None), attributes.pop("_old_forward", None)
    if isinstance(attributes.get("forward"), functools.partial):  # Otherwise a calibration took it away already.
        attributes["forward"] = old
    if getattr(attributes.get("forward"), "__func__", None) is type(model).forward:
        del attributes["forward"]  # accelerate leaves the method of the class among the attributes.
    return hook


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
