"""The adapters of one quantized model: the methods of diffusers for LoRAs, and the branches of graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.adapters.branches import STRENGTH, Branching
from fxquant.adapters.checking import check_metadata, check_state_dict, check_supported, widened
from fxquant.adapters.folding import Folded, folded, padded
from fxquant.adapters.owner import Owner
from fxquant.adapters.reading import load_by_diffusers, peft_keys, read_adapter
from fxquant.adapters.stand_in import copy_in_dtypes_of, copy_of, deltas_of, make_stand_in, ranks_of, tuners
from fxquant.adapters.tuner import refuse_fusing, tuner_of
from fxquant.adapters.turns import Turns
from fxquant.capture.calls import Call, CallSpec
from fxquant.capture.graph import CapturedGraph
from fxquant.errors import AdapterError, NonFiniteError
from fxquant.ir.tensors import bind, is_finite, read_tensors

TUNER = "lora"
"""Name of the submodule by which pipelines find that a model has adapters."""


class Adapters:
    """Loads, weighs, switches and deletes LoRAs of a quantized model.

    The methods are those of ``diffusers.loaders.PeftAdapterMixin``, with the same arguments, so pipelines call them.
    Each works on a copy of the stand-in first, and takes effect only if everything fits.

    Attributes:
        captured: Graphs with branches. They serve calls while adapters are active, else the graphs without branches do.
        branching: The branches; None if no adapter is loaded.
        stand_in: Where diffusers and peft keep the adapters.
    """

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self.stand_in = make_stand_in(owner.architecture.skeleton)
        self.branching: Branching | None = None
        self.captured: list[CapturedGraph] = []
        self._active = False
        self._least_rank = 0
        self._turns = Turns()
        self._before: Any = None

    # --- what diffusers calls ---

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configs of the loaded adapters by name.

        Raises:
            AttributeError: If none is loaded: pipelines ask ``hasattr(model, "peft_config")``.
        """
        found: dict[str, Any] = getattr(self.stand_in, "peft_config", None) or {}
        if not found:
            raise AttributeError("peft_config")
        return found

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA; arguments as for ``diffusers.loaders.PeftAdapterMixin.load_lora_adapter``.

        With ``hotswap``, the LoRA replaces the loaded one of the same ``adapter_name``. If its ranks are not larger
        than those for which the branches have room (:meth:`enable_lora_hotswap`), only values change.

        Raises:
            AdapterError: If the LoRA does not fit the model; the message names the layer.
            NonFiniteError: If it holds NaN or infinity.
            ValueError: From diffusers, for names of adapters that are taken or missing.
        """
        state_dict, metadata = read_adapter(pretrained_model_name_or_path_or_dict, kwargs)
        if hasattr(kwargs.get("_pipeline"), "_maybe_expand_lora_state_dict"):  # Pipelines of FLUX do this to the model.
            state_dict = widened(state_dict, prefix, self.stand_in)
        own = peft_keys(state_dict, prefix)
        check_state_dict(self.stand_in, own)
        check_metadata(metadata)
        name = kwargs.get("adapter_name")
        options = {"prefix": prefix, "metadata": metadata, "low_cpu_mem_usage": True, **kwargs}

        def load(stand_in: Any) -> None:
            if not (hotswap and own and name in getattr(stand_in, "peft_config", {})):
                load_by_diffusers(stand_in, state_dict, hotswap=hotswap, **options)
                return
            # Not peft's own hot swap, which keeps the config of the adapter that it replaces.
            active, disabled = stand_in.active_adapters(), any(t.disable_adapters for _, t in tuners(stand_in))
            stand_in.delete_adapters(name)
            load_by_diffusers(stand_in, state_dict, **options)
            stand_in.set_adapter(active)
            if disabled:
                stand_in.disable_adapters()

        before = self.stand_in
        self._change(load)
        self._before = before

    def save_lora_adapter(
        self,
        save_directory: str | Path,
        adapter_name: str = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
    ) -> None:
        """Write one adapter, in the coordinates of the original model, as diffusers does."""
        stand_in = copy_of(self.stand_in)
        if upcast_before_saving:
            for _, module in tuners(stand_in):
                module.lora_A.float()
                module.lora_B.float()
        stand_in.save_lora_adapter(
            save_directory, adapter_name, safe_serialization=safe_serialization, weight_name=weight_name
        )

    def set_adapters(self, adapter_names: list[str] | str, weights: Any = None) -> None:
        """Activate these adapters, with weights; arguments as in diffusers."""
        self._change(lambda stand_in: stand_in.set_adapters(adapter_names, weights))

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Activate one adapter or several, with the weights that they have."""
        self._change(lambda stand_in: stand_in.set_adapter(adapter_name))

    def active_adapters(self) -> list[str]:
        """Names of the active adapters.

        Raises:
            ValueError: From diffusers, if no adapter is loaded.
        """
        found: list[str] = self.stand_in.active_adapters()
        return found

    def disable_lora(self) -> None:
        """Switch all adapters off: the graphs without branches run again, bit for bit."""
        self._change(lambda stand_in: stand_in.disable_lora())

    def enable_lora(self) -> None:
        """Switch the active adapters on."""
        self._change(lambda stand_in: stand_in.enable_lora())

    def disable_adapters(self) -> None:
        """As :meth:`disable_lora`; raises ValueError if no adapter is loaded."""
        self._change(lambda stand_in: stand_in.disable_adapters())

    def enable_adapters(self) -> None:
        """As :meth:`enable_lora`; raises ValueError if no adapter is loaded."""
        self._change(lambda stand_in: stand_in.enable_adapters())

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Forget adapters; after the last one the model is what it was before the first."""
        self._change(lambda stand_in: stand_in.delete_adapters(adapter_names))

    def unload_lora(self) -> None:
        """Forget all adapters; the model is what it was before the first."""
        self._before = None
        self._adopt(make_stand_in(self._owner.architecture.skeleton))

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """Make room for LoRAs up to a rank, so that hot swaps change values only and nothing is compiled again.

        Raises:
            RuntimeError: From diffusers, if an adapter is loaded already.
        """
        copy_of(self.stand_in).enable_lora_hotswap(target_rank=target_rank, check_compiled=check_compiled)
        self._least_rank = target_rank

    def fuse_lora(self, *_: Any, **__: Any) -> None:
        """Refuse: codes cannot take a LoRA."""
        refuse_fusing()

    def unfuse_lora(self, *_: Any, **__: Any) -> None:
        """Refuse: codes cannot give back a LoRA."""
        refuse_fusing()

    def add_adapter(self, *_: Any, **__: Any) -> None:
        """Refuse: a new adapter is for training.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(
            "a new adapter adds nothing until it is trained, and a quantized model is not trained. Train it beside the "
            "float model, and load the result here with load_lora_adapter or pipe.load_lora_weights"
        )

    # --- what the model calls ---

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._owner.device

    @property
    def serving(self) -> list[CapturedGraph] | None:
        """The graphs that serve calls now, or None if they are those without branches."""
        return self.captured if self._active else None

    def make_graph(self, call: Call | CallSpec) -> CapturedGraph:
        """Capture a graph with the branches for a call that fits none."""
        assert self.branching is not None
        with torch.inference_mode(False):
            captured = self._owner.make_graph(call, self.branching)
            bind(captured.module, self.branching.tensors)
            self._fill(self.branching, self._values(self.branching, self.stand_in))  # Of branches that it has alone.
        return captured

    def moved(self) -> None:
        """Take note that the tensors of the graphs were moved to another device."""
        if self.branching is not None:
            held = {name: tensor for graph in self.captured for name, tensor in read_tensors(graph.module).items()}
            for name, tensor in self.branching.tensors.items():  # No graph holds them if all graphs were forgotten.
                self.branching.tensors[name] = held.get(name, tensor.to(self.device))

    def forget_graphs(self) -> None:
        """Drop all graphs with branches; they are captured again when calls need them."""
        self.captured = []

    def take_back(self) -> None:
        """Undo the last :meth:`load_lora_adapter`, of which a pipeline set other parts that do not fit."""
        self._adopt(self._before or self.stand_in)

    def take_turn(self, strength: float) -> None:
        """Multiply all branches by a number in one call; waits for calls of other threads with another number."""
        self._turns.take(strength, self._set_strength)

    def give_turn(self) -> None:
        """End the call that :meth:`take_turn` began."""
        self._turns.give()

    def _set_strength(self, strength: float) -> None:
        if self.branching is not None:
            with torch.no_grad():
                self.branching.tensors[STRENGTH].fill_(strength)

    def restore(self, state_dicts: Mapping[str, Mapping[str, Tensor]], saved: Mapping[str, Any]) -> None:
        """Load the adapters of a checkpoint at once, with the weights that they had.

        Args:
            state_dicts: The tensors of each adapter by peft's names.
            saved: Their description; see :mod:`fxquant.adapters.saving`.

        Raises:
            AdapterError: If an adapter does not fit the model.
        """

        def load(stand_in: Any) -> None:
            for own in saved["adapters"]:
                state_dict = state_dicts[own["name"]]
                check_state_dict(stand_in, state_dict)
                stand_in.load_lora_adapter(
                    {f"transformer.{key}": value for key, value in state_dict.items()},
                    network_alphas={f"transformer.{path}.alpha": alpha for path, alpha in own["alphas"].items()},
                    adapter_name=own["name"],
                    low_cpu_mem_usage=True,
                )
            for path, module in tuners(stand_in):
                for own in saved["adapters"]:
                    if path in own["scales"]:
                        module.scaling[own["name"]] = own["scales"][path]
            stand_in.set_adapter(list(saved["active"]))
            if saved["disabled"]:
                stand_in.disable_adapters()

        self._change(load)

    def load_tensors(self, given: Mapping[str, Tensor]) -> None:
        """Replace tensors of loaded adapters, given by their names in a state dict, or raise and keep all.

        Raises:
            NonFiniteError: If a value is NaN or infinite.
        """
        self._change(lambda stand_in: stand_in.load_state_dict(given, strict=False))

    def for_copy(self, owner: Owner) -> Adapters:
        """The same adapters for a copy of the model, in the dtype that it has."""
        made = Adapters(owner)
        made._least_rank = self._least_rank
        made._adopt(copy_in_dtypes_of(owner.architecture.skeleton, self.stand_in))
        return made

    # --- one change ---

    def _change(self, change: Callable[[Any], None]) -> None:
        trial = copy_of(self.stand_in)
        change(trial)
        check_supported(trial)
        self._adopt(trial)

    def _adopt(self, stand_in: Any) -> None:
        """Make graphs with the branches that the adapters need, fill them, and keep the adapters."""
        # Tensors that are made in inference mode could not be changed outside of it.
        with torch.inference_mode(False), self._owner._at_home():
            self._adopt_here(stand_in)

    def _adopt_here(self, stand_in: Any) -> None:
        ranks = {path: rank for path, rank in ranks_of(stand_in).items() if rank}
        if not ranks:
            with self._turns.alone():
                self.branching, self.captured, self._active, self.stand_in = None, [], False, stand_in
                self._show(None)
            return
        branching, captured = self._with_room(ranks)
        values = self._values(branching, stand_in)
        with self._turns.alone():
            self._fill(branching, values)
            if branching is not self.branching:
                self._turns.strength = 1.0
            self.branching, self.captured, self.stand_in = branching, captured, stand_in
            self._active = bool(deltas_of(stand_in))
            self._show(stand_in)

    def _with_room(self, ranks: Mapping[str, int]) -> tuple[Branching, list[CapturedGraph]]:
        """Branches with room for these ranks, and the graphs that have them."""
        before = self.branching
        if before is not None and all(before.ranks.get(path, 0) >= rank for path, rank in ranks.items()):
            return before, self.captured
        kept = {} if before is None else before.ranks
        room = {
            path: max(ranks.get(path, 0), kept.get(path, 0), self._least_rank)
            for path in dict.fromkeys([*kept, *ranks])
        }
        branching = Branching(room)
        captured: list[CapturedGraph] = []
        for graph in self._owner.lasting:
            captured.append(self._owner.make_graph(graph.call, branching))
            bind(captured[-1].module, branching.tensors)
        absent = next((path for path in ranks if path not in branching.found), None)
        if absent is not None:
            raise AdapterError(
                f"layer {absent!r} is in no graph of this model: calibration calls never ran it, or its projection was "
                "fused with others before the model was compiled. Use a LoRA without this layer, or fuse the LoRA "
                "into the float model (pipe.fuse_lora(), then pipe.unload_lora_weights()) and compile the result"
            )
        return branching, captured

    def _values(self, branching: Branching, stand_in: Any) -> dict[str, Tensor]:
        """The values of all tensors of branches, in their dtype.

        Raises:
            NonFiniteError: If an adapter holds NaN or infinity, or does not fit the dtype; names the layer.
        """
        deltas, found = deltas_of(stand_in), {}
        for site in branching.sites.values():
            rank, a, b = branching.ranks[site.layer], branching.tensors[site.a], branching.tensors[site.b]
            own = deltas.get(site.layer, [])
            made = folded(own, site.change) if own else Folded(*_zeros(a, b), None)
            found[site.a] = padded(made.a, rank, 0).to(a.dtype)
            found[site.b] = padded(made.b, rank, 1).to(b.dtype)
            if site.offset is not None:
                held = branching.tensors[site.offset]
                rows = torch.zeros(len(site.change.shift.rows), 0) if made.offset is None else made.offset  # type: ignore[union-attr]
                found[site.offset] = padded(rows, rank, 1).reshape(held.shape).to(held.dtype)
            for name in (site.a, site.b, site.offset):
                if name is not None and not is_finite(found[name]):
                    raise NonFiniteError(
                        f"the adapters of layer {site.layer!r} hold NaN or infinity, or do not fit {a.dtype} with the "
                        "weights that they were given"
                    )
        return found

    def _fill(self, branching: Branching, values: Mapping[str, Tensor]) -> None:
        """Change the tensors in place: compiled code reads them where they are."""
        with torch.no_grad():
            for name, value in values.items():
                branching.tensors[name].copy_(value)

    def _show(self, stand_in: Any) -> None:
        """Let pipelines find a layer of peft with the active adapters, or none."""
        modules: dict[str, nn.Module] = self._owner._modules  # type: ignore[attr-defined]
        modules.pop(TUNER, None)
        if stand_in is not None:
            modules[TUNER] = tuner_of(self)


def _zeros(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(0, a.shape[1]), torch.zeros(b.shape[0], 0)
