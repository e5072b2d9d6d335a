"""What a model keeps in plain objects: a trace leaves no marks, and a cache may be full, empty or made beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

import fxquant
from fxquant.api import trace
from fxquant.capture.state import kept, plain_objects
from fxquant.errors import CaptureError


class Table:
    """A rotary table, as plain objects make it: at the first call, unless it is told to beforehand."""

    def __init__(self, made: bool) -> None:
        self.rows: list[Tensor] | None = None
        self.sizes = {"tokens": 16}
        if made:
            self.fill()

    def fill(self) -> None:
        self.rows = [torch.arange(16.0)[:, None].sin() * torch.arange(4), torch.ones(16, 4)]

    def __call__(self, tokens: int) -> Tensor:
        if self.rows is None:
            self.fill()
        assert self.rows is not None
        return sum(row[torch.arange(tokens)] for row in self.rows)  # type: ignore[return-value]


class Rotary(nn.Module):
    def __init__(self, made: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = Table(made)
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])])
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        first, second = self.blocks[0]
        return second(first(x) + self.table(x.shape[1])) + timestep[:, None, None]


def call(batch: int = 2, tokens: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, tokens, 4, generator=torch.Generator().manual_seed(tokens)), torch.full((batch,), 0.5)


def model_with(table: str) -> Rotary:
    model = Rotary(made=table == "made")
    if table == "full":
        model(*call())
    return model


def test_traces_leave_no_marks_and_every_size_is_right() -> None:
    model = Rotary()
    traced = trace(model)
    for made in (call(), call(3), call(tokens=5), call(tokens=7)):
        assert torch.equal(traced(*made), Rotary()(*made))
    assert model.table.rows is None
    assert traced.architecture.skeleton.table.rows is None
    assert [name for name, _ in plain_objects(model)] == ["table"]


@pytest.mark.parametrize(
    ("read", "written"),
    [
        *(("empty", "full"), ("full", "empty"), ("full", "made")),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (2 * ("empty",), 2 * ("full",), ("empty", "made"))
        ),
    ],
)
def test_a_checkpoint_is_read_whether_the_cache_is_full(written: str, read: str, tmp_path: Path) -> None:
    model = model_with(written)
    quantized = fxquant.compile(model, recipe="rtn-w8a8", calibrate=lambda: model(*call()))
    fxquant.save(quantized, tmp_path / "q")
    loaded = fxquant.load(tmp_path / "q", model=model_with("made" if written == "made" else read))
    for made in (call(), call(3), call(tokens=5)):
        assert torch.equal(loaded(*made), quantized(*made))


def test_what_happens_within_is_undone() -> None:
    model = model_with("full")
    rows, first = model.table.rows, model.table.rows[0]
    with kept(model):
        rows[0] = None
        rows.append(None)
        model.table.rows = None
        model.table.more = 3
        model.count = 5
        model.table.sizes.clear()
    assert model.table.rows is rows
    assert rows[0] is first
    assert len(rows) == 2
    assert model.table.sizes == {"tokens": 16}
    assert not hasattr(model, "count")
    assert not hasattr(model.table, "more")


def make_z_image() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    sizes = {"dim": 16, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 8, "axes_dims": [4, 2, 2]}
    model = ZImageTransformer2DModel(in_channels=4, n_layers=1, n_refiner_layers=1, axes_lens=[128, 16, 16], **sizes)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


@torch.no_grad()
def z_image(model: nn.Module, batch: int = 1, prompt: int = 6, step: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(prompt)
    inputs: dict[str, Any] = {
        "x": [torch.randn(4, 1, 4, 4, generator=generator) for _ in range(batch)],
        "t": torch.full((batch,), step),
        "cap_feats": [torch.randn(prompt + number, 8, generator=generator) for number in range(batch)],
    }
    return torch.stack(model(**inputs, return_dict=False)[0])


@pytest.mark.slow
@pytest.mark.parametrize("full", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_z_image_is_saved_and_loaded_and_takes_more_samples(full: bool, tmp_path: Path) -> None:
    """Also one whose cache a call has filled, which its class makes empty."""
    model = make_z_image()
    if full:
        z_image(model)
    quantized = fxquant.compile(
        model, recipe="rtn-w8a8", timestep="t", calibrate=lambda: [z_image(model, step=step) for step in (0.9, 0.1)]
    )
    fxquant.save(quantized, tmp_path / "q")
    loaded = fxquant.load(tmp_path / "q")
    for options in ({"prompt": 6}, {"batch": 2, "prompt": 40}):
        found = z_image(quantized, **options)
        assert torch.equal(z_image(loaded, **options), found)
        torch.testing.assert_close(found, z_image(model, **options), rtol=0.1, atol=0.1)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # Both are deprecated, and still in use.
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_hooks_compute(norm: Any) -> None:
    """Its last value stays in an attribute, with the gradient's way to what it was computed from."""
    model = Rotary()
    norm(model.blocks[0][0]).requires_grad_(True)
    expected = model(*call())
    assert not model.blocks[0][0].weight.is_leaf
    traced = trace(model)
    assert torch.equal(traced(*call()), expected)
    quantized = fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=lambda: model(*call()), measure=0)
    assert list(quantized.plan.layers) == ["blocks.0.1"]
    assert torch.allclose(quantized(*call()), expected, atol=0.05)
    assert torch.equal(model(*call()), expected)


class Adding(nn.Module):
    """Adds up in a tensor that gradients flow through."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.total = self.proj.weight.sum(0)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.total.add_(1.0)
        return self.proj(x) + self.total + timestep[:, None, None]


@pytest.mark.slow
def test_a_model_that_writes_into_a_tensor_that_it_keeps() -> None:
    """It is refused, and its copy, which is called first, does not write into the model's own tensor."""
    model = Adding().eval()
    before = model.total.detach().clone()
    with torch.no_grad():
        for run in (
            lambda: trace(model)(*call()),
            lambda: fxquant.compile(model, recipe="rtn-w8a8", calibrate=lambda: model(*call())),
        ):
            with pytest.raises(CaptureError, match=r"Adding writes into a tensor .*total.*let it work on a copy"):
                run()
    assert torch.equal(model.total, before)
