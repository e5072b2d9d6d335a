"""Code that reads values while it is traced: followed where they are known, and right for these values alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.api import trace
from fxquant.capture.calls import Call, CallSpec, TensorSpec
from fxquant.capture.known_values import Tracing, at_most
from fxquant.errors import CaptureError, CheckpointError
from fxquant.ir.tensors import read_tensors

Body = Callable[[Tensor, Tensor, Tensor], Tensor]


class Masked(nn.Module):
    """A linear, and whatever a body makes of its result, a mask and the timestep."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])])
        self.body = body

    def forward(self, x: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        first, second = self.blocks[0]
        return second(self.body(first(x), timestep, mask)) + timestep[:, None, None]


def lengths(x: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
    """The prompts of a batch by their lengths, as Lumina 2 reads them."""
    sizes = mask.sum(dim=1).tolist()
    out = x.new_zeros(len(sizes), max(sizes), x.shape[-1])
    for number, size in enumerate(sizes):
        out[number, :size] = x[number, :size] * size
    if len(set(sizes)) > 1:
        out = out * 2
    return out.repeat(1, 2, 1)[:, : x.shape[1]]


def positions(x: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
    """A branch on the largest position, as OmniGen has one."""
    return x if torch.max(mask) + 1 > 1 else -x


def written(x: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
    """Values that are changed in place, through a view, before they are read."""
    counts = torch.zeros(3, dtype=torch.int64)
    counts[1:] += mask.sum()
    counts[0] = 1
    return x * int(counts.max()) + counts.numpy().sum().item()


def bounds(x: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
    """Tensors as bounds of slices and as sizes."""
    top = mask[0].sum() + 1
    part = x[:, : top - 1]
    rest = x.new_zeros(x.shape[0], x.shape[1] - top + 1, 4)
    return torch.cat([part, rest if top > 3 else rest + 1], dim=1)


def selected(x: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
    """Tokens that a mask selects, the prompts of a batch in one row, as PixArt's own code has them."""
    row = x.masked_select(mask.unsqueeze(-1) != 0).view(1, -1, x.shape[-1])
    assert row.shape[1] == sum(mask.sum(dim=1).tolist())
    return x + row.mean(dim=1, keepdim=True) + x[mask > 0].amax(0) + x[:, mask[0] == 1].mean(1, keepdim=True)


def repeated(x: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
    """Tokens that are repeated as often as a mask says, and positions in the result, as Qwen-Image 2.1 has them."""
    counts = torch.where(mask[0] > 0, 2, 1)
    tokens = torch.repeat_interleave(x, counts, dim=1)
    wanted = mask[0].repeat_interleave(counts) > 0
    places = wanted.nonzero(as_tuple=True)[0]
    assert places.numel() == 2 * int(mask[0].sum()) == len(torch.argwhere(wanted))
    tokens[:, places[: places.numel() // 2]] *= torch.unique(counts).sum() + torch.repeat_interleave(counts).amax()
    return tokens[:, : x.shape[1]] + torch.repeat_interleave(x[0, 0], torch.tensor([0, 2, 1, 1]))


def call(batch: int = 2, size: int = 3) -> dict[str, Tensor]:
    mask = torch.ones(batch, 5, dtype=torch.int64)
    mask[0, size:] = 0
    return {"x": torch.randn(batch, 5, 4), "timestep": torch.arange(float(batch)), "mask": mask}


@pytest.mark.parametrize("body", [lengths, positions, written, bounds, selected, repeated])
def test_values_of_a_mask_are_followed(body: Body) -> None:
    model = Masked(body).eval()
    traced = trace(model)
    first, other, larger = call(), call(size=2), call(3)
    for made in (first, first | {"x": torch.randn(2, 5, 4)}, other, larger, first):
        with torch.no_grad():
            torch.testing.assert_close(traced(**made), model(**made), rtol=1e-6, atol=1e-6)
    assert len(traced.graphs) == 3  # One for each mask, used again.
    assert "values of mask" in traced.captured[0].static_batch
    weights = {read_tensors(graph)["blocks.0.0.weight"].data_ptr() for graph in traced.graphs}
    assert weights == {model.blocks[0][0].weight.data_ptr()}


@pytest.mark.slow
def test_a_quantized_model_says_so_and_is_saved_and_loaded(tmp_path: Any) -> None:
    model = Masked(lengths).eval()
    calls = [call(), call(size=2)]
    quantized = fxquant.compile(model, recipe="rtn-w8a8", calibrate=lambda: [model(**made) for made in calls])
    assert len(quantized.graphs) == 2
    assert "branches on the values of mask" in str(fxquant.report(quantized))
    fxquant.save(quantized, tmp_path / "q")
    loaded = fxquant.load(tmp_path / "q", model=model)
    for made in (*calls, call(3), call(size=4)):
        assert torch.equal(loaded(**made), quantized(**made))
    assert "branches on the values of mask" in str(fxquant.report(loaded))


def test_values_that_are_not_read_are_not_held() -> None:
    def shaped(x: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        height, width = torch.tensor([x.shape[1], x.shape[2]]).tolist()  # Sizes are known without any input.
        mask = mask.repeat_interleave(2, dim=0)[: x.shape[0]]
        return (x * mask[:, :, None]).reshape(-1, height * width).reshape(-1, height, width)

    model = Masked(shaped).eval()
    traced = trace(model)
    for made in (call(), call(size=2), call(4)):
        assert torch.equal(traced(**made), model(**made))
    assert len(traced.graphs) == 1
    assert traced.captured[0].static_batch is None


@pytest.mark.parametrize(
    "body",
    [
        lambda x, timestep, mask: x if timestep.long().sum() > 3 else -x,
        lambda x, timestep, mask: x[:, : int(mask.sum() * x.argmax())],
    ],
    ids=["the timestep", "an activation"],
)
def test_what_is_never_held(body: Body) -> None:
    """A graph for each timestep would be one for each step; what the model computes is not known when it is traced."""
    model = Masked(body).eval()
    with pytest.raises(CaptureError, match=r"(?s)test_known_values.py.*choose with torch.where"):
        trace(model)(**call() | {"timestep": torch.tensor([1, 2])})


def test_many_graphs_for_values_are_told_once() -> None:
    traced = trace(Masked(positions).eval())
    made = call()

    def capture(number: int) -> None:
        with torch.no_grad():
            traced(**made | {"mask": made["mask"] * number})

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(7):
            capture(number)
    with pytest.warns(UserWarning, match=r"8 graphs.*values of mask"):
        capture(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(8)


def test_a_spec_with_values_is_written_and_read() -> None:
    spec = CallSpec(("mask",), (TensorSpec((2, 2), torch.bool, (1, 0, 1, 1)),), {"mask": 0}, "because")
    again = CallSpec.from_json(spec.to_json())
    assert again == spec
    assert again.fixed == "because"
    assert again.fits(Call(("mask",), [torch.tensor([[True, False], [True, True]])], {"mask": 0}))
    assert not again.fits(Call(("mask",), [torch.tensor([[True, True], [True, True]])], {"mask": 0}))
    assert torch.equal(again.known["mask"], torch.tensor([[True, False], [True, True]]))


def test_layers_are_counted_for_each_trace_of_a_call() -> None:
    tracing, call = Tracing(), CallSpec(("x",), (TensorSpec((2, 4), torch.float32),), {"x": 0})
    weights = [nn.Parameter(torch.ones(4, 4)) for _ in range(29)]
    with at_most(0):  # And the few that no output depends on.
        for some in (weights[:12], weights[12:24]):  # As where a table in the cache of a function is computed again.
            with tracing.knowing(nn.Identity(), call, {}):
                for weight in some:
                    F.linear(torch.ones(2, 4), weight)
        with pytest.raises(CheckpointError, match="runs more than 16 layers"), tracing.knowing(nn.Identity(), call, {}):
            for weight in weights[:17]:
                F.linear(torch.ones(2, 4), weight=weight)


def test_a_layer_that_runs_often_counts_once_and_computed_weights_do_not_count() -> None:
    tracing, call = Tracing(), CallSpec(("x",), (TensorSpec((2, 4), torch.float32),), {"x": 0})
    weight = nn.Parameter(torch.ones(4, 4))
    with at_most(0), tracing.knowing(nn.Identity(), call, {}):
        for _ in range(17):
            F.linear(torch.ones(2, 4), weight)
            F.linear(torch.ones(2, 4), weight * 2)


def test_compiled_it_has_a_graph_for_each_value() -> None:
    traced = trace(Masked(positions).eval().requires_grad_(False))
    x, timestep, mask = torch.randn(2, 3, 4), torch.ones(2), torch.ones(2, 3, dtype=torch.int64)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for held in (mask, mask * 2, mask):
        assert torch.equal(compiled(x, timestep, held), traced(x, timestep, held))
    assert len(traced.captured) == 2


def test_compiled_within_something_larger_it_checks_the_values_as_it_runs() -> None:
    traced = trace(Masked(positions).eval().requires_grad_(False))
    x, timestep, mask = torch.randn(2, 3, 4), torch.ones(2), torch.ones(2, 3, dtype=torch.int64)
    expected = traced(x, timestep, mask)
    assert traced.captured[0].call.known
    compiled = torch.compile(lambda *call: traced(*call) + 0, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, timestep, mask), expected)
    with pytest.raises(RuntimeError, match="right for one value of mask, and this call has another"):
        compiled(x, timestep, mask * 2)
