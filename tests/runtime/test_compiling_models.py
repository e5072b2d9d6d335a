"""Compiling in pieces on models of diffusers: as eager, and nothing is compiled again for other sizes and LoRAs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

import fxquant
from fxquant.runtime.model import GraphModel
from tests.adapters.loras import lora
from tests.zoo.entry import Entry
from tests.zoo.models import ENTRIES

BLOCKS = {
    "Flux2D": ({"num_layers": 2, "num_single_layers": 3}, 3),  # The last block drops the prompt.
    "SD32D": ({"num_layers": 4, "pos_embed_max_size": 16}, 3),  # The first has dual attention, the last no prompt.
    "Wan3D": ({"num_layers": 4}, 1),
    "PixArt2D-Sigma": ({"num_layers": 4}, 1),
    "CogVideoX3D": ({"num_layers": 4}, 2),  # The last drops the prompt.
}
"""For each model, options for several blocks, and how many of them differ."""
EACH = [pytest.param(name, marks=[pytest.mark.exhaustive] * (name != "Flux2D")) for name in BLOCKS]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    leaves = pytree.tree_leaves(model(**inputs))
    return torch.cat([leaf.flatten() for leaf in leaves if isinstance(leaf, Tensor)])


def quantized(name: str, options: dict[str, int] | None = None) -> tuple[Entry, nn.Module, GraphModel]:
    entry = next(entry for entry in ENTRIES if entry.id == name)
    entry = replace(entry, config=entry.config | (options or BLOCKS[name][0]))
    model = entry.model()
    made = fxquant.compile(
        model,
        recipe="rtn-w8a8",
        calibrate=lambda: output(model, entry.call()),
        measure=0,
        timestep=entry.timestep,
    )
    return entry, model, made


def in_pieces(model: GraphModel) -> CompileCounterWithBackend:
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(backend=counter, fullgraph=True, dynamic=True)
    return counter


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_each_distinct_block_is_compiled_once_for_all_sizes(name: str) -> None:
    """The tokens of the image and of the prompt are cut and joined within the blocks."""
    entry, _, made = quantized(name)
    other = entry.call(1, size=entry.other_size, prompt=entry.other_prompt, seed=1)  # A batch of one besides.
    calls = [entry.call(), other, entry.call(3, seed=2)]
    expected = [output(made, call) for call in calls]
    counter = in_pieces(made)
    assert all(torch.equal(output(made, call), want) for call, want in zip(calls, expected, strict=True))
    assert counter.frame_count == BLOCKS[name][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_loras_are_set_scaled_and_swapped(name: str) -> None:
    entry, model, made = quantized(name)
    targets = ("to_q", "to_v", "to_out.0", "net.2", "ff.net.0.proj")
    first, second = lora(model, targets=targets), lora(model, rank=2, seed=1, targets=targets)
    plain = output(made, entry.call())
    counter = in_pieces(made)
    assert torch.equal(output(made, entry.call()), plain)
    made.load_lora_adapter(first, adapter_name="a")
    loaded = output(made, entry.call())
    compiled = counter.frame_count
    made.load_lora_adapter(second, adapter_name="a", hotswap=True)
    made.set_adapters("a", 0.3)
    swapped = output(made, entry.call())
    made.set_adapters("a", 1.0)
    made.load_lora_adapter(first, adapter_name="a", hotswap=True)
    assert torch.equal(output(made, entry.call()), loaded)
    assert counter.frame_count == compiled <= 2 * BLOCKS[name][1]
    made._pieces = None
    assert torch.equal(output(made, entry.call()), loaded)
    made.load_lora_adapter(second, adapter_name="a", hotswap=True)
    made.set_adapters("a", 0.3)
    assert torch.equal(output(made, entry.call()), swapped)
    assert not torch.allclose(swapped, loaded) and not torch.allclose(loaded, plain)


@pytest.mark.slow
def test_two_blocks_that_share_an_op() -> None:
    """The first of two computes what both read, such as a quantized prompt, and is like the second all the same."""
    entry, _, made = quantized("PixArt2D-Sigma", {"num_layers": 2})
    expected = output(made, entry.call())
    counter = in_pieces(made)
    assert torch.equal(output(made, entry.call()), expected)
    assert counter.frame_count == 1


@pytest.mark.exhaustive
def test_sana_is_compiled_once_per_size() -> None:
    """Its blocks rearrange tokens into an image. The first one reads the image in another order of memory."""
    entry, _, made = quantized("Sana2D", {"num_layers": 4})
    calls = [entry.call(), entry.call(3, seed=2), entry.call(1, size=entry.other_size, seed=1)]
    expected = [output(made, call) for call in calls]
    counter = in_pieces(made)
    for call, want, count in zip(calls, expected, (2, 2, 4), strict=True):
        assert torch.equal(output(made, call), want) and counter.frame_count == count


@pytest.mark.parametrize("dim", [0, -1])
def test_repetitions_of_an_open_batch(dim: int) -> None:
    """PixArt repeats its mask once per head."""
    x, op = torch.randn(2, 5), torch.ops.fxquant.repeat_interleave.default
    assert torch.equal(op(x, 3, dim), torch.repeat_interleave(x, 3, dim))
    torch.library.opcheck(op, (x, 3, dim), test_utils=("test_schema", "test_faketensor"))
