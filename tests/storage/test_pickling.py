"""Pickles of quantized models: torch.save, pickle and other processes."""

from __future__ import annotations

import io
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.runtime.model import GraphModel
from tests.tiny import calibrate, make_dit, run

pytestmark = pytest.mark.usefixtures("torchao_on_any_processor")


def by_torch(model: Any) -> Any:
    """What torch.load reads of what torch.save wrote."""
    file = io.BytesIO()
    torch.save({"model": model}, file)
    file.seek(0)
    return torch.load(file, weights_only=False, map_location="cpu")["model"]


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def made(backend: str) -> GraphModel:
    model = make_dit()
    return fxquant.compile(model, recipe="ptq4dit-w4a8", backend=backend, calibrate=calibrate(model), measure=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "through"),
    [
        ("fake-quant", by_pickle),
        ("native{packed=False}", by_torch),
        ("torchao", by_pickle),
        pytest.param("fake-quant", by_torch, marks=pytest.mark.exhaustive),
        pytest.param("native{packed=False}", by_pickle, marks=pytest.mark.exhaustive),
        pytest.param("torchao", by_torch, marks=pytest.mark.exhaustive),
    ],
)
def test_a_quantized_model_survives(backend: str, through: Callable[[Any], Any]) -> None:
    ours = made(backend)
    expected, other = run(ours), run(ours, size=4)
    again = through(ours)
    assert torch.equal(run(again), expected)
    assert torch.equal(run(again, size=4), other)
    assert again.plan == ours.plan
    assert (type(again.backend), vars(again.backend)) == (type(ours.backend), vars(ours.backend))
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert again.get_memory_footprint() <= ours.get_memory_footprint()


def outputs(model: nn.Module) -> list[float]:
    """For another process."""
    found: list[float] = run(model).flatten().tolist()
    return found


@pytest.mark.exhaustive
def test_another_process() -> None:
    ours = made("fake-quant")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(outputs, (ours,)) == outputs(ours)


def test_a_traced_model_is_refused() -> None:
    for write in (pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(ConfigurationError, match=r"a traced model cannot be pickled.*fxquant\.trace"):
            write(fxquant.trace(make_dit()))


class Own(nn.Module):
    """A model that no config gives."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.proj(x) * timestep[:, None]


def test_what_a_checkpoint_cannot_hold_is_refused() -> None:
    model = Own().eval()
    ours = fxquant.compile(
        model,
        recipe="rtn-w8a8",
        layers="all",
        calibrate=lambda: [model(torch.randn(2, 8), torch.full((2,), step)) for step in (0.9, 0.5)],
        measure=0,
    )
    with pytest.raises(CheckpointError, match=r"Own has no from_config.*fxquant\.load\(folder, model=\.\.\.\)"):
        pickle.dumps(ours)


@pytest.mark.filterwarnings("ignore::fxquant.errors.PortabilityWarning")
def test_a_model_that_was_changed_after_its_constructor_is_refused() -> None:
    model = make_dit()
    model.transformer_blocks[0].ff.net[0].proj = nn.Linear(16, 64, bias=False)
    ours = fxquant.compile(model.eval(), recipe="rtn-w8a8", calibrate=calibrate(model), measure=0)
    with pytest.raises(CheckpointError, match="cannot be pickled, because a pickle holds a checkpoint: loading would"):
        pickle.dumps(ours)
