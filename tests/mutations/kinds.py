"""What fxquant reads: for each kind of file or folder, whole ones, and a function that reads and uses a damaged one."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxquant
from fxquant.calibration import journal
from fxquant.disk.finished_work import digest_of_tensor, digest_of_tensors
from fxquant.evaluation import reference
from fxquant.evaluation.features import Extractor
from fxquant.evaluation.store import Store
from fxquant.ir.dumps import dump_of, load_dump
from fxquant.ir.stages import Stage
from fxquant.planning import kept_weights
from fxquant.runtime.model import GraphModel
from tests.adapters.loras import lora
from tests.evaluation.pipes import Pooled
from tests.mutations.changes import changed_values
from tests.tiny import calibrate, inputs, make_dit, make_pipeline, run

RECIPES = ("ptq4dit-w4a8", "htg-w4a8", "dynamic-w8a8", "smoothquant-w4a16-g4")


class Small(nn.Module):
    """A block of two linears: reading its checkpoints takes a fraction of the time of a DiT."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x)) * timestep[:, None, None]


SMALL = Small().eval()


def given(timestep: float = 0.5) -> tuple[Tensor, Tensor]:
    """The arguments of a call of the small model."""
    generator = torch.Generator().manual_seed(int(timestep * 100))
    return torch.randn(2, 3, 8, generator=generator), torch.full((2,), timestep)


def small_calls(model: nn.Module = SMALL) -> Callable[[], None]:
    """A calibration of the small model with three timesteps."""

    def calls() -> None:
        with torch.no_grad():
            for timestep in (0.25, 0.5, 1.0):
                model(*given(timestep))

    return calls


def small(recipe: str, model: nn.Module = SMALL, **options: Any) -> GraphModel:
    """The small model, quantized."""
    options = {"layers": "all", "calibrate": small_calls(model), "measure": 0, **options}
    return fxquant.compile(model, recipe=recipe, **options)


@dataclass(frozen=True)
class Kind:
    """One kind of files.

    Attributes:
        name: Its name.
        share: Cases of this kind among 1,000.
        make: Writes whole folders under a folder, one after the other.
        read: Reads a folder, uses what was read, and returns its content. Raises typed errors of what is damaged.
        valid: Whether other values can be as valid as the present ones, as for figures. Such content may differ; but
            then it must be possible to write it and read the same again, which ``read`` checks.
        change: Damages one thing, and returns what.
        in_tests: Cases of this kind in ``make test``.
    """

    name: str
    share: int
    in_tests: int
    make: Callable[[Path], Iterator[Path]]
    read: Callable[[Path], str]
    valid: bool = False
    change: Callable[[Path, list[Path], random.Random], str] | None = None


def text_of(value: Any) -> str:
    """JSON values as one text, with infinities and NaN."""
    return json.dumps(value, sort_keys=True)


# --- checkpoints ---


def _small_checkpoints(root: Path) -> Iterator[Path]:
    for recipe in RECIPES:
        fxquant.save(small(recipe), root / recipe)
        yield root / recipe


def _read_small(folder: Path) -> str:
    with torch.no_grad():
        return digest_of_tensor(fxquant.load(folder, model=SMALL)(*given()))


def _dit_checkpoints(root: Path) -> Iterator[Path]:
    model, adapter = make_dit(), root / "with-lora"
    for recipe in RECIPES:
        layers = "all" if recipe.startswith("htg") else "default"
        made = fxquant.compile(model, recipe=recipe, layers=layers, calibrate=calibrate(model), measure=0)
        fxquant.save(made, root / recipe)
        yield root / recipe
    made.load_lora_adapter(lora(model), adapter_name="a")
    fxquant.save(made, adapter)
    yield adapter


def _read_dit(folder: Path) -> str:
    return digest_of_tensor(run(fxquant.load(folder)))


def _packages(root: Path) -> Iterator[Path]:
    model = make_dit()
    made = fxquant.compile(model, recipe="dynamic-w8a8", calibrate=calibrate(model), measure=0)
    fxquant.export_aot(made, root / "package")
    yield root / "package"


def _read_package(folder: Path) -> str:
    return digest_of_tensor(run(fxquant.load_package(folder)))


# --- plans, statistics and what was measured ---


_recorded: dict[str, fxquant.Statistics] = {}
"""From what the plans were made."""


def _plans(root: Path) -> Iterator[Path]:
    for recipe in ("ptq4dit-gptq-w4a8", "htg-w4a8", "svdquant-w4a4"):
        statistics = fxquant.Statistics(keep_calls=3)
        made = small(recipe, statistics=statistics)
        assert made.plan is not None
        if recipe == "htg-w4a8":
            made.plan.attribution = fxquant.attribute(made, SMALL, statistics, timesteps=2, probes=1, measure=1)
        made.plan.save(root / recipe)
        _recorded[recipe] = statistics
        yield root / recipe


def _of_plan(plan: fxquant.Plan) -> str:
    errors = None if plan.attribution is None else plan.attribution.to_json()
    return f"{text_of(plan.checked_json())} {digest_of_tensors(plan.tensors())} {text_of(errors)}"


def _read_plan(folder: Path) -> str:
    plan = fxquant.Plan.load(folder)
    content = _of_plan(plan)
    str(plan)
    if plan.attribution is not None:
        str(plan.attribution)
    plan.save(folder / "again")
    assert _of_plan(fxquant.Plan.load(folder / "again")) == content, "a plan is written and read as another one"
    str(fxquant.diff(plan, copy.deepcopy(plan)))
    with torch.no_grad():
        recorded = next(one for recipe, one in _recorded.items() if folder.name.endswith(recipe))
        fxquant.compile(SMALL, plan=plan, statistics=copy.deepcopy(recorded), measure=0)(*given())
    return content


def _statistics(root: Path) -> Iterator[Path]:
    for name, recipe, options in (
        ("rows", "ptq4dit-w4a8", {"keep_calls": 2}),
        ("moments", "ptq4dit-gptq-w4a8", {"num_rows": 3, "keep_calls": 1}),
    ):
        recorded = fxquant.Statistics(**options)
        small(recipe, statistics=recorded)
        (root / name).mkdir(parents=True)
        recorded.save(root / name / "statistics.safetensors")
        yield root / name


def _read_statistics(folder: Path) -> str:
    found = fxquant.Statistics.load(folder / "statistics.safetensors")
    found.table()
    for key in found:
        found.table(key)
    found.save(folder / "again.safetensors")
    content, again = (_of_statistics(one) for one in (found, fxquant.Statistics.load(folder / "again.safetensors")))
    assert again == content, "statistics are written and read as other ones"
    if found.run is not None:
        small("ptq4dit-w4a8", calibrate=None, statistics=found)
    return content


def _of_statistics(found: fxquant.Statistics) -> str:
    held = [f"{key} {one.seeds} {digest_of_tensors(one._tensors())}" for key, one in found.items()]
    calls = [
        (one.kind, one.timestep, one.number, one.priority, *map(digest_of_tensor, one.inputs)) for one in found.calls
    ]
    return f"{held} {calls} {found.calls.kinds} {found.run} {found.num_rows} {found.seed}"


def _measured(root: Path) -> Iterator[Path]:
    found = fxquant.sensitivity(
        SMALL, calibrate=small_calls(), layers="all", timesteps=2, probes=1, measure=1, candidates=("w4a8", "w8a8")
    )
    times = fxquant.LayerTimes("here", "native", 2, 3.0, 0.5, {"mlp.0": {"w4a8": 0.5, "w8a8": 1.0}})
    for name, one in (("sensitivities", found), ("times", times)):
        (root / name).mkdir(parents=True)
        one.save(root / name / f"{name}.json")  # type: ignore[attr-defined]
        yield root / name


def _read_measured(folder: Path) -> str:
    (path,) = folder.glob("*.json")
    kind: Any = fxquant.Sensitivities if path.name.startswith("sens") else fxquant.LayerTimes
    found = kind.load(path)
    if kind is fxquant.Sensitivities:
        found.table(), found.rows()
        for precision in found.precisions:
            found.uniform(precision), found.uniform_bytes(precision), found.uniform_db(precision)
    else:
        found.estimate({name: next(iter(times)) for name, times in found.layers.items() if times})
    found.save(folder / "again")
    assert kind.load(folder / "again") == found, "it is written and read as something else"
    return repr(found)


# --- folders of work that is continued ---


@contextmanager
def _everything_kept() -> Iterator[None]:
    """Keep each call and each layer, however long keeping takes."""
    before = journal.SHORT, kept_weights.WORTH_KEEPING
    journal.SHORT, kept_weights.WORTH_KEEPING = float("inf"), 0.0
    try:
        yield
    finally:
        journal.SHORT, kept_weights.WORTH_KEEPING = before


def _journals(root: Path) -> Iterator[Path]:
    for recipe in ("ptq4dit-gptq-w4a8", "svdquant-w4a4"):
        with _everything_kept():
            small(recipe, resume=root / recipe)
        yield root / recipe


def _read_journal(folder: Path) -> str:
    (recipe,) = (name for name in ("ptq4dit-gptq-w4a8", "svdquant-w4a4") if folder.name.endswith(name))
    with _everything_kept():
        made = small(recipe, resume=folder)
    with torch.no_grad():
        return digest_of_tensor(made(*given()))


def _evaluations(root: Path) -> Iterator[Path]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8)
    extractor, store = Extractor(Pooled()), Store(root / "images", {"model": "x", "steps": 3, "guidance": 1.5})
    for number in range(2):
        store.write(number, images[3 * number : 3 * number + 3])
        store.features(number, extractor)
    (root / "reference").mkdir(parents=True)
    reference.reference_of([images], extractor).save(root / "reference" / "reference.npz")
    yield from (root / "images", root / "reference")


def _read_evaluation(folder: Path) -> str:
    extractor = Extractor(Pooled())
    if (path := folder / "reference.npz").is_file():
        reference.check_reference(path)
        reference.has_spatial(path)
        found = reference.read_reference(path, extractor)
        reference.check_features(found, 6, 8, path)
        arrays = (found.mean, found.covariance, found.spatial_mean, found.spatial_covariance)
        return f"{[None if array is None else array.tobytes().hex() for array in arrays]} {found.pooled}"
    store = Store(folder, {"model": "x", "steps": 3, "guidance": 1.5})
    held = [
        (store.read(number), store.features(number, extractor).tensors()) for number in range(2) if store.has(number)
    ]
    return repr([(digest_of_tensor(images), digest_of_tensors(features)) for images, features in held])


# --- graphs, adapters and pipelines ---


def _dumps(root: Path) -> Iterator[Path]:
    traced, made = fxquant.trace(SMALL), small("htg-w4a8")
    with torch.no_grad():
        traced(*given())
    for name, graph, stage in (
        ("captured", traced.graphs[0], Stage.CAPTURED),
        ("lowered", made.graphs[0], Stage.LOWERED),
    ):
        dump_of(graph, stage, largest=None).write(root / name / "graph")  # type: ignore[arg-type]
        yield root / name


def _read_dump(folder: Path) -> str:
    dump, module = load_dump(folder / "graph.json")
    module.print_readable(print_output=False)
    return f"{module.graph} {digest_of_tensors(dump.tensors)} {text_of(dump.facts)}"


_quantized: list[GraphModel] = []


def _adapters(root: Path) -> Iterator[Path]:
    from safetensors.torch import save_file

    for name, rank in (("first", 4), ("second", 2)):
        (root / name).mkdir(parents=True)
        found = {key: tensor.contiguous() for key, tensor in lora(make_dit(), rank=rank).items()}
        save_file(found, root / name / "adapter.safetensors", metadata={"format": "pt"})
        yield root / name


def _read_adapter(folder: Path) -> str:
    if not _quantized:
        model = make_dit()
        _quantized.append(fxquant.compile(model, recipe="dynamic-w8a8", calibrate=calibrate(model), measure=0))
    model = copy.copy(_quantized[0])
    model.load_lora_adapter(folder, weight_name="adapter.safetensors", adapter_name="a")
    with torch.no_grad():
        return digest_of_tensor(model(**inputs()).sample)


def _pipelines(root: Path) -> Iterator[Path]:
    pipe: Any = make_pipeline()
    pipe.transformer = fxquant.compile(
        pipe.transformer, recipe="dynamic-w8a8", calibrate=calibrate(pipe.transformer), measure=0
    )
    fxquant.save_pipeline(pipe, root / "pipeline", max_shard_size=20_000)
    yield root / "pipeline"


def _read_pipeline(folder: Path) -> str:
    pipe = fxquant.load_pipeline(folder)
    if not isinstance(getattr(pipe, "transformer", None), GraphModel):
        return "a pipeline without a quantized transformer"
    vae = digest_of_tensors(pipe.vae.state_dict()) if getattr(pipe, "vae", None) is not None else ""
    return f"{digest_of_tensor(run(pipe.transformer))} {vae}"


KINDS = {
    kind.name: kind
    for kind in (
        Kind("checkpoint", 440, 60, _small_checkpoints, _read_small, change=changed_values),
        Kind("checkpoint of diffusers", 90, 8, _dit_checkpoints, _read_dit, change=changed_values),
        Kind("plan", 120, 50, _plans, _read_plan, valid=True),
        Kind("statistics", 110, 120, _statistics, _read_statistics, valid=True),
        Kind("measurement", 80, 500, _measured, _read_measured, valid=True),
        Kind("evaluation", 60, 220, _evaluations, _read_evaluation, valid=True),
        Kind("resumed work", 40, 12, _journals, _read_journal, valid=True),
        Kind("dump", 30, 20, _dumps, _read_dump, valid=True),
        Kind("adapter", 20, 8, _adapters, _read_adapter, valid=True),
        Kind("pipeline", 10, 2, _pipelines, _read_pipeline, valid=True),
        Kind("package", 0, 0, _packages, _read_package),
    )
}
"""All kinds. Packages are not among the 1,000: one of them takes a minute of the C++ compiler."""
