"""HTG against the paper (arXiv 2503.06930), computed again here in float64 from the recorded activations alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxquant.capture.graph import CapturedGraph
from fxquant.ir.ops import recording
from fxquant.ir.tensors import copy_graph
from fxquant.pipeline.pipeline import Pipeline
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics
from tests.sampling import covering
from tests.support import captured, outputs, relative_error

C, HEADS, GROUPS = 8, 2, 3
STEPS = (900.0, 800.0, 650.0, 400.0, 350.0, 100.0)
PASSES = (
    f"group-timesteps{{groups={GROUPS}}},shift-channels,absorb-shifts,"
    "balance-channels{salience=moving-average},absorb-affines"
)


class Block(nn.Module):
    """AdaLN and attention; keeps what its linears read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(C, C) for name in ("q", "k", "v", "out")})])
        self.adaln = nn.Linear(1, 2 * C)

    def read(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """What q, k and v read, and what the output projection reads."""
        (block,) = self.blocks
        gamma, beta = self.adaln(timestep.to(x.dtype).reshape(-1, 1) / 100).unsqueeze(1).chunk(2, -1)
        y = nn.functional.layer_norm(x, (C,)) * (1 + gamma) + beta
        q, k, v = (block[name](y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in ("q", "k", "v"))
        return y, nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.blocks[0]["out"](self.read(x, timestep)[1])


def call(step: Tensor, seed: int = 0, batch: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, 5, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, step


def rewritten(steps: list[Tensor]) -> tuple[Block, CapturedGraph, PassContext]:
    """The model, its graph after all passes, and the context, calibrated with these timesteps."""
    model = Block().double().eval()
    found, plan = captured(model, **dict(zip(("x", "timestep"), call(steps[0]), strict=True))), Plan("", "", "timestep")
    Pipeline.parse("assign-precision").run(found.module, plan)
    observed, statistics = copy_graph(found.module), Statistics(num_rows=8)
    context = PassContext(plan, statistics)
    Pipeline.parse("insert-observers").run(observed, plan)
    with recording(statistics.record), torch.no_grad():
        for seed, step in enumerate(steps):
            observed(*call(step, seed))
    Pipeline.parse(PASSES).run(found.module, context)
    return model, found, context


@pytest.fixture(scope="module")
def made() -> tuple[Block, CapturedGraph, PassContext]:
    return rewritten([torch.full((3,), step, dtype=torch.float64) for step in reversed(STEPS)])


def by_hand(model: Block, place: int, weights: list[Tensor]) -> tuple[list[list[float]], np.ndarray, np.ndarray]:
    """Groups of timesteps, z of each and s, as the paper says; place 0 is the input of q, 1 that of out."""
    seen = {}
    with torch.no_grad():
        for seed, step in enumerate(reversed(STEPS)):
            x = model.read(*call(torch.full((3,), step, dtype=torch.float64), seed))[place]
            seen[step] = x.float().double().flatten(0, 1).numpy()  # Observers keep float32.
    z = {step: (x.max(axis=0) + x.min(axis=0)) / 2 for step, x in seen.items()}
    groups = [[step] for step in sorted(seen)]
    while len(groups) > GROUPS:
        means = [np.mean([z[step] for step in group], axis=0) for group in groups]
        gaps = [np.sum((left - right) ** 2) for left, right in itertools.pairwise(means)]
        first = int(np.argmin(gaps))
        groups[first : first + 2] = [groups[first] + groups[first + 1]]
    z_g = np.array([np.mean([z[step] for step in group], axis=0) for group in groups])
    m = None
    for step in STEPS:  # From the first denoising step on.
        (number,) = (i for i, group in enumerate(groups) if step in group)
        peak = np.abs(seen[step] - z_g[number]).max(axis=0)
        m = peak if m is None else 0.99 * m + 0.01 * peak
    top = np.max([np.abs(weight.detach().numpy()).max(axis=0) for weight in weights], axis=0)
    return groups, z_g, np.sqrt(m / top)


def test_groups_shifts_and_scales(made: tuple[Block, CapturedGraph, PassContext]) -> None:
    plan = made[2].plan
    model, name = Block().double(), "blocks.0."
    for place, layers in enumerate((("q", "k", "v"), ("out",))):
        groups, z, s = by_hand(model, place, [model.blocks[0][layer].weight for layer in layers])
        halfway = [(left[-1] + right[0]) / 2 for left, right in itertools.pairwise(groups)]
        for layer in layers:
            assert list(plan.layers[name + layer].boundaries) == halfway
            np.testing.assert_allclose(plan.vectors[f"{name}{layer}.shift"].numpy(), z, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(plan.vectors[name + layer].numpy(), s, rtol=1e-12)


def test_what_weights_and_biases_become(made: tuple[Block, CapturedGraph, PassContext]) -> None:
    found, plan = made[1], made[2].plan
    model = Block().double()
    own, get = model.blocks[0], found.module.get_parameter
    z, s = plan.vectors["blocks.0.q.shift"], plan.vectors["blocks.0.q"]
    z_out, s_out = plan.vectors["blocks.0.out.shift"], plan.vectors["blocks.0.out"]
    close = {"rtol": 1e-12, "atol": 1e-12}
    for layer in ("q", "k"):  # W s, and bias_g = bias + W z_g.
        torch.testing.assert_close(get(f"blocks.0.{layer}.weight"), own[layer].weight * s, **close)
        right = own[layer].bias + z @ own[layer].weight.T
        torch.testing.assert_close(get(f"blocks.0.{layer}.rows"), right, **close)
    # V yields (v - z) / s: softmax rows sum to 1.
    torch.testing.assert_close(get("blocks.0.v.weight"), own["v"].weight * s / s_out[:, None], **close)
    torch.testing.assert_close(get("blocks.0.out.weight"), own["out"].weight * s_out, **close)
    right = own["out"].bias + z_out @ own["out"].weight.T
    torch.testing.assert_close(get("blocks.0.out.rows"), right, **close)
    # 1 + gamma becomes (1 + gamma) / s, beta (beta - z_g) / s.
    gamma, beta = model.adaln.bias.chunk(2)
    right = torch.cat([((1 + gamma) / s - 1).expand_as(z), (beta - z) / s], dim=1)
    bias = dict(found.module.named_parameters()).get("adaln.bias_2", torch.zeros(2 * C))  # A constant may stand apart.
    torch.testing.assert_close(get("adaln.rows") + bias, right, **close)
    torch.testing.assert_close(get("adaln.weight"), model.adaln.weight / s.repeat(2)[:, None], **close)


def edges(plan: Plan) -> list[float]:
    """Timesteps on every boundary, next to it, calibrated ones and outside."""
    on = {edge for layer in plan.layers.values() for edge in layer.boundaries}
    return sorted({*on, *(edge + 1 for edge in on), *STEPS, 0.0, 999.0})


def test_boundaries_and_mixed_batches(made: tuple[Block, CapturedGraph, PassContext]) -> None:
    model, found, plan = Block().double(), made[1], made[2].plan
    steps = torch.tensor(edges(plan), dtype=torch.float64)
    inputs = call(steps, 7, len(steps))
    assert relative_error(outputs(found.module, *inputs), [model(*inputs)]) < 1e-12
    for i in range(len(steps)):
        alone = [value[i : i + 1] for value in inputs]
        assert relative_error(outputs(found.module, *alone), [model(*alone)]) < 1e-12


@pytest.mark.parametrize(
    ("dtype", "shape"), covering([torch.int64, torch.float32, torch.float64], [[], [1], [3]], together=1)
)
def test_shapes_and_dtypes_of_the_timestep(shape: list[int], dtype: torch.dtype) -> None:
    model, found, context = rewritten([torch.full(shape, step).to(dtype) for step in STEPS])
    model = Block().double()
    for step in edges(context.plan):
        inputs = call(torch.full(shape, step).to(dtype), 7)
        assert relative_error(outputs(found.module, *inputs), [model(*inputs)]) < 1e-12, step


def test_calibration_in_any_order_and_with_mixed_batches(made: tuple[Block, CapturedGraph, PassContext]) -> None:
    *_, context = made
    shuffled = rewritten([torch.tensor(steps, dtype=torch.float64) for steps in (
        (400.0, 900.0, 100.0), (650.0, 800.0, 350.0))])[2]  # fmt: skip
    layer = shuffled.plan.layers["blocks.0.q"]
    assert len(layer.boundaries) == GROUPS - 1 and shuffled.statistics.timesteps.tolist() == sorted(STEPS)
    # Calibrated from the last denoising step to the first.
    assert context.statistics.timesteps.tolist() == sorted(STEPS)
    low, high = (torch.stack([getattr(shuffled.statistics["blocks.0.q"], end)[i] for i in range(6)]) for end in (
        "minimum", "maximum"))  # fmt: skip
    middle = (low.double() + high.double()) / 2
    bins = layer.bins(torch.tensor(sorted(STEPS)))
    for number in range(GROUPS):
        torch.testing.assert_close(shuffled.plan.vectors["blocks.0.q.shift"][number], middle[bins == number].mean(0))
