"""A packaged model: the machine code of its graphs, the tensors that they read, and its signature as JSON."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxquant.capture.calls import Call, CallSpec
from fxquant.capture.describe import canonical_call, describe_call
from fxquant.capture.trace import Architecture
from fxquant.disk.files import blaming, dtype_of_name
from fxquant.errors import CaptureError, CheckpointError, ConfigurationError
from fxquant.runtime.drop_in import DropIn, hand_on
from fxquant.runtime.nans import with_nans
from fxquant.storage.agreement import Header, bounded

PACKAGE_FILE = "package.json"
CONFIG_FILE = "config.json"


class PackagedGraph:
    """One compiled graph and its tensors.

    Attributes:
        call: The kind of call that it serves.
        out_spec: Pytree structure of the model's output.
    """

    def __init__(self, path: Path, call: CallSpec, out_spec: pytree.TreeSpec, tensors: Sequence[Tensor]) -> None:
        self.call = call
        self.out_spec = out_spec
        self._tensors = tensors
        self._loader = torch._inductor.aoti_load_package(str(path)).loader
        wanted = pytree.treespec_loads(self._loader.get_call_spec()[0]).num_leaves
        if wanted != len(call.tensors) + len(tensors):
            raise CheckpointError(
                f"{path.name} has {wanted} inputs, but by {PACKAGE_FILE} {len(call.tensors)} and {len(tensors)} tensors"
            )

    @torch.no_grad()
    def __call__(self, leaves: Sequence[Any]) -> Any:
        """The model's output for the leaves of a call that fits this graph."""
        # Compiled code expects contiguous inputs without lazy conjugation or negation, as when it was compiled.
        inputs = [tensor.resolve_conj().resolve_neg().contiguous() for tensor in self.call.inputs(leaves)]
        found = self._loader.boxed_run([*inputs, *self._tensors])
        return pytree.tree_unflatten(with_nans(self.call, inputs, found), self.out_spec)


class PackagedModel(DropIn):
    """A packaged model; pipelines accept it in place of the original.

    It has the ``config``, ``dtype``, ``device``, ``forward`` signature and output class of the original. It hands on
    other attributes of an original without weights, which is built when such an attribute is first read.

    Attributes:
        calls: The kinds of call that were packaged, one per graph.
        info: The content of ``package.json``.
    """

    def __init__(
        self,
        info: Mapping[str, Any],
        config: Mapping[str, Any],
        graphs: Sequence[PackagedGraph],
        headers: Mapping[str, Header],
    ) -> None:
        super().__init__()
        self.info = info
        self._config = config
        self._headers = headers
        self._graphs = list(graphs)
        self._signature = signature_from_json(info["signature"])
        self.forward = functools.partial(_forward, self)
        self.forward.__signature__ = self._signature  # type: ignore[attr-defined]
        self.eval()

    @property
    def calls(self) -> list[CallSpec]:
        """The kind of call that each graph serves."""
        return [graph.call for graph in self._graphs]

    @property
    def config(self) -> Any:
        """The original model's config."""
        return _frozen(self._config)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point dtype of the original model."""
        return dtype_of_name(self.info["dtype"])

    @property
    def device(self) -> torch.device:
        """The device that it was compiled for."""
        return torch.device("cpu")

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refuse: a package does not hold what it was made from.

        Raises:
            ConfigurationError: Says what to do instead.
        """
        raise ConfigurationError("a packaged model is not saved but copied: copy its folder, or export a checkpoint")

    def skeleton(self) -> nn.Module:
        """The original model without its weights, if its class is from diffusers.

        Raises:
            AttributeError: If the class is not from diffusers.
            CheckpointError: If the class cannot be built with the config.
        """
        if "_skeleton" not in self.__dict__:
            module, _, name = str(self.info["model_class"]).partition(":")
            cls = getattr(importlib.import_module("diffusers"), name, None) if module == "diffusers" else None
            if cls is None:
                raise AttributeError(f"the packaged model is a {name} from {module}; the package holds only its calls")
            with blaming(Path(CONFIG_FILE)), bounded(self._headers):
                made = Architecture.from_config(cls, self._config, self.info["timestep"]).skeleton
            self.__dict__["_skeleton"] = made  # Not a submodule: its parameters are fake.
        skeleton: nn.Module = self.__dict__["_skeleton"]
        return skeleton

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return hand_on(self.skeleton(), name, self)

    def train(self, mode: bool = True) -> PackagedModel:
        """Refuse training mode, as the model that was packaged does.

        Raises:
            ConfigurationError: If ``mode`` is true.
        """
        if mode:
            raise ConfigurationError("a packaged model has no training mode. Train the float model and compile that")
        super().train(False)
        return self

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        raise ConfigurationError(
            "a packaged model has no state dict: its tensors are inputs of machine code. Copy its folder, or use the "
            "state dict of the checkpoint that it was exported from"
        )

    def __copy__(self) -> PackagedModel:
        return PackagedModel(self.info, self._config, self._graphs, self._headers)

    def __deepcopy__(self, memo: Any) -> PackagedModel:
        return self.__copy__()  # A packaged model never changes, so the copy runs the same machine code.

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigurationError(
            "a packaged model cannot be pickled or written by torch.save, because it is machine code. Copy its folder "
            "and read the copy with fxquant.load_package(folder)"
        )

    def check_to(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Refuse another device or dtype than those that it was compiled for.

        Raises:
            ConfigurationError: Says what to do instead.
        """
        device, dtype = device or self.device, dtype or self.dtype
        if dtype != self.dtype or device != self.device:
            raise ConfigurationError(
                f"a packaged model runs in {self.dtype} on {self.device}, for which it was compiled, not in "
                f"{dtype} on {device}; load a checkpoint instead, or export another package"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> PackagedModel:
        probe = fn(torch.empty(0, dtype=self.dtype))
        self.check_to(probe.device, probe.dtype)
        return self


@torch.compiler.disable
def _forward(self: PackagedModel, *args: Any, **kwargs: Any) -> Any:
    call = canonical_call(self._signature, args, kwargs, self.info["timestep"])
    for graph in self._graphs:
        if graph.call.fits(call):
            _refuse_unreadable(call)
            return graph(call.leaves)
    packaged = "".join(f"\n  {spec}" for spec in self.calls)
    here = describe_call(call)
    here = here.at_batch(here.batch_size(call.leaves), None)
    raise CaptureError(
        f"this call fits no graph of the package: {here}\nThe package has graphs for{packaged}\n"
        "Make a call like this one during calibration, or with the quantized model before you export it."
    )


def _refuse_unreadable(call: Call) -> None:
    """Refuse tensors whose memory compiled code cannot read. Compiled code does not check this itself.

    Raises:
        ConfigurationError: Names the input.
    """
    for name, leaf in call.named:
        if not isinstance(leaf, Tensor):
            continue
        fake, plain = isinstance(leaf, FakeTensor), leaf.layout is torch.strided
        if leaf.device.type != "cpu" or fake or not plain:
            found = f"on {leaf.device}" if leaf.device.type != "cpu" else "fake" if fake else str(leaf.layout)
            raise ConfigurationError(
                f"input {name!r} is {found}; a packaged model reads dense tensors on the CPU. Convert the input, or "
                "use the checkpoint that the package was exported from"
            )


def signature_to_json(signature: inspect.Signature) -> list[dict[str, Any]]:
    """A signature as JSON values. Defaults that are not plain constants become None."""
    found = []
    for parameter in signature.parameters.values():
        entry: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name}
        if parameter.default is not parameter.empty:
            plain = isinstance(parameter.default, (bool, int, float, str, type(None)))
            entry["default"] = parameter.default if plain else None
        found.append(entry)
    return found


def signature_from_json(data: Sequence[Mapping[str, Any]]) -> inspect.Signature:
    """The inverse of :func:`signature_to_json`."""
    return inspect.Signature(
        [
            inspect.Parameter(
                entry["name"],
                getattr(inspect.Parameter, entry["kind"]),
                default=entry.get("default", inspect.Parameter.empty),
            )
            for entry in data
        ]
    )


def _frozen(config: Mapping[str, Any]) -> Any:
    from diffusers.configuration_utils import FrozenDict

    return FrozenDict(config)
