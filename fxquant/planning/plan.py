"""The plan: everything that calibration decided, keyed by stable module names, in one object.

Passes read the plan and the graph. They carry out what the plan already holds. What the plan lacks, they decide from
the calibration statistics and write into the plan. So the same passes make the same rewrite when they run again on
another graph of the same model, or on a graph without weights. People can read a plan, edit it, diff it and replay it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fxquant.capture.calls import CallSpec
from fxquant.disk.files import blaming, digest_of, load_tensors, share
from fxquant.disk.refusals import writing
from fxquant.errors import CalibrationError, CheckpointError, ConfigurationError, shortened
from fxquant.planning.attribution import Attribution, kept_attribution
from fxquant.planning.decisions import ActivationRange, AttentionPlan, Balance, LayerPlan, Shift, TimestepGroups
from fxquant.planning.formats import blocks_of, check_attention, check_formats, check_known
from fxquant.planning.pass_decisions import D, PassDecisions, is_of_pass, same_tensors
from fxquant.planning.plan_types import changed, check_json, check_types, check_vectors
from fxquant.schemas.common import LARGEST_FILE, check, read_json
from fxquant.schemas.plan import PlanFile
from fxquant.text import nearest

FORMAT = 1
"""Version of the plan's file format; a newer one is refused."""

NAMING = 2
"""Version of the rules that name layers; plans made with earlier rules keep their names."""

PLAN_FILE = "plan.json"
VECTORS_FILE = "plan.safetensors"


@dataclass
class Plan:
    """Everything that was decided for one model.

    Attributes:
        recipe: The recipe's passes, as pipeline text that can be parsed again.
        model_class: Import path of the model's class, such as ``diffusers.DiTTransformer2DModel``.
        timestep: Name of the model's timestep input.
        calls: The calls that were captured; the first is the one that calibration began with.
        layers: Decisions per layer.
        attentions: Decisions per attention, by the path of its module.
        products: Why each matrix product or convolution that is neither a layer nor part of an attention stays float,
            by the path of its module, its op and its line, as in ``blocks.0.mixer.matmul:53``.
        vectors: Balance factors per input channel, float64 ``[in]``, by layer; under ``<layer>.shift`` what is
            subtracted from the channels in each bin of timesteps, float64 ``[bins, in]``; under ``<layer>.importance``
            the mean squares of the input channels, if a search of weight ranges needed them.
        pass_decisions: Decisions for which the plan has no field of its own (:meth:`decisions_of`).
        timesteps: The calibrated timesteps.
        output_sqnr_db: Output SQNR against float by timestep, in dB, as measured on calibration inputs.
        bytes_before: Size of the float model's tensors.
        bytes_after: Size of the quantized model's tensors.
        passes: What the pipeline did, one entry per pass.
        observed_step: Number of the one denoising step that calibration observes, counted from 0; None for all steps.
        later_steps: Number of later steps that it observes as well, on inputs that follow from the output of that step.
        reconstruction: SQNR of each block's output in dB, first rounded to nearest, then as learned.
        attribution: Where the output error comes from, if :func:`fxquant.attribute` measured it; ``==`` ignores it.
        naming: Version of the rules that name layers. The rules of version 1 named layers with a shared weight after
            one of the weight's owners, and layers whose weight is cast after their node.
    """

    recipe: str
    model_class: str
    timestep: str | None
    calls: list[CallSpec] = field(default_factory=list)
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    timesteps: list[float] = field(default_factory=list)
    output_sqnr_db: dict[float, float] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    backend: str = "fake-quant"
    passes: list[dict[str, Any]] = field(default_factory=list)
    observed_step: int | None = None
    later_steps: int = 0
    reconstruction: dict[str, list[float]] = field(default_factory=dict)
    attentions: dict[str, AttentionPlan] = field(default_factory=dict)
    products: dict[str, str] = field(default_factory=dict)
    pass_decisions: PassDecisions = field(default_factory=PassDecisions, repr=False)
    naming: int = NAMING
    attribution: Attribution | None = field(default=None, repr=False)

    def layer(self, name: str) -> LayerPlan:
        """The plan of one layer.

        Raises:
            CalibrationError: If none of the graphs that this plan was made for had the layer.
        """
        if name not in self.layers:
            reason = f"the plan knows no layer {shortened(str(name))!r}"
            known = ", ".join(nearest(name, self.layers)[:10]) or "none"
            raise CalibrationError(f"{reason}; it has {known}", reason=reason)
        return self.layers[name]

    def attention(self, name: str) -> AttentionPlan:
        """The plan of one attention.

        Raises:
            CalibrationError: If none of the graphs that this plan was made for had the attention.
        """
        if name not in self.attentions:
            raise CalibrationError(f"the plan knows no attention {shortened(str(name))!r}")
        return self.attentions[name]

    def decisions_of(self, kind: type[D]) -> dict[str, D]:
        """What one pass decided, by name, such as that of a layer. Whoever changes the dict changes the plan.

        Args:
            kind: Type of the decisions; it names the pass (:mod:`fxquant.planning.pass_decisions`).

        Raises:
            ConfigurationError: If the type cannot be stored, or the pass has decisions of another type.
            CheckpointError: If an entry that was read from a file does not fit the type.
        """
        return self.pass_decisions.decisions_of(kind)

    def __eq__(self, other: object) -> bool:
        """Whether two plans hold the same decisions and measurements. How long passes took does not count."""
        if not isinstance(other, Plan):
            return NotImplemented
        return self._comparable() == other._comparable() and same_tensors(self.tensors(), other.tensors())

    __hash__ = None  # type: ignore[assignment]  # A plan changes while passes decide.

    def _comparable(self) -> str:
        data = self.to_json()
        data["passes"] = [{**entry, "seconds": None} for entry in data["passes"]]
        return json.dumps(data, sort_keys=True)

    def fingerprint(self) -> str:
        """SHA-256 of the recipe and of what was decided for layers and attentions."""
        data = self.to_json()
        return digest_of({name: data[name] for name in ("recipe", "layers", "attentions")})

    def tensors(self) -> dict[str, Tensor]:
        """The vectors, and the tensors of passes' decisions."""
        return {**self.vectors, **self.pass_decisions.tensors()}

    def undecided(self, recipe: str) -> Plan:
        """A copy in which only bit widths are decided; another recipe decides the rest from the same statistics.

        Give it to :func:`fxquant.compile` as ``plan=``, with the ``statistics=`` that the first recipe recorded. The
        other recipe must observe the same values, in the same steps.

        Args:
            recipe: Text of the other recipe, ``str(recipe)``.
        """
        fresh = Plan(recipe, self.model_class, self.timestep, calls=list(self.calls), timesteps=list(self.timesteps))
        fresh.naming = self.naming
        for name, layer in self.layers.items():
            kept = {option: getattr(layer, option) for option in _BEFORE_CALIBRATION}
            fresh.layers[name] = LayerPlan(**kept)
        for name, found in self.attentions.items():
            fresh.attentions[name] = replace(found, ranges={}, sqnr_db={}, softmax_bits=None)
        fresh.products = dict(self.products)
        return fresh

    def quantized(self) -> Iterator[tuple[str, LayerPlan]]:
        """The layers whose weights are quantized."""
        return ((name, layer) for name, layer in self.layers.items() if layer.weight_bits is not None)

    def check(self) -> None:
        """Refuse impossible bit widths and groups, which an edit or a recipe may ask for.

        Raises:
            ConfigurationError: Names the layers and the numbers.
        """
        for name, attention in self.attentions.items():
            check_attention(name, attention)
        indivisible: dict[tuple[int, int], list[str]] = {}
        for name, layer in self.layers.items():
            try:
                _ = layer.precision
            except ConfigurationError as error:
                raise ConfigurationError(f"layer {name}: {error}") from None
            check_formats(name, layer)
            for block in dict.fromkeys(blocks_of(layer)):
                if layer.shape[1] % block:
                    indivisible.setdefault((block, layer.shape[1]), []).append(name)
        if indivisible:
            lines = [
                f"  groups of {group} do not divide the {channels} input channels of {len(names)} layers "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for (group, channels), names in indivisible.items()
            ]
            first = next(iter(indivisible.values()))[0]
            raise ConfigurationError(
                "choose a group size that divides the number of input channels, or none; nothing is padded:\n"
                + "\n".join(lines)
                + f"\nWhere the format fixes the groups, give these layers another one: overrides={first}=w8a8"
            )

    # --- files ---

    def checked_json(self) -> dict[str, Any]:
        """The same as :meth:`to_json`, if :meth:`load` would read it and the vectors.

        Raises:
            ConfigurationError: Names the first entry that it would refuse, and says why.
        """
        check_types(self)
        try:
            data = self.to_json()
            check(PlanFile, data, "the plan")
            check_json(data)
            check_vectors(self.vectors)
        except CheckpointError as error:
            raise ConfigurationError(str(error)) from None
        except (AttributeError, TypeError) as error:
            raise ConfigurationError(f"the plan holds a value of a wrong type: {error}") from error
        return data

    def check_changes(self, earlier: Plan) -> None:
        """The same check as :meth:`checked_json`, which leaves out layers and attentions that are as they were.

        Raises:
            ConfigurationError: Names the first entry that :meth:`load` would refuse, and says why.
        """
        check_types(self)
        layers, attentions = changed(self.layers, earlier.layers), changed(self.attentions, earlier.attentions)
        replace(self, layers=layers, attentions=attentions).checked_json()

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, without the vectors."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_IN_JSON}
        data["calls"] = [call.to_json() for call in self.calls]
        data["layers"] = {name: _entry(layer) for name, layer in self.layers.items()}
        data["attentions"] = {name: _entry(attention) for name, attention in self.attentions.items()}
        data["output_sqnr_db"] = [[t, db] for t, db in self.output_sqnr_db.items()]
        data["pass_decisions"] = self.pass_decisions.to_json()
        if not data["pass_decisions"]:  # Most plans have none; their files stay as earlier versions read them.
            del data["pass_decisions"]
        return {"format": FORMAT, **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], vectors: Mapping[str, Tensor]) -> Plan:
        """Read a plan back.

        Raises:
            CheckpointError: If it has a newer format, is not a plan, or holds values that no plan can hold.
        """
        if not isinstance(data, Mapping) or "format" not in data:
            raise CheckpointError("this is not a plan: it has no format number")
        number = data["format"]
        if number != FORMAT:
            newer = isinstance(number, int) and number > FORMAT
            raise CheckpointError(
                f"the plan has format {number!r}, this fxquant reads format {FORMAT}; "
                + ("install a newer fxquant" if newer else "it is damaged or was written by something else")
            )
        check(PlanFile, data, "the plan")
        try:
            given = [f.name for f in fields(cls) if f.name not in (*_NOT_IN_JSON, *(_NEW_IN_JSON - data.keys()))]
            values = {name: data[name] for name in given}
            values.setdefault("naming", 1)
            values["calls"] = [CallSpec.from_json(call) for call in data["calls"]]
            values["layers"] = {name: _layer_from_json(layer) for name, layer in data["layers"].items()}
            attentions = data.get("attentions", {})
            values["attentions"] = {name: _attention_from_json(entry) for name, entry in attentions.items()}
            values["output_sqnr_db"] = {float(t): float(db) for t, db in data["output_sqnr_db"]}
            tensors = dict(vectors)
            values["pass_decisions"] = PassDecisions.from_json(data.get("pass_decisions", {}), tensors)
            for name in tensors:
                if is_of_pass(name):
                    raise CheckpointError(f"tensor {name!r} belongs to no decision of the plan")
            check_known([*values["layers"].values(), *values["attentions"].values()])
            return cls(**values, vectors=tensors)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the plan cannot be read: {error!r}") from error

    def save(self, folder: str | Path) -> None:
        """Write ``plan.json`` and ``plan.safetensors`` into a folder, which is created if it does not exist.

        If errors were attributed to layers, ``errors.json`` is written too.

        Raises:
            CheckpointError: If the folder holds a checkpoint, which has its own plan.
            ConfigurationError: If the plan holds what :meth:`load` would refuse.
            WriteError: If the files cannot be written.
        """
        folder = Path(folder)
        if (folder / PLAN_FILE).is_file() and any(folder.glob("*model*.safetensors")):
            raise CheckpointError(
                f"{folder} holds a checkpoint, which another plan would make useless; choose another folder"
            )
        tensors = self.tensors()
        text = json.dumps(self.checked_json(), indent=1) + "\n"
        if len(text.encode()) > LARGEST_FILE:
            raise ConfigurationError(
                f"the plan takes {len(text.encode())} bytes of JSON; at most {LARGEST_FILE} are read back. Keep long "
                "lists as tensors"
            )
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / PLAN_FILE).write_text(text, encoding="utf-8")
            whole = torch.contiguous_format  # Files hold no two tensors that share their memory.
            copies = {name: tensor.detach().clone(memory_format=whole) for name, tensor in tensors.items()}
            save_file(copies, folder / VECTORS_FILE)
            share(folder / VECTORS_FILE)
        if self.attribution is not None:
            self.attribution.save(folder, self.fingerprint())

    @classmethod
    def load(cls, folder: str | Path) -> Plan:
        """Read a plan that :meth:`save` wrote; it may have been edited by hand.

        Raises:
            CheckpointError: If a file is missing or unreadable.
        """
        folder = Path(folder)
        for name in (PLAN_FILE, VECTORS_FILE):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing; a plan consists of {PLAN_FILE} and {VECTORS_FILE}")
        _, data = read_json(folder / PLAN_FILE, "plan")
        with blaming(folder / PLAN_FILE):
            plan = cls.from_json(data, read_vectors(folder / VECTORS_FILE))
        plan.attribution = kept_attribution(folder, plan.fingerprint())
        return plan


_NOT_IN_JSON = ("vectors", "attribution")
_NEW_IN_JSON = frozenset(
    {"observed_step", "later_steps", "reconstruction", "attentions", "products", "naming", "pass_decisions"}
)
"""Entries that earlier plans of this format lack."""


_FORMATS = {"weight_format": None, "activation_format": None, "group_rows": 1, "format": None}
"""Fields that plans of integers leave out, with their defaults. So these plans stay as earlier versions read them."""


def _entry(decided: LayerPlan | AttentionPlan) -> dict[str, Any]:
    found = {name: value for name, value in asdict(decided).items() if name not in _FORMATS or value != _FORMATS[name]}
    if found.get("timesteps") and found["timesteps"]["bits"] is None:  # As earlier versions write it.
        del found["timesteps"]["bits"]
    return found


_BEFORE_CALIBRATION = (
    *("kind", "role", "shape", "weight_bits", "activation_bits", "group_size", "observed", "reason"),
    *("weight_format", "activation_format", "group_rows"),
)


def _layer_from_json(data: Mapping[str, Any]) -> LayerPlan:
    values = dict(data)
    values["activation"] = ActivationRange(**values["activation"]) if values["activation"] else None
    for name, cls in (("balance", Balance), ("shift", Shift), ("timesteps", TimestepGroups)):
        values[name] = cls(**values[name]) if values.get(name) else None
    return LayerPlan(**values)


def _attention_from_json(data: Mapping[str, Any]) -> AttentionPlan:
    ranges = {side: ActivationRange(**entry) for side, entry in data["ranges"].items()}
    return AttentionPlan(**{**data, "ranges": ranges})


def read_vectors(path: Path) -> dict[str, Tensor]:
    """The tensors of a plan.

    Raises:
        CheckpointError: If they cannot be read, or a vector of a layer holds NaN or infinity.
    """
    vectors = load_tensors(path, torch.device("cpu"))
    try:  # The pass that defines a tensor decides what it may hold.
        check_vectors({name: vector for name, vector in vectors.items() if not is_of_pass(name)})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; copy the checkpoint again") from None
    return vectors


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that tensors take, shared storage counted once."""
    seen: dict[int, int] = {}
    for tensor in tensors.values():
        plain = tensor.layout is torch.strided and tensor.device != torch.device("meta")
        key = tensor.untyped_storage().data_ptr() if plain else id(tensor)
        seen[key] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
