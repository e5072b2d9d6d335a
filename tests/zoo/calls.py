"""Further kinds of call of the zoo models: each optional input on and off, in every order, compared in float64.

``python -m tests.zoo.calls`` tests all models, prints one line per kind of call, and exits with 1 if one is wrong.
``python -m tests.zoo.calls Flux Latte`` tests only the named models.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxquant
from fxquant.capture.calls import Call
from fxquant.capture.fidelity import Original
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.trace import Architecture
from fxquant.errors import FxquantError
from tests.zoo.audit import STEPS, without_float32
from tests.zoo.models import CAPTURED, Entry, Maker

EXACT = fxquant.Recipe.parse("remove-no-ops,assign-precision{precision=w8a8} ; balance-channels,absorb-affines")
"""A recipe that balances and absorbs, but rounds nothing."""


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of call, different from the usual one in an optional input.

    Attributes:
        name: The difference from the usual call.
        without: The optional input that the call leaves out, or None.
        given: Makes the additional inputs of the call from those of a usual call, or None.
    """

    name: str
    without: str | None = None
    given: Any = None

    def arguments(self, usual: dict[str, Any]) -> dict[str, Any]:
        """The arguments of this kind of call, from those of a usual call."""
        found = {name: value for name, value in usual.items() if name != self.without}
        return found if self.given is None else found | self.given(usual)


def kinds_of(entry: Entry) -> Iterator[Kind]:
    """The kinds of call that a model accepts: without an input, with a further input, or with a flag inverted."""
    model = entry.model(torch.float64)
    usual = entry.call(3, dtype=torch.float64)
    found = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name in usual and parameter.default is None and usual[name] is not None:
            found.append(Kind(f"without {name}", without=name))
        elif name not in usual and isinstance(parameter.default, bool) and name != "return_dict":
            found.append(Kind(f"{name}={not parameter.default}", given=_always(name, not parameter.default)))
        elif name not in usual and parameter.default is None:
            found += [Kind(f"with {name}", given=make) for make in _inputs(name, entry, model)]
    seen = set()
    for kind in found:
        if kind.name not in seen and _runs(model, kind.arguments(usual)):
            seen.add(kind.name)
            yield kind


def _always(name: str, value: Any) -> Any:
    return lambda usual: {name: value}


def _inputs(name: str, entry: Entry, model: nn.Module) -> Iterator[Any]:
    """Candidates for an optional input. The code of the model accepts some or none."""
    config = dict(getattr(model, "config", {}))
    width = config.get("num_attention_heads", 0) * (config.get("attention_head_dim") or 0) or config.get("dim", 0)

    def random(*shape: int) -> Any:
        return lambda usual: {name: Maker(_batch(usual), 1, 1, 5, None, torch.float64).normal(*shape)}

    if "mask" in name:
        for length in (entry.prompt, entry.size**2, entry.size**2 // 4):
            for dtype in (torch.bool, torch.float64):
                yield lambda usual, length=length, dtype=dtype: {
                    name: torch.ones(_batch(usual), length, dtype=dtype).index_fill(1, torch.tensor([length - 1]), 0)
                }
    elif "controlnet" in name or "control" in name:
        for tokens in (entry.size**2, entry.size**2 // 4, entry.prompt + entry.size**2):
            yield lambda usual, tokens=tokens: {name: [random(_batch(usual), tokens, width)(usual)[name]]}
    elif name == "guidance":
        yield lambda usual: {name: torch.full((_batch(usual),), 3.5, dtype=torch.float64)}
    elif name in ("pooled_projections", "encoder_hidden_states_image", "class_labels"):
        for size in (8, 12, 16, 32):
            yield random(3, size)


def _batch(usual: dict[str, Any]) -> int:
    return next(leaf.shape[0] for leaf in pytree.tree_leaves(usual) if isinstance(leaf, Tensor) and leaf.dim() > 1)


def _runs(model: nn.Module, arguments: dict[str, Any]) -> bool:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(**arguments)
    except Exception:  # A model may raise any exception for an input that it does not accept.
        return False
    return True


def errors(entry: Entry, kind: Kind) -> dict[str, float | str]:
    """Largest relative error of both kinds of call for each order of calibration, or the reason of a refusal."""
    model = entry.model(torch.float64)
    traced: list[CapturedGraph] = []
    capture = Architecture.capture

    def once(self: Architecture, call: Call, *others: Any) -> CapturedGraph:
        found = next((graph for graph in traced if graph.call.fits(call)), None)
        if found is None:
            found = capture(self, call, *others)
            without_float32(found.module)
            traced.append(found)
        return found.copy()

    def calls(which: str, batch: int = 3, seed: int = 0, step: float | None = None) -> dict[str, Any]:
        usual = entry.call(batch, seed=seed, step=step, dtype=torch.float64)
        return usual if which == "usual" else kind.arguments(usual)

    found: dict[str, float | str] = {}
    # The model computes some parts in float32, and the graphs here do not. So graphs are compared with each other.
    with (
        mock.patch.object(Architecture, "capture", once),
        mock.patch.object(Original, "compare"),
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        plain = fxquant.trace(model, timestep=entry.timestep)
        for order in (("usual", "other"), ("other", "usual"), ("usual",), ("other",)):

            def calibrate(order: tuple[str, ...] = order) -> None:
                for which in order:
                    for seed, step in enumerate(STEPS):
                        model(**calls(which, seed=seed, step=step))

            made = fxquant.compile(model, recipe=EXACT, calibrate=calibrate, timestep=entry.timestep, measure=0)
            for which in ("usual", "other"):
                title = f"calibrated {' then '.join(order)}, called {which}"
                try:
                    found[title] = _error(made, plain, calls(which, batch=2, seed=9))
                except FxquantError as refused:
                    if which in order:
                        raise
                    found[title] = str(refused)
    return found


def _error(made: nn.Module, plain: nn.Module, arguments: dict[str, Any]) -> float:
    actual, expected = (
        [leaf for leaf in pytree.tree_leaves(model(**arguments)) if isinstance(leaf, Tensor)] for model in (made, plain)
    )
    return max(float((a - e).abs().max() / e.abs().max()) for a, e in zip(actual, expected, strict=True))


def main(names: Sequence[str]) -> int:
    """Test the models with these names, or all models."""
    wrong = refused = proved = 0
    for entry in CAPTURED:
        if names and not any(entry.id.startswith(name) for name in names):
            continue
        for kind in kinds_of(entry):
            try:
                found = errors(entry, kind)
            except FxquantError as error:
                print(f"{entry.id}, {kind.name}: FAILED {type(error).__name__}: {str(error)[:200]}", flush=True)
                wrong += 1
                continue
            numbers = [value for value in found.values() if isinstance(value, float)]
            texts = [value for value in found.values() if isinstance(value, str)]
            bad = {title: value for title, value in found.items() if isinstance(value, float) and not value < 1e-12}
            wrong, refused, proved = wrong + len(bad), refused + len(texts), proved + len(numbers) - len(bad)
            print(f"{entry.id}, {kind.name}: {max(numbers):.1e}, refused {len(texts)}", *bad, flush=True)
    print(f"{proved} kinds of call and orders equal to 1e-12, {refused} refused, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
