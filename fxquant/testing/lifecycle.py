"""What a model goes through after it was quantized by a recipe: each step is run, and each failure is named."""

from __future__ import annotations

import copy
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.api import compile as quantize
from fxquant.capture.calls import BATCH, TensorSpec
from fxquant.capture.graph import CapturedGraph
from fxquant.errors import LifecycleError
from fxquant.numerics.sqnr import sqnr_db
from fxquant.pipeline.pipeline import Pass
from fxquant.pipeline.recipes import Recipe, make_recipe
from fxquant.runtime.model import GraphModel
from fxquant.statistics.collection import Statistics
from fxquant.storage.checkpoint import load, save
from fxquant.testing.models import calibration
from fxquant.testing.proving import Calls

_ALIKE_DB = 40.0  # Outputs of two backends, or of two batch sizes, agree at least this well: sums in another order.


@dataclass(frozen=True)
class Lifecycle:
    """What was checked.

    Attributes:
        recipe: Text of the recipe.
        output_sqnr_db: SQNR in dB of the quantized output against the float output, on the first call.
        steps: The steps, in order.
    """

    recipe: str
    output_sqnr_db: float
    steps: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.recipe}: {self.output_sqnr_db:.1f} dB; {', '.join(self.steps)}"


def check_lifecycle(
    passes: Recipe | str | Pass | Sequence[Pass],
    model: nn.Module,
    call: Calls,
    *,
    other_shape: Mapping[str, Any] | None = None,
    backends: Sequence[str] = ("fake-quant",),
    timestep: str = "timestep",
) -> Lifecycle:
    """Quantize a model and run it through everything that a quantized model is used for.

    The steps: compile; save and load; a copy; another batch size; a call of another shape, for which a further graph is
    made without the float weights; the plan carried out on the float model again; ``torch.compile`` in one graph; and
    each backend. Outputs have to be equal to those of the compiled model, bit for bit where the same kernels run.

    Args:
        passes: A recipe, its name or text; or passes, which then run after calibration and before the layers are
            rounded to nearest at W8A8.
        model: A float model in evaluation mode; it does not change.
        call: Keyword arguments of a call, or of several of one kind, with which calibration runs.
        other_shape: A call whose tensors have other sizes than the batch; without it, that step is left out.
        backends: Names of backends that the model is compiled for.
        timestep: Name of the input that holds the timestep.

    Raises:
        LifecycleError: Lists every step that failed, and why.
    """
    calls = [dict(call)] if isinstance(call, Mapping) else [dict(each) for each in call]
    run = _Run(_recipe_of(passes), model, calls, timestep, dict(other_shape) if other_shape is not None else None)
    steps: dict[str, Callable[[], None]] = {
        "compile": run.compile,
        "save and load": run.save_and_load,
        "deepcopy": run.copy,
        "other batch size": run.other_batch,
        "other shape": run.another_shape,
        "plan replay": run.replay,
        "torch.compile": run.torch_compile,
        **{f"backend {name}": partial(run.backend, name) for name in backends},
    }
    if other_shape is None:
        del steps["other shape"]
    failures: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, step in steps.items():
            try:
                step()
            except Exception as error:  # Every step is tried, to name all that fail.
                failures[name] = _told(error)
                if name == "compile":
                    break
    if failures:
        listed = "\n".join(f"  {name}: {why}" for name, why in failures.items())
        raise LifecycleError(f"{run.recipe}\n{len(failures)} of {len(steps)} steps failed:\n{listed}", failures)
    return Lifecycle(str(run.recipe), run.sqnr, tuple(steps))


@dataclass
class _Run:
    recipe: Recipe
    model: nn.Module
    calls: list[dict[str, Any]]
    timestep: str
    other_shape: dict[str, Any] | None
    sqnr: float = 0.0
    statistics: Statistics = field(default_factory=Statistics)
    quantized: GraphModel = field(init=False)
    expected: list[Tensor] = field(init=False)

    def compile(self) -> None:
        self.quantized = quantize(
            self.model,
            recipe=self.recipe,
            calibrate=calibration(self.model, self.calls),
            statistics=self.statistics,
            timestep=self.timestep,
            measure=0,
        )
        self.expected = [_output(self.quantized, call) for call in self.calls]
        if not all(bool(output.isfinite().all()) for output in self.expected):
            raise AssertionError("the output is not finite")
        self.sqnr = sqnr_db(_output(self.model, self.calls[0]), self.expected[0])

    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "saved"
            save(self.quantized, place, needs_model=not hasattr(type(self.model), "from_config"))
            given = None if hasattr(type(self.model), "from_config") else copy.deepcopy(self.model)
            loaded = load(place, model=given)
            self._compare(loaded)
            if loaded.plan != self.quantized.plan:
                raise AssertionError("the plan that was read back differs from the one that was written")

    def copy(self) -> None:
        self._compare(copy.deepcopy(self.quantized))

    def other_batch(self) -> None:
        captured, call = self.quantized.captured[0], self.calls[0]
        if captured.static_batch is not None:
            return
        graphs = len(self.quantized.captured)
        larger = _with_batch(captured, self.quantized, call, lambda size: [*range(size), *reversed(range(size)), 0])
        whole = _output(self.quantized, larger)
        if len(self.quantized.captured) != graphs:
            raise AssertionError("another batch size needs another graph; the pass fixed the batch size")
        size = len(self.expected[0])
        _agree(whole[:size], self.expected[0], "the same samples in a larger batch")
        alone = _output(self.quantized, _with_batch(captured, self.quantized, call, lambda size: [0]))
        _agree(alone, self.expected[0][:1], "the first sample alone")

    def another_shape(self) -> None:
        assert self.other_shape is not None and self.quantized.plan is not None
        later = copy.deepcopy(self.quantized)
        found = _output(later, self.other_shape)
        if len(later.captured) == len(self.quantized.captured):
            raise AssertionError("the call of another shape runs in the same graph; give one that does not")
        with_weights = quantize(self.model, plan=self.quantized.plan, statistics=self.statistics)
        _agree(found, _output(with_weights, self.other_shape), "a graph made without the float weights")

    def replay(self) -> None:
        assert self.quantized.plan is not None
        text = self.quantized.plan.recipe
        if str(Recipe.parse(text)) != text:
            raise AssertionError(f"the recipe {text!r} in the plan is read back as {Recipe.parse(text)}")
        again = quantize(self.model, plan=self.quantized.plan, statistics=self.statistics)
        self._compare(again)

    def torch_compile(self) -> None:
        torch._dynamo.reset()
        made = torch.compile(copy.deepcopy(self.quantized), backend="aot_eager", fullgraph=True)
        for call, expected in zip(self.calls, self.expected, strict=True):
            _equal(_output(made, call), expected)

    def backend(self, name: str) -> None:
        assert self.quantized.plan is not None
        lowered = quantize(self.model, plan=self.quantized.plan, statistics=self.statistics, backend=name)
        for call, expected in zip(self.calls, self.expected, strict=True):
            _agree(_output(lowered, call), expected, "against the backend fake-quant")

    def _compare(self, other: nn.Module) -> None:
        for call, expected in zip(self.calls, self.expected, strict=True):
            _equal(_output(other, call), expected)


def _recipe_of(passes: Recipe | str | Pass | Sequence[Pass]) -> Recipe:
    if isinstance(passes, (Recipe, str)):
        return make_recipe(passes)
    plain: Recipe = make_recipe("rtn-w8a8")
    steps = [passes] if isinstance(passes, Pass) else list(passes)
    return Recipe(plain.prepare, (*steps, *plain.convert))


def _with_batch(
    captured: CapturedGraph, model: GraphModel, call: dict[str, Any], choose: Callable[[int], list[int]]
) -> dict[str, Any]:
    """The call with other samples: indices, from the number of samples."""
    canonical = model.architecture.canonical((), call)
    size = captured.call.batch_size(canonical.leaves)
    chosen = torch.tensor(choose(size))

    def take(leaf: Any, spec: Any) -> Any:
        if isinstance(leaf, Tensor) and isinstance(spec, TensorSpec) and BATCH in spec.shape:
            return leaf.index_select(spec.shape.index(BATCH), chosen.to(leaf.device))
        return leaf

    leaves = [take(leaf, spec) for leaf, spec in zip(canonical.leaves, captured.call.leaves, strict=True)]
    return dict(canonical.with_leaves(leaves).arguments())


@torch.no_grad()
def _output(model: Any, call: Mapping[str, Any]) -> Tensor:
    return next(leaf for leaf in pytree.tree_leaves(model(**call)) if isinstance(leaf, Tensor))


def _equal(actual: Tensor, expected: Tensor) -> None:
    if not torch.equal(actual, expected):
        raise AssertionError(f"the output differs: {sqnr_db(expected, actual):.1f} dB, and it should be equal")


def _agree(actual: Tensor, expected: Tensor, what: str) -> None:
    found = sqnr_db(expected, actual)
    if not found >= _ALIKE_DB:
        raise AssertionError(f"{what}: the output agrees to {found:.1f} dB only; at least {_ALIKE_DB:.0f} are expected")


def _told(error: Exception) -> str:
    name = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).strip() or f"at {Path(last.filename).name}:{last.lineno}"
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{name}{text}{notes}".replace("\n", "\n    ")
