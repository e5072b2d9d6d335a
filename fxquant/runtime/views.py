"""The modules of a quantized model, as code that walks over the modules of a model sees them.

A graph calls no modules. Libraries look for modules of some classes and attach hooks to them or replace them: caches of
steps, layerwise casting, group offloading, other quantizers. If they found none, they would do nothing and say nothing.
So ``children()`` and ``modules()`` show the modules of the original: each view has the class and the name of one, holds
no tensors, and refuses hooks, weights and every change by name. ``modules()`` leaves out modules without children, such
as linears: loaders of diffusers that find them there read their weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from fxquant.errors import ConfigurationError
from fxquant.runtime.drop_in import DropIn, Part, refusal

_WALKS = frozenset(
    {
        "apply", "buffers", "children", "eval", "extra_repr", "modules", "named_buffers", "named_children",
        "named_modules", "named_parameters", "parameters", "requires_grad_", "train",
    }
)  # fmt: skip
"""Methods of ``torch.nn.Module`` that code calls while it walks over modules. A view has no tensors to give them."""


_QUANTIZERS = ("torchao.quantization.", "optimum.quanto.", "bitsandbytes.", "nncf.", "modelopt.", "compressed_tensors.")
"""Packages with functions that replace the linears of a model in place."""


def _refuse_quantizers() -> None:
    """Refuse other quantizers that walk over a model: they would find no linear, and return as if they had worked.

    Raises:
        ConfigurationError: Names the package.
    """
    frame: Any = sys._getframe(1)
    while str(frame.f_globals.get("__name__")).startswith(("fxquant.", "torch.nn.")) and frame.f_back is not None:
        frame = frame.f_back
    name = str(frame.f_globals.get("__name__"))
    if name.startswith(_QUANTIZERS):
        raise ConfigurationError(
            f"{name.partition('.')[0]} ({frame.f_code.co_name}) quantizes the linears of a float model, and a captured "
            "model has graphs in their place. Give it the float model, or one that fxquant.balance returned"
        )


class ModuleView(nn.Module):
    """A module of the original without its weights."""

    def __init__(self, module: nn.Module, owner: Any, path: str) -> None:
        nn.Module.__init__(self)
        vars(self).update(_module=module, _part=Part(module, owner, path), _owner=owner, _path=path, training=False)

    __class__ = property(lambda self: type(vars(self)["_module"]))

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_part"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "training" or value:
            raise refusal(f"{vars(self)['_path']}.{name}")

    def __delattr__(self, name: str) -> None:
        raise refusal(f"{vars(self)['_path']}.{name}")

    def named_children(self) -> Iterator[tuple[str, Any]]:
        """The views of its children."""
        own = vars(self)
        yield from views(own["_module"], own["_owner"], own["_path"])

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Itself and the views below that have children, by their names."""
        yield prefix, self
        for name, view in self.named_children():
            if view._module._modules:
                yield from view.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._part) if isinstance(self._module, nn.ModuleDict) else iter(self.children())

    def __len__(self) -> int:
        return len(self._module._modules)

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        held = dict(self.named_children())
        return held[key] if isinstance(key, str) else [*held.values()][key]

    def __repr__(self) -> str:
        return repr(self._part)


class Holder(nn.Module):
    """Shows the tensors of a module in a graph, and refuses hooks: a graph calls none of them."""

    def __init__(self, module: nn.Module, path: str) -> None:
        super().__init__()
        vars(self).update(_parameters=module._parameters, _buffers=module._buffers, training=False, _path=path)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in vars(self).get("_parameters", ()) or name in vars(self).get("_buffers", ())
        if "_path" in vars(self) and not own and (name != "training" or value):
            raise refusal(f"{self._path}.{name}")
        super().__setattr__(name, value)


def _refused(name: str) -> Any:
    def method(self: ModuleView | Holder, *_: Any, **__: Any) -> Any:
        raise refusal(f"{vars(self)['_path']}.{name}")

    return method


for _name, _value in vars(nn.Module).items():
    if callable(_value) and not _name.startswith("_") and _name not in _WALKS:
        setattr(ModuleView, _name, _refused(_name))
        setattr(Holder, _name, _refused(_name))


def views(module: nn.Module, owner: Any, path: str = "") -> Iterator[tuple[str, ModuleView]]:
    """The views of the children of a module of the original, by name."""
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        view = _kept(owner).get(where)
        if not isinstance(view, ModuleView) or view._module is not child:
            view = _kept(owner)[where] = ModuleView(child, owner, where)
        yield name, view


def _holder(module: nn.Module, owner: Any, path: str) -> Holder:
    """What shows the tensors of a module in a graph."""
    holder = _kept(owner).get(path)
    if not isinstance(holder, Holder) or holder._parameters is not module._parameters:
        holder = _kept(owner)[path] = Holder(module, path)
    return holder


def _kept(owner: Walked) -> dict[str, nn.Module]:
    """The views and holders of a model by path: one walk gives the same objects as another."""
    found: dict[str, nn.Module] = vars(owner)["_views"]
    return found


class Walked(DropIn):
    """The part of a captured model that shows the modules of the original.

    The graphs are in ``graphs``; their tensors are the model's ``parameters()`` and ``buffers()``.
    """

    architecture: Any

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_views"] = {}

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The views of the children of the original, by name."""
        _refuse_quantizers()
        yield from views(self.architecture.skeleton, self)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The model, the views of modules of the original, and what holds the tensors of the graphs."""
        _refuse_quantizers()
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        start = f"{prefix}." if prefix else ""
        for name, view in views(self.architecture.skeleton, self):
            if view._module._modules:
                yield from view.named_modules(memo, f"{start}{name}", remove_duplicate)
        for name, module in self._modules.items():
            inner = () if module is None else module.named_modules(memo, name, remove_duplicate)
            for path, held in inner:
                yield f"{start}{path}", _holder(held, self, path) if name == "graphs" else held

    def train(self, mode: bool = True) -> Any:
        """Set the mode of the graphs, which are not among the children."""
        self.training = mode
        for module in self._modules.values():
            if module is not None:
                module.train(mode)
        return self
